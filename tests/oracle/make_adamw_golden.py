"""Writes tests/unit/kernels/adamw_golden.json: steps of torch.optim.AdamW in f32 on the CPU.

Run with the reference environment: python tests/oracle/make_adamw_golden.py
"""

import json
import pathlib

import torch

CASES = [
    {"learning_rate": 5e-7, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0, "gradient_scale": 1.0},
    {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1, "gradient_scale": 0.125},
    {"learning_rate": 0.3, "beta1": 0.5, "beta2": 0.9, "epsilon": 1e-3, "weight_decay": 0.01, "gradient_scale": 3.0},
]
ELEMENTS = 37
STEPS = 6


def run(case, generator):
    weight = torch.nn.Parameter(torch.randn(ELEMENTS, generator=generator) * 0.02)
    optimizer = torch.optim.AdamW(
        [weight],
        lr=case["learning_rate"],
        betas=(case["beta1"], case["beta2"]),
        eps=case["epsilon"],
        weight_decay=case["weight_decay"],
        foreach=False,
        fused=False,
    )
    out = dict(case, initial=weight.tolist(), steps=[])
    for step in range(STEPS):
        # sizes from 1e-9 to 10: also gradients far below epsilon; one is zero
        exponents = torch.linspace(-9, 1, ELEMENTS)
        gradient = torch.randn(ELEMENTS, generator=generator) * 10**exponents
        gradient[5] = 0
        weight.grad = gradient * case["gradient_scale"]
        optimizer.step()
        state = optimizer.state[weight]
        out["steps"].append(
            {
                "gradient": gradient.tolist(),
                "master": weight.tolist(),
                "exp_avg": state["exp_avg"].tolist(),
                "exp_avg_sq": state["exp_avg_sq"].tolist(),
            }
        )
    return out


def main():
    generator = torch.Generator().manual_seed(20)
    document = {
        "made_by": "tests/oracle/make_adamw_golden.py",
        "torch": torch.__version__,
        "cases": [run(case, generator) for case in CASES],
    }
    target = pathlib.Path(__file__).resolve().parents[1] / "unit" / "kernels" / "adamw_golden.json"
    target.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
