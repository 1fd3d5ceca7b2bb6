"""How the works call ours and the peers in PyTorch."""

import os

TORCH_DTYPE = {"bf16": "bfloat16", "fp32": "float32"}


def torch_options(bench):
    options = ["--dtype", TORCH_DTYPE[bench.a.dtype], "--threads", bench.a.ranks]
    return options + (["--device", bench.a.device] if bench.a.device != "cpu" else [])


def ours_name(ranks):
    return f"ours, {ranks} rank" + ("s" if ranks > 1 else "")


def figures(bench, path, phase):
    done = bench.python("figures", path, phase)
    return {key: value for key, value in done.items() if key not in ("wall_s", "peak_rss_bytes", "python_peak_bytes")}


def element_bytes(bench):
    return 2 if bench.a.dtype == "bf16" else 4


def take(sample, *names):
    """Removes long lists from a sample and gives them back."""
    return [sample.pop(name, None) for name in names]


def chosen(contestants, bench):
    """Without those that --skip names or --only does not."""
    named = lambda contestant, words: any(word in contestant.name for word in words)
    return [c for c in contestants if not named(c, bench.a.skip) and (not bench.a.only or named(c, bench.a.only))]


def remove(*paths):
    for path in paths:
        if os.path.exists(path):
            os.remove(path)
