"""Our programs against their peers, in turns in one run, on the same rows, cores and dtype.

usage: benchmarks/run WORK|all|summary [options]      (benchmarks/setup first, and scripts/build or scripts/test)

WORK is one of generate, rank, reward, logprob, train, import, tokenizers, collectives, startup, write, adamw, kernels. Ours: mpirun with one thread a
rank; a peer: one process with as many threads. Each is run in turns after a warm-up, 3 times (short ones 10); results go to
benchmarks/results/WORK-DTYPE.json (hardware, versions, commit, command, every sample, what other processes did meanwhile) and .md. `summary`
makes benchmarks/results/summary.md of all JSON files there: phase, peer, target, what was reached. --quick: fewer rows and repetitions and
only some of the peers, less than half an hour for `all` at fp32; the tables say what is left out. A series may be cut into pieces: --keep DIR makes
inputs once, --add adds samples to a result, --only and --skip choose sides. --device cuda is passed on (not tried on a GPU yet).
"""

import datetime
import json
import os
import sys
import time

from . import generation, machine, pairs, ranking, report, system
from .harness import ROOT, WORKS, Bench, Failed, measure, parse, without

MAKERS = {"generate": generation.works, "rank": ranking.rank_works, "reward": ranking.reward_works, "logprob": pairs.logprob_works, "train": pairs.train_works,
          **system.WORKS}
WITHOUT_DTYPE = {"import", "tokenizers", "collectives", "write", "adamw", "kernels"}
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


def earlier(results, name, work, about):
    """The result that --add adds to, or none: of the same work on the same machine only."""
    path = os.path.join(results, name + ".json")
    if not os.path.exists(path):
        return None
    with open(path) as file:
        before = json.load(file)
    for what, there, here in (("work", before["what"], work.what), ("machine", before["hardware"], about["hardware"])):
        if there != here:
            raise Failed(f"--add: {path} is of another {what} ({there}, not {here}). Leave --add out, or pass other --results")
    return before


def run_work(bench, kind, make, about):
    """One work, measured and written after every repetition, so that what was measured stays when the run is cut off."""
    load = os.getloadavg()[0]  # before the inputs are made
    others = machine.Others(time.perf_counter)
    work = make()
    if work.measured_before:
        work.others_cores = others.cores()
    dtype = "" if kind in WITHOUT_DTYPE else bench.a.dtype
    on_gpu = ["cuda"] if dtype and bench.a.device == "cuda" else []
    name = "-".join([work.name, *([dtype] if dtype else []), *on_gpu])
    if dtype:
        work.what += f" ({', '.join([dtype, *on_gpu])})"
    before = earlier(bench.a.results, name, work, about) if bench.a.add else None
    if before and bench.a.anew:
        before = without(before, {contestant.name for contestant in work.contestants})
    this_run = {key: about[key] for key in ("commit", "when", "command", "versions")}
    this_run["load_before"] = load
    about = {"hardware": about["hardware"], "dtype": dtype, "ranks": bench.a.ranks, "device": bench.a.device, "comparisons": [vars(c) for c in work.comparisons],
             "in_summary": work.in_summary}

    def save(result):
        measured = "cuda" if bench.a.device == "cuda" else bench.a.ranks
        if measured in bench.cached_roofline:
            this_run["roofline"] = bench.cached_roofline[measured]
        result.update(about, runs=[*(before["runs"] if before else []), this_run])
        write(bench.a.results, name, result)

    short = kind in ("import", "startup")
    repetitions = work.repetitions or bench.a.repetitions or ((3 if bench.a.quick else 10) if short else 3)
    result = measure(work, repetitions, save, before=before)
    if result["samples"] and "runs" in result:
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
