"""Our programs against their peers, in turns in one run, on the same rows, cores and dtype.

usage: benchmarks/run WORK|all|summary [options]      (benchmarks/setup first, and scripts/build or scripts/test)

WORK is one of generate, rank, reward, logprob, train, import, tokenizers, collectives, startup, write, adamw. Ours: mpirun with one thread a
rank; a peer: one process with as many threads. Each is run in turns after a warm-up, 3 times (short ones 10); results go to
benchmarks/results/WORK-DTYPE.json (hardware, versions, commit, command, every sample, what other processes did meanwhile) and .md. `summary`
makes benchmarks/results/summary.md of all JSON files there: phase, peer, target, what was reached. --quick: fewer rows and repetitions and
only some of the peers, less than half an hour for `all` at fp32; the tables say what is left out. --device cuda is passed on (not tried on a GPU yet).
"""

import datetime
import json
import os
import sys
import time

from . import generation, machine, pairs, ranking, report, system
from .harness import ROOT, WORKS, Bench, Failed, measure, parse

MAKERS = {"generate": generation.works, "rank": ranking.rank_works, "reward": ranking.reward_works, "logprob": pairs.logprob_works, "train": pairs.train_works,
          **system.WORKS}
WITHOUT_DTYPE = {"import", "tokenizers", "collectives", "write", "adamw"}
MODULES = ("torch", "transformers", "trl", "llama-cpp-python", "tokenizers", "pyarrow", "h5py", "deepspeed")


def versions(bench):
    code = ("import importlib.metadata as m\nfor name in %r:\n    try:\n        print(name, m.version(name), end=' ')\n    except m.PackageNotFoundError:\n        pass\n" % (MODULES,))
    return bench.command([bench.a.python, "-c", code])["out"].strip() + ", " + machine.first_line(["mpirun", "--version"])


def commit():
    found = machine.first_line(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"])
    changed = machine.first_line(["git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no"]) != "none"
    return found + (" with changes" if changed else "")


def write(results, name, result):
    os.makedirs(results, exist_ok=True)
    with open(os.path.join(results, name + ".json"), "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    text = report.work_table(result)
    with open(os.path.join(results, name + ".md"), "w") as file:
        file.write(text)
    return text


def run_work(bench, kind, make, about):
    """One work, measured and written after every repetition, so that what was measured stays when the run is cut off."""
    load = os.getloadavg()[0]
    others = machine.Others(time.perf_counter)
    work = make()
    if work.measured_before:
        work.others_cores = others.cores()
    dtype = "" if kind in WITHOUT_DTYPE else bench.a.dtype
    name = work.name + ("-" + dtype if dtype else "")
    about = dict(about, dtype=dtype, ranks=bench.a.ranks, device=bench.a.device, load_before=load, comparisons=[vars(c) for c in work.comparisons])
    if dtype:
        work.what += f" ({dtype})"

    def save(result):
        result.update(about)
        peaks = bench.cached_roofline.get(bench.a.ranks)
        if peaks:
            result["roofline"] = peaks
            flops, bytes_ = peaks["flops"] / 1e9, peaks["bytes"] / 1e9
            result["notes"] = [*work.notes, f"Peaks of {bench.a.ranks} cores at once in this run: {flops:.0f} GF/s in registers, {bytes_:.1f} GB/s of memory."]
        write(bench.a.results, name, result)

    short = kind in ("import", "startup")
    repetitions = work.repetitions or bench.a.repetitions or ((3 if bench.a.quick else 10) if short else 3)
    result = measure(work, repetitions, save)
    print(report.work_table(result), flush=True)


def main(words):
    arguments = parse(words, __doc__)
    if arguments.work == "summary":
        text = report.summary(arguments.results)
        with open(os.path.join(arguments.results, "summary.md"), "w") as file:
            file.write(text)
        print(text)
        return 0
    for path, remedy in ((os.path.join(arguments.build, "bin", "selm_gen"), "Run scripts/build first"), (arguments.python, "Run benchmarks/setup first"),
                         (arguments.model, "Run scripts/test or scripts/quickstart first")):
        if not os.path.exists(path):
            sys.exit(f"benchmarks/run: {path} does not exist. {remedy}, or see --help")
    bench, failed = Bench(arguments), []
    try:
        about = {"hardware": machine.hardware(), "versions": versions(bench), "commit": commit(), "when": datetime.date.today().isoformat(),
                 "command": "benchmarks/run " + " ".join(words)}
        for kind in (WORKS if arguments.work == "all" else [arguments.work]):
            try:
                for make in MAKERS[kind](bench):
                    run_work(bench, kind, make, about)
            except Failed as error:
                failed.append(kind)
                print(f"benchmarks/run: {kind}: {error}", file=sys.stderr, flush=True)
    finally:
        bench.close()
    if failed:
        print(f"benchmarks/run: not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
