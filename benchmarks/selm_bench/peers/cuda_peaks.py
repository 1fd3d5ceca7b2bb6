"""What a GPU reaches: products of large matrices, and reading and writing memory. Usage: cuda_peaks.py --dtype bfloat16|float32"""

import argparse

import torch

from common import emit

RUNS = 10


def seconds(work):
    """Of each of RUNS runs, by events on the device, after one run to warm up."""
    work()
    result = []
    for _ in range(RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        result.append(start.elapsed_time(end) / 1000)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    a = parser.parse_args()
    size, dtype = 8192, getattr(torch, a.dtype)
    left, right = (torch.randn((size, size), device="cuda", dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    emit({"device": torch.cuda.get_device_name(), "flops": [2 * size**3 / s for s in seconds(lambda: torch.mm(left, right, out=product))],
          "bytes": [2 * source.numel() / s for s in seconds(lambda: target.copy_(source))]})


main()
