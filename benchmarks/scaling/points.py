"""Measured points of a scaling study: one run of selm_iter on some ranks, taken apart into its phases."""

import json
import os
import struct

PHASES = ("generate", "rank", "logprob", "train")
TIMING = {"generate": "generation", "rank": "rank", "logprob": "logprob_reference"}  # names below /timing of the iteration file


def parameters_of(model):
    """(number of parameters, of which each is stored once) of a directory with safetensors files."""
    total = 0
    for name in sorted(os.listdir(model)):
        if not name.endswith(".safetensors"):
            continue
        with open(os.path.join(model, name), "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for key, tensor in header.items():
            if key != "__metadata__":
                elements = 1
                for extent in tensor["shape"]:
                    elements *= extent
                total += elements
    return total


def idle_of(path, phase):
    """Share of the ranks' time in which they had no row, as the iteration file stores it; None without h5py."""
    try:
        import h5py
    except ImportError:
        return None
    with h5py.File(path) as file:
        timing = file[f"timing/{TIMING[phase]}"]
        busy, idle = timing["busy_s"][()], timing["idle_s"][()]
    return float(idle.sum() / max(1e-9, busy.sum() + idle.sum()))


def lines_of(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def losses_of_run(run, iteration=1):
    """[loss, gradient norm] of every step."""
    policy = os.path.join(run, f"iter{iteration}", "policy")
    return [[step["loss"], step["grad_norm"]] for step in lines_of(os.path.join(policy, "metrics.jsonl"))]


def train_numbers(policy, parameters, ranks, weight_bytes):
    """Means over the steps; the first is left out where there are more (it touches memory for the first time)."""
    steps = lines_of(os.path.join(policy, "metrics.jsonl"))
    kept = steps[1:] or steps
    mean = lambda key: sum(step[key] for step in kept) / len(kept)  # noqa: E731
    share = (ranks - 1) / ranks
    return {"seconds": mean("step_s"), "comm_s": mean("comm_s"), "tokens": mean("tokens"), "steps": len(steps), "batch": mean("rows"),
            # gradients to their owners in fp32, updated weights back
            "bytes_moved_per_rank": int(share * parameters * (4 + weight_bytes)), "idle": mean("comm_s") / mean("step_s")}


def points_of_run(run, ranks, nodes, mode, parameters, weight_bytes, iteration=1):
    """A list of {"phase", "mode", "ranks", "nodes", "rows", "tokens", "seconds", ...}; seconds of training are those of a step."""
    with open(os.path.join(run, "manifest.json")) as file:
        reports = json.load(file)[f"iter{iteration}"]
    rows_file = os.path.join(run, f"iter{iteration}", "iter.h5")
    points = []
    for phase in PHASES:
        report = reports.get(phase)
        if not report or (phase == "rank" and not report["tokens"]):  # pairs as given: nothing was computed
            continue
        point = {"phase": phase, "mode": mode, "ranks": ranks, "nodes": nodes, "rows": report["rows"]}
        if phase == "train":
            point.update(train_numbers(os.path.join(run, f"iter{iteration}", "policy"), parameters, ranks, weight_bytes))
        else:
            idle = idle_of(rows_file, phase)
            point.update(seconds=report["seconds"], tokens=report["tokens"], comm_s=None, steps=None, batch=None,
                         bytes_moved_per_rank=int(os.path.getsize(rows_file) / ranks),  # each writes its part of the file
                         idle=report.get("idle_fraction") if idle is None else idle)
        if point["seconds"] > 0 and not report.get("resumed_rows"):
            points.append(point)
    return points
