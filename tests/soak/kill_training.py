#!/usr/bin/env python3
"""kill -9 in the middle of training, again and again, and the same weights in the end.

A tiny model is trained once without interruption. Then a second run of the same command is killed at random moments and started
again until it ends: weights and metrics must be those of the first run, to the bit. Moments are drawn: anywhere between start and
end, in a chosen place (forward, backward, gathering weights, reducing gradients, optimizer, checkpoint; see where.py), while a
checkpoint's file is half written, while the model is published. Sometimes one rank is killed, sometimes launcher and ranks.

A second series goes on with other ranks and another ZeRO stage after each kill: updates within a tolerance of the uninterrupted.

Environment as of the tests: SELM_BIN_DIR, SELM_TOOL_DIR, SELM_SOURCE_DIR, SELM_MPIEXEC. Only Python's standard library.
"""
import argparse
import array
import collections
import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import where

KILLS_PER_RUN = 5
STEPS = 32
LAST_STEPS = 8  # in which no kill is meant to come: it would come too late
TOLERANCE = 1e-3  # relative, of a tensor's update, where ranks or stage change
EXIT_LIMIT_S = 120  # after a kill everything must have ended
RUN_LIMIT_S = 300
WANTED = ("anywhere", "forward", "backward", "gather", "reduce", "optimizer", "checkpoint", "half-written", "model")
SMALL = ["--dtype", "fp32", "--max-length", "96", "--max-prompt-length", "48", "--progress", "off"]


class Failure(Exception):
    pass


@dataclass
class Layout:
    zero: int
    ranks: int
    node_ranks: int

    def __str__(self):
        nodes = "" if self.node_ranks == 0 else f", {self.node_ranks} a node"
        return f"--zero {self.zero}, {self.ranks} ranks{nodes}"


@dataclass
class Kill:
    wanted: str
    place: str
    step: int
    resumed_from: str
    torn: bool


@dataclass
class Soak:
    work: Path
    chance: random.Random
    program: where.Program
    kills: list = field(default_factory=list)
    step_s: float = 0.0
    start_up_s: float = 0.0

    def prepare(self):
        tools, source = Path(os.environ["SELM_TOOL_DIR"]), Path(os.environ["SELM_SOURCE_DIR"])
        self.call(tools / "selm_tiny_model_tool", "policy", "seed=1")
        self.call(tools / "selm_tiny_model_tool", "reward", "seed=2", "classifier")
        self.selm("selm_import", "--input", source / "data" / "ultrafeedback_sample.jsonl", "--rows", "0:16", "--on-empty-answer", "keep",
                  "--output", "prefs.h5")
        self.selm("selm_gen", "--data", "prefs.h5", "--policy", "policy", "--output", "iter.h5", "--max-new-tokens", "8",
                  "--on-long-prompt", "skip", *SMALL)
        self.selm("selm_rank", "--iter", "iter.h5", "--ranker", "reward:reward", *SMALL)
        self.selm("selm_logp", "--iter", "iter.h5", "--model", "policy", *SMALL)

    def selm(self, name, *arguments):
        self.call(Path(os.environ["SELM_BIN_DIR"]) / name, *arguments)

    def call(self, *command):
        result = subprocess.run(list(map(str, command)), cwd=self.work, capture_output=True, text=True, timeout=RUN_LIMIT_S)
        if result.returncode != 0:
            raise Failure(f"{command[0]}: exit code {result.returncode}\n{result.stdout}{result.stderr}")

    def start(self, output, layout):
        command = [os.environ.get("SELM_MPIEXEC", "mpirun"), "--oversubscribe", "--bind-to", "none", "-np", layout.ranks,
                   self.program.path, "--iter", "iter.h5", "--policy", "policy", "--output", output, "--learning-rate", "1e-4",
                   "--global-batch", "4", "--epochs", STEPS // 4, "--tokens-per-microbatch", "200", "--save-dtype", "fp32",
                   "--checkpoint-every", "2", "--zero", layout.zero, "--node-ranks", layout.node_ranks, *SMALL]
        return Attempt(self, output, list(map(str, command)))

    def whole(self, output, layout):
        """The uninterrupted run; it also tells how fast this machine is: moments are drawn as shares of its times."""
        began = time.monotonic()
        self.start(output, layout).finish()
        steps = [json.loads(line)["step_s"] for line in (self.work / output / "metrics.jsonl").read_text().splitlines()]
        self.step_s = statistics.median(steps)
        self.start_up_s = max(0.0, time.monotonic() - began - sum(steps))


class Attempt:
    """One start of the training under the launcher."""

    def __init__(self, soak, output, command):
        self.soak, self.output = soak, soak.work / output
        self.log = soak.work / f"{output}.log"
        self.earlier_partials = set(self.partials())
        self.start_step = self.step()
        self.end_at = time.monotonic() + RUN_LIMIT_S
        with open(self.log, "w", encoding="utf-8") as log:
            self.launcher = subprocess.Popen(command, cwd=soak.work, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def step(self):
        """Steps that the metrics have."""
        try:
            return (self.output / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def going(self):
        if time.monotonic() > self.end_at and self.launcher.poll() is None:
            self.end_everything()
            raise Failure(f"{self.output.name} hangs after step {self.step()}:\n{self.log.read_text()}")
        return self.launcher.poll() is None

    def ranks(self):
        found = []
        try:
            children = [word for task in Path(f"/proc/{self.launcher.pid}/task").iterdir() for word in (task / "children").read_text().split()]
        except OSError:
            children = []
        for pid in children:
            try:
                if os.readlink(f"/proc/{pid}/exe") == str(self.soak.program.path):
                    found.append(int(pid))
            except OSError:
                pass
        return sorted(found)

    def partials(self):
        return (self.output / "checkpoints").glob("*.partial-*")

    def half_written(self):
        """Is there a checkpoint's file that this start has not finished?"""
        return any(path not in self.earlier_partials for path in self.partials())

    def publishing(self):
        return any(self.output.parent.glob(f"{self.output.name}.partial-*"))

    def resumed_from(self):
        """The step of the checkpoint that was read; "start": none was there, or none was read yet."""
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            if "going on from the checkpoint of step " in line:
                return line.partition("checkpoint of step ")[2].split()[0]
        return "start"

    def finish(self):
        try:
            code = self.launcher.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.end_everything()
            raise Failure(f"{self.output.name} did not end within {RUN_LIMIT_S} s:\n{self.log.read_text()}") from None
        if code != 0:
            raise Failure(f"{self.output.name} ended with exit code {code}:\n{self.log.read_text()}")

    def end_everything(self):
        ranks = self.ranks()
        for pid in (self.launcher.pid, *ranks):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.launcher.wait()
        return ranks

    def kill(self, wanted, from_step, until_step):
        """Kills at a moment of the kind wanted, once a step in [from_step, until_step) is reached. None: the run had ended."""
        chance = self.soak.chance
        victim = self.stop_a_rank(wanted, chance.randrange(from_step, max(until_step, from_step + 1)))
        if victim is None:
            return None
        place = self.soak.program.place(victim) or "unknown"
        step, torn = self.step(), self.half_written()
        ranks = self.ranks()
        if chance.random() < 0.2:
            self.end_everything()  # as when a node loses its power
        else:
            os.kill(victim, signal.SIGKILL)
            try:
                self.launcher.wait(EXIT_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.end_everything()
                raise Failure(f"the launcher still waits {EXIT_LIMIT_S} s after one rank was killed in {place}") from None
            if self.launcher.returncode == 0:
                raise Failure(f"exit code 0 although a rank was killed in {place}")
        self.wait_until_gone(ranks)
        return Kill(wanted, place, step, self.resumed_from(), torn and self.half_written())

    def wait_until_gone(self, ranks):
        end = time.monotonic() + EXIT_LIMIT_S
        while left := [pid for pid in ranks if where.state(pid) not in (None, "Z", "X")]:
            if time.monotonic() > end:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise Failure(f"{len(left)} rank(s) lived on for {EXIT_LIMIT_S} s after another was killed")
            time.sleep(0.005)

    def stop_a_rank(self, wanted, step):
        """A process that is stopped (SIGSTOP) in the moment wanted; None: the run has ended."""
        chance = self.soak.chance
        if wanted == "anywhere" and chance.random() < 0.3:
            time.sleep(chance.uniform(0, self.soak.start_up_s))  # MPI starts, data and checkpoint are read
            return self.stop_one()
        if wanted == "half-written":
            while self.going() and not (self.step() >= step and self.half_written()):
                pass
            return self.stop_one()
        if wanted == "model":
            while self.going() and not self.publishing():
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.003))
            return self.stop_one()
        while self.going() and self.step() < step:
            time.sleep(self.soak.step_s / 10)
        time.sleep(chance.uniform(0, self.soak.step_s))
        while (victim := self.stop_one()) is not None:
            if wanted == "anywhere" or self.soak.program.place(victim) == wanted or self.step() >= step + 6:
                return victim
            os.kill(victim, signal.SIGCONT)
            time.sleep(chance.uniform(0, self.soak.step_s / 10))
        return None

    def stop_one(self):
        while self.going():
            ranks = self.ranks()
            if not ranks:
                time.sleep(0.005)
                continue
            victim = self.soak.chance.choice(ranks)
            try:
                os.kill(victim, signal.SIGSTOP)
            except ProcessLookupError:
                continue
            if where.wait_until_stopped(victim):
                return victim
        return None


# --- what must be equal
NOT_TIMES = ("step", "epoch", "learning_rate", "loss", "loss/dpo", "loss/optimism", "rewards/margins", "logps/chosen", "grad_norm", "rows",
             "tokens")


def metrics(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in NOT_TIMES} for line in lines]


def tensors(directory):
    data = (directory / "model.safetensors").read_bytes()
    size, = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = array.array("f", data[8 + size + begin:8 + size + end])
    return found


def expect_same_bits(whole, killed):
    if (whole / "model.safetensors").read_bytes() != (killed / "model.safetensors").read_bytes():
        raise Failure(f"weights differ from the uninterrupted run's by {update_difference(whole, killed):.2e}")
    if metrics(whole) != metrics(killed):
        raise Failure("metrics differ from the uninterrupted run's")


def update_difference(whole, other):
    """Largest over tensors of |difference| / |update|."""
    start, one, two = tensors(whole.parent / "policy"), tensors(whole), tensors(other)
    largest = 0.0
    for name, values in start.items():
        update = sum((a - s) ** 2 for a, s in zip(one[name], values))
        difference = sum((a - b) ** 2 for a, b in zip(one[name], two[name]))
        largest = max(largest, (difference / update) ** 0.5)
    return largest


def expect_nothing_left(directory):
    left = [str(path) for path in (*directory.rglob("*.partial-*"), *directory.parent.glob(f"{directory.name}.partial-*"))]
    if left:
        raise Failure(f"left behind: {', '.join(left)}")


# --- the series
def draw_layout(chance, stages):
    ranks = chance.choice((2, 3, 4))
    return Layout(chance.choice(stages), ranks, chance.choice((0, 1, 2)))


def kill_until_done(soak, output, kills, layout_of_attempt):
    """Kills `kills` times, fewer if the run ends before; then lets it end. Returns how often it was killed."""
    done = 0
    while done < kills:
        layout = layout_of_attempt()
        last = done + 1 == kills
        wanted = "model" if last and soak.chance.random() < 0.4 else soak.chance.choice(WANTED[:-1])
        attempt = soak.start(output, layout)
        steps_left = STEPS - LAST_STEPS - attempt.start_step
        kill = attempt.kill(wanted, attempt.start_step, attempt.start_step + max(1, steps_left // (kills - done)))
        if kill is None:
            attempt.finish()
            print(f"  the run ended before the kill {'while publishing' if wanted == 'model' else 'in ' + wanted}", flush=True)
            return done
        done += 1
        soak.kills.append(kill)
        print(f"  kill {len(soak.kills)}: {layout}, from {kill.resumed_from}: killed after step {kill.step} in {kill.place}"
              f" (wanted: {wanted}){', checkpoint torn' if kill.torn else ''}", flush=True)
    soak.start(output, layout_of_attempt()).finish()
    return done


def bit_equal_series(soak, kills, fixed):
    run, stages = 0, []
    while kills > 0:
        run += 1
        if not stages:
            stages = soak.chance.sample(range(4), 4)
        layout = fixed or draw_layout(soak.chance, [stages.pop()])
        print(f"run {run}: {layout}", flush=True)
        whole, killed = f"whole{run}", f"killed{run}"
        soak.whole(whole, layout)
        kills -= kill_until_done(soak, killed, min(kills, KILLS_PER_RUN), lambda: layout)
        expect_same_bits(soak.work / whole, soak.work / killed)
        expect_nothing_left(soak.work / killed)
        print(f"run {run}: bit-equal to the uninterrupted run", flush=True)
        shutil.rmtree(soak.work / whole)
        shutil.rmtree(soak.work / killed)


def moving_series(soak, kills):
    if kills == 0:
        return
    soak.whole("whole", Layout(1, 2, 0))
    run = 0
    while kills > 0:
        run += 1
        killed = f"moved{run}"
        print(f"run {run} on changing ranks", flush=True)
        kills -= kill_until_done(soak, killed, min(kills, KILLS_PER_RUN), lambda: draw_layout(soak.chance, range(4)))
        difference = update_difference(soak.work / "whole", soak.work / killed)
        if difference > TOLERANCE:
            raise Failure(f"updates differ from the uninterrupted run's by {difference:.2e}, more than {TOLERANCE}")
        expect_nothing_left(soak.work / killed)
        print(f"run {run} on changing ranks: updates within {difference:.1e} of the uninterrupted run's", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="with the same ranks and stage: bit-equal")
    parser.add_argument("--moves", type=int, default=10, help="kills after which ranks and stage change: within a tolerance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layout", type=int, nargs=3, metavar=("ZERO", "RANKS", "NODE_RANKS"), help="instead of drawn ones")
    arguments = parser.parse_args()
    # Shared memory of jobs that are killed stays: it lies where it is removed in the end.
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory(dir=shared) as memory:
        os.environ.update(TMPDIR=memory, OMPI_MCA_btl_vader_backing_directory=memory, OMPI_MCA_osc_sm_backing_directory=memory)
        program = where.Program(Path(os.environ["SELM_BIN_DIR"]) / "selm_train")
        soak = Soak(Path(work), random.Random(arguments.seed), program)
        try:
            soak.prepare()
            bit_equal_series(soak, arguments.kills, Layout(*arguments.layout) if arguments.layout else None)
            moving_series(soak, arguments.moves)
        except Failure as failure:
            print(f"FAILED: {failure}", flush=True)
            return 1
    places = collections.Counter(kill.place for kill in soak.kills)
    print(f"{len(soak.kills)} kills in {time.monotonic() - began:.0f} s, {sum(kill.torn for kill in soak.kills)} left a torn checkpoint; by place: "
          + ", ".join(f"{name} {places[name]}" for name in (*where.PLACE_NAMES, "unknown") if places[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
