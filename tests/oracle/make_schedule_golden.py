"""Writes tests/unit/algo/schedule_golden.json: learning rates of Hugging Face's schedulers, for the unit test of algo.

    python tests/oracle/make_schedule_golden.py      (reference environment: torch, transformers)
"""
import json
import math
import pathlib

import torch
import transformers
from transformers import (get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup,
                          get_linear_schedule_with_warmup)


def rates(kind, peak, steps, ratio):
    warmup = math.ceil(steps * ratio)  # TrainingArguments.get_warmup_steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    if kind == "cosine":
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    elif kind == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    else:
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return {"schedule": kind, "peak": peak, "steps": steps, "warmup_ratio": ratio, "warmup_steps": warmup, "rates": out}


def main():
    # 15283 rows in batches of 256 and 20378 rows in batches of 128 are the paper's iterations: 59 and 159 steps.
    cases = [rates(kind, peak, steps, ratio)
             for kind in ("cosine", "linear", "constant")
             for peak, steps, ratio in ((5e-7, 15283 // 256, 0.1), (3e-7, 20378 // 128, 0.1), (1e-4, 1, 0.1), (1e-3, 7, 0.0),
                                        (1e-3, 5, 1.0))]
    target = pathlib.Path(__file__).resolve().parents[1] / "unit" / "algo" / "schedule_golden.json"
    target.write_text(json.dumps({"made_by": "tests/oracle/make_schedule_golden.py", "torch": torch.__version__,
                                  "transformers": transformers.__version__, "cases": cases}, indent=None) + "\n")


if __name__ == "__main__":
    main()
