"""DPO with DeepSpeed's ZeRO stage 1 on CPU ranks of one thread (gloo). Started once per rank by this script itself."""

import argparse
import os
import subprocess
import sys
import time

from common import emit, load_decoder, log_probs, padded, read_rows


def rank_main(a):
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    policy, reference = load_decoder(a.model, a.dtype).train(), load_decoder(a.model, a.dtype).eval()
    rows = read_rows(a.pairs)[rank::size]
    each = len(rows) // a.steps
    micro = max(1, min(a.micro_batch, each))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=a.learning_rate, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": max(1, each // micro), "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 1}, "bf16": {"enabled": a.dtype == "bfloat16"}})
    torch.distributed.barrier()
    start, total = time.perf_counter(), 0.0
    for begin in range(0, len(rows), micro):
        batch = rows[begin: begin + micro]
        pairs = padded(batch, ("best", "worst"), policy.config.pad_token_id or 0)
        scores = log_probs(engine, pairs)
        with torch.no_grad():
            base = log_probs(reference, pairs)
        half = len(batch)
        loss = -torch.nn.functional.logsigmoid(a.beta * ((scores[:half] - scores[half:]) - (base[:half] - base[half:]))).mean()
        engine.backward(loss)
        engine.step()
        total += loss.item() * half if begin >= each * (a.steps - 1) else 0.0
    sums = torch.tensor([total, float(each), float(len(rows))], dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    seconds = time.perf_counter() - start
    if rank == 0:
        emit({"seconds": seconds, "pairs": int(sums[2]), "loss": float(sums[0] / sums[1])})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=5e-7)
    parser.add_argument("--beta", type=float, default=0.1)
    a = parser.parse_args()
    if "RANK" in os.environ:
        return rank_main(a)
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env=dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(a.ranks), LOCAL_SIZE=str(a.ranks),
                                                                   MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"))
             for rank in range(a.ranks)]
    sys.exit(max(process.wait() for process in ranks))


main()
