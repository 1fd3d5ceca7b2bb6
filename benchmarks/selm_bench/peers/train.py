"""Optimizer steps as the authors of the algorithm take them: policy and reference model, two padded forwards each (best and worst
together, then the generated answer), DPO and the optimism term, accumulation, AdamW on fp32 master weights."""

import time

from common import emit, load_decoder, log_probs, padded, peer_parser, read_rows, synchronize


def selm_loss(policy, reference, rows, pad, a):
    import torch

    pairs, responses = padded(rows, ("best", "worst"), pad), padded(rows, ("generated",), pad)
    half = len(rows)
    policy_pairs, policy_responses = log_probs(policy, pairs, a.device), log_probs(policy, responses, a.device)
    with torch.no_grad():
        reference_pairs, reference_responses = log_probs(reference, pairs, a.device), log_probs(reference, responses, a.device)
    z = (policy_pairs[:half] - policy_pairs[half:]) - (reference_pairs[:half] - reference_pairs[half:])
    optimism = a.alpha * a.beta * (policy_responses - reference_responses)
    return (-torch.nn.functional.logsigmoid(a.beta * z) + optimism).mean()


def main():
    parser = peer_parser(__doc__, ("--pairs", "lines {prompt, best, worst, generated} of token ids"))
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=5e-7)
    parser.add_argument("--steps", type=int, default=1)
    a = parser.parse_args()
    import torch

    torch.set_num_threads(a.threads)
    policy = load_decoder(a.model, a.dtype).train().to(a.device)
    reference = load_decoder(a.model, a.dtype).eval().to(a.device)
    if a.checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    master = [parameter.detach().float().clone() for parameter in policy.parameters()]
    optimizer = torch.optim.AdamW(master, lr=a.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rows = read_rows(a.pairs)
    pad = policy.config.pad_token_id or 0
    synchronize(a.device)
    start = time.perf_counter()
    size = len(rows) // a.steps
    for step in range(a.steps):
        total = 0.0
        for begin in range(step * size, (step + 1) * size, a.micro_batch):
            batch = rows[begin: begin + a.micro_batch]
            loss = selm_loss(policy, reference, batch, pad, a) * len(batch) / size
            loss.backward()
            total += loss.item()
        for target, parameter in zip(master, policy.parameters()):
            target.grad = parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for source, parameter in zip(master, policy.parameters()):
                parameter.copy_(source)
    synchronize(a.device)
    emit({"seconds": time.perf_counter() - start, "pairs": len(rows), "loss": total})


main()
