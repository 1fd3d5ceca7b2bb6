"""What every work shares: options, running ours and the peers, measuring in turns."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Callable

from . import machine

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PEERS = os.path.join(ROOT, "benchmarks", "selm_bench", "peers")
WORKS = ["generate", "rank", "reward", "logprob", "train", "import", "tokenizers", "collectives", "startup", "write", "adamw", "kernels"]
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Contestant:
    """One side of a comparison. `run(repetition)` does the work once and returns a sample: a dictionary of numbers."""
    name: str
    run: Callable[[int], dict]
    repetitions: int = 0  # 0: as many as asked for
    warm_up: bool = False  # runs once before everything, unrecorded; peers in Python warm up in their own process


@dataclass
class Comparison:
    """A line of the table: `ours` by `peer` in `key` (peer empty: the number itself), and the target, if there is one."""
    phase: str
    ours: str
    peer: str
    key: str
    target: float | None = None
    at_most: bool = False  # the target is an upper bound
    peer_text: str = ""


@dataclass
class Work:
    name: str
    what: str
    unit: str
    key: str
    contestants: list
    comparisons: list
    notes: list = field(default_factory=list)
    repetitions: int = 0  # 0: as many as asked for
    in_summary: bool = True
    measured_before: bool = False  # by one program that took turns itself: samples are only handed on
    others_cores: float = 0.0  # meanwhile


class Failed(Exception):
    pass


def reason_of(error):
    """The last line of a failed command's output that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -=\n")]
    return lines[-1][:200].replace("|", "/") if lines else "failed"


def tail(text, lines=12):
    return "\n".join(text.splitlines()[-lines:])


class Bench:
    """Paths, options, and the ways to run things."""

    def __init__(self, arguments):
        self.a = arguments
        self.work = self.kept(arguments.keep) if arguments.keep else tempfile.mkdtemp(prefix="selm-benchmark-", dir=arguments.scratch)
        self.data = arguments.data
        self.cached_roofline = {}
        self.running = None
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def kept(self, directory):
        """A directory of inputs that stay for later runs: of one model, reward model, data, dtype and ranker."""
        os.makedirs(directory, exist_ok=True)
        of, record = {name: getattr(self.a, name) for name in ("model", "reward", "data", "dtype", "layers")}, os.path.join(directory, "made_of.json")
        if not os.path.exists(record):
            with open(record, "w") as file:
                json.dump(of, file)
        with open(record) as file:
            if json.load(file) != of:
                sys.exit(f"benchmarks/run: the inputs in {directory} were made of other things ({record}). Pass another --keep")
        return directory

    def path(self, name):
        return os.path.join(self.work, name)

    def made(self, name, make):
        """An input that is made once: make(path) writes it under another name first, so that what has the name is whole."""
        path, part = self.path(name), self.path("part-" + name)
        if not os.path.exists(path):
            for left in (part, part + ".journal"):
                shutil.rmtree(left) if os.path.isdir(left) else os.path.exists(left) and os.remove(left)
            make(part)
            os.rename(part, path)
        return path

    def close(self):
        """Ends what still runs when the run is cut off, and removes the data."""
        if self.running:
            try:
                os.killpg(self.running.pid, signal.SIGTERM)
                self.running.wait(3)
            except subprocess.TimeoutExpired:
                os.killpg(self.running.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not self.a.keep:
            shutil.rmtree(self.work, ignore_errors=True)

    def note(self, name, value):
        """Something that one side found and another is compared with, also in a later run on the same inputs."""
        with open(self.path(f"noted-{name}.json"), "w") as file:
            json.dump(value, file)

    def noted(self, name):
        path = self.path(f"noted-{name}.json")
        if not os.path.exists(path):
            return None
        with open(path) as file:
            return json.load(file)

    def command(self, words, environment=None, memory=False):
        """Runs a command; {"out", "wall_s", "peak_rss_bytes" of the process itself, "pss_bytes" where asked for}."""
        words = [str(word) for word in words]
        start = time.perf_counter()
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(words, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, process_group=0,
                                       env=dict(os.environ, **(environment or {})))
            self.running = process
            watch = machine.Memory(process.pid) if memory else None
            if watch:
                watch.start()
            limit = threading.Timer(self.a.limit, lambda: os.killpg(process.pid, signal.SIGTERM))
            limit.daemon = True  # a run that is cut off must not wait for it
            limit.start()
            try:
                out = process.stdout.read()
            finally:
                limit.cancel()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode, self.running = os.waitstatus_to_exitcode(status), None
            result = {"out": out, "wall_s": time.perf_counter() - start, "peak_rss_bytes": usage.ru_maxrss * 1024}
            if watch:
                result["pss_bytes"] = watch.stop()
            if process.returncode != 0:
                errors.seek(0)
                raise Failed(f"{' '.join(words)}\nended with {process.returncode}:\n{tail(out)}\n{tail(errors.read())}")
        return result

    def mpirun(self, ranks, *words, memory=False):
        return self.command(["mpirun", "--oversubscribe", "--bind-to", "none", "-np", ranks, *words], MPI, memory)

    def program(self, name):
        return os.path.join(self.a.build, "bin", name)

    def tool(self, name):
        path = os.path.join(self.a.build, "benchmarks", name)
        if not os.path.exists(path):
            raise Failed(f"{path} does not exist. Build it: ninja -C {self.a.build} {name}")
        return path

    def selm(self, name, *words, ranks=None, memory=False):
        options = [] if name == "selm_import" else ["--progress", "off"]
        if self.a.device != "cpu" and name != "selm_import":
            options += ["--device", self.a.device]
        return self.mpirun(ranks or self.a.ranks, self.program(name), *options, *words, memory=memory)

    def python(self, script, *words, environment=None, memory=False, threads=None):
        """A peer: benchmarks/selm_bench/peers/SCRIPT.py; its last line of output is JSON."""
        threads = threads or self.a.ranks
        environment = dict({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}, **(environment or {}))
        done = self.command([self.a.python, os.path.join(PEERS, script + ".py"), *words], environment, memory)
        lines = done.pop("out").strip().splitlines()
        if not lines:
            raise Failed(f"{script} printed nothing")
        return dict(done, **json.loads(lines[-1]))

    def imported(self, rows, name):
        return self.made(name, lambda path: self.selm("selm_import", "--input", self.data, "--rows", f"0:{rows}", "--output", path, ranks=1))

    def with_answers(self, rows):
        """An iteration file whose generated answers are the next row's chosen ones: texts of real lengths; and the lines it was made of."""
        def write_lines(path):
            with open(self.data) as file:
                sample = [json.loads(line) for _, line in zip(range(rows + 1), file)]
            with open(path, "w") as out:
                for row, following in zip(sample, sample[1:]):
                    response = following["chosen"][-1]["content"]
                    out.write(json.dumps({"prompt_id": row["prompt_id"], "response": response, "messages": row["chosen"][:-1], "prompt": row["prompt"],
                                          "answers": [response, row["chosen"][-1]["content"], row["rejected"][-1]["content"]]}) + "\n")

        lines = self.made(f"answers-{rows}.jsonl", write_lines)
        prefs = self.imported(rows, f"prefs-{rows}.h5")
        return self.made(f"answers-{rows}.h5", lambda path: self.selm("selm_gen", "--data", prefs, "--responses", lines, "--output", path, ranks=1)), lines

    def roofline(self, ranks=None):
        """Peaks of what computes: as cpu_roofline, with --device cuda those of one GPU (whatever `ranks`) and its name under "device"."""
        if self.a.device == "cpu":
            return self.cpu_roofline(ranks)
        if "cuda" not in self.cached_roofline:
            peaks = self.python("cuda_peaks", "--dtype", "bfloat16" if self.a.dtype == "bf16" else "float32")
            self.cached_roofline["cuda"] = {"device": peaks["device"], "flops": max(peaks["flops"]), "bytes": max(peaks["bytes"]),
                                            "samples": {key: peaks[key] for key in ("flops", "bytes")}}
        return self.cached_roofline["cuda"]

    def cpu_roofline(self, ranks=None):
        """Peaks of `ranks` cores at once, measured once in a run: {"flops": per s, "bytes": per s, samples}."""
        ranks = ranks or self.a.ranks
        if ranks not in self.cached_roofline:
            out = self.mpirun(ranks, self.tool("selm_roofline_benchmark"), 5 if self.a.quick else 10)["out"]
            lines = {line["what"]: line for line in map(json.loads, filter(lambda x: x.startswith("{"), out.splitlines()))}
            peak = {what: max(line["samples"]) * 1e9 for what, line in lines.items()}
            flops = peak["fma_bf16"] if self.a.dtype == "bf16" and "fma_bf16" in peak else peak["fma_fp32"]
            self.cached_roofline[ranks] = {"ranks": ranks, "flops": flops, "bytes": max(peak["read"], peak["update"]), "samples": lines}
        return self.cached_roofline[ranks]


def number(pattern, text):
    found = re.search(pattern, text)
    if not found:
        raise Failed(f"cannot find /{pattern}/ in:\n{text}")
    return float(found.group(1))


def without(result, names):
    """@p result without the samples of these sides, and without the runs that no sample is left of."""
    samples = {name: [] if name in names else kept for name, kept in result["samples"].items()}
    used = sorted({sample["run"] for kept in samples.values() for sample in kept})
    place = {run: i for i, run in enumerate(used)}
    return dict(result, runs=[result["runs"][run] for run in used],
                samples={name: [dict(sample, run=place[sample["run"]]) for sample in kept] for name, kept in samples.items()})


def measure(work, repetitions, save, log=lambda text: print(text, file=sys.stderr, flush=True), before=None):
    """All contestants in turns, every second time in the opposite order. A contestant that fails is left out, with the reason.
    Samples are added to those of @p before, an earlier result of the same work."""
    result = {"work": work.name, "what": work.what, "unit": work.unit, "key": work.key, "notes": list(work.notes), "left_out": {},
              "samples": dict(before["samples"] if before else {})}
    for contestant in work.contestants:
        result["samples"].setdefault(contestant.name, [])
    if before:
        names = {contestant.name for contestant in work.contestants}
        result["left_out"] = {name: reason for name, reason in before["left_out"].items() if name not in names}
    run = len(before["runs"]) if before else 0

    def attempt(contestant, repetition):
        try:
            return contestant.run(repetition)
        except Failed as error:
            log(f"{work.name}: {contestant.name}: {error}")
            result["left_out"][contestant.name] = reason_of(error)
            save(result)
            return None

    for contestant in work.contestants:
        if contestant.warm_up:
            attempt(contestant, 0)
    for repetition in range(repetitions):
        for contestant in (work.contestants if repetition % 2 == 0 else reversed(work.contestants)):
            wanted = min(contestant.repetitions or repetitions, repetitions)
            if repetition >= wanted or contestant.name in result["left_out"]:
                continue
            others = machine.Others(time.perf_counter)
            sample = attempt(contestant, repetition)
            if sample is None:
                continue
            sample["run"] = run
            sample["others_cores"] = work.others_cores if work.measured_before else others.cores()
            result["samples"][contestant.name].append(sample)
            save(result)
            if not work.measured_before:
                log(f"{work.name}: {contestant.name}: {sample.get(work.key, 0):.4g} {work.unit} (others {sample['others_cores']:.2f} cores)")
    return result


def parse(words, doc):
    parser = argparse.ArgumentParser(prog="benchmarks/run", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=[*WORKS, "all", "summary"])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of our programs and of the peers in PyTorch")
    parser.add_argument("--repetitions", type=int, help="after a warm-up (3; 10 of short ones)")
    parser.add_argument("--peer-repetitions", type=int, default=0, help="fewer for the peers (as many)")
    parser.add_argument("--quick", action="store_true", help="fewer rows and repetitions, and only some of the peers; the tables say which")
    parser.add_argument("--ranks", type=int, default=2, help="of ours, one thread each; the peers' threads (2)")
    parser.add_argument("--rows", type=int, help="prompts, pairs or ranked rows")
    parser.add_argument("--layers", type=int, default=24, help="of the pair ranker (24: PairRM's size)")
    parser.add_argument("--points", help="generate: PROMPTSxTOKENS,... (16x64,32x128); kernels: a regular expression (all)")
    parser.add_argument("--skip", default="", help="contestants that are left out, words of their names with commas between (trl,deepspeed,1 rank)")
    parser.add_argument("--only", default="", help="the contestants that run, words of their names with commas between (all)")
    parser.add_argument("--add", action="store_true", help="to the samples of an earlier run of the same work on the same machine")
    parser.add_argument("--anew", action="store_true", help="with --add: the sides that are measured lose their earlier samples (their code is another one)")
    parser.add_argument("--keep", metavar="DIR", help="inputs (imported rows, token ids, converted weights) are taken from here, and stay here")
    parser.add_argument("--deepspeed", action="store_true", help="train: also DeepSpeed's ZeRO-1 on CPU ranks (compiles its communication first)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds of one repetition of one side; then it is ended and left out (3600)")
    parser.add_argument("--tokens-per-microbatch", type=int, default=1024)
    parser.add_argument("--build", default=os.path.join(ROOT, "build", "release"))
    parser.add_argument("--model", default=os.path.join(ROOT, "build", "models", "smollm2"))
    parser.add_argument("--reward", default=os.path.join(ROOT, "build", "models", "smollm2-reward"))
    parser.add_argument("--python", default=os.path.join(ROOT, "build", "bench-venv", "bin", "python"), help="of benchmarks/setup")
    parser.add_argument("--data", default=os.path.join(ROOT, "data", "ultrafeedback_sample.jsonl"), help="preference rows (.jsonl)")
    parser.add_argument("--results", default=os.path.join(ROOT, "benchmarks", "results"))
    parser.add_argument("--scratch", help="for data and checkpoints (TMPDIR)")
    arguments = parser.parse_args(words)
    if arguments.ranks < 1 or (arguments.repetitions is not None and arguments.repetitions < 1):
        parser.error("--ranks and --repetitions begin at 1")
    arguments.skip, arguments.only = ([word.strip() for word in words.split(",") if word.strip()] for words in (arguments.skip, arguments.only))
    return arguments
