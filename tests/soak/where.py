"""Where a stopped process of selm_train is: read from its stack, without a debugger.

Words of the stack that point behind a call instruction of the program are taken for return addresses; their functions are read
from the outside inwards and compared with PLACES, so that old words in frames that are not filled count little. The place is the
innermost one that was found.
"""
import bisect
import re
import struct
import subprocess
import time
from pathlib import Path

STACK_BYTES = 1 << 18


class Place:
    def __init__(self, name, pattern, *inner):
        self.name, self.pattern, self.inner = name, re.compile(pattern), inner


_GATHER = Place("gather", r"ShardedWeights::|NodeExchange::|SharedWeights::spread")
_REDUCE = Place("reduce", r"ShardedGradient::")
_PASS = (_GATHER, _REDUCE, Place("", r"Engine::|Decoder::Impl::|LayerBackward"))  # "": the place around it

PLACES = (
    Place("training", r"TrainingLoop::run\(",
          Place("loading", r"TrainingLoop::start\("),
          Place("step", r"TrainingLoop::step\(",
                Place("step", r"TrainingLoop::accumulate\(",
                      Place("forward", r"Decoder::forward", *_PASS),
                      Place("backward", r"Decoder::backward", *_PASS)),
                _REDUCE,
                Place("optimizer", r"ShardedAdamW::apply", Place("gather", r"SharedWeights::spread")),
                Place("weights", r"Objective::refresh|DecoderTrainer::refresh")),
          Place("metrics", r"TrainingLoop::record\("),
          Place("checkpoint", r"TrainingLoop::save_checkpoint\(|CheckpointStore::save\(")),
    Place("model", r"TrainingLoop::publish\("),
)
PLACE_NAMES = ("start-up", "loading", "training", "step", "forward", "backward", "gather", "reduce", "optimizer", "weights", "metrics",
               "checkpoint", "model")


def place_of(functions):
    """@param functions names from the outermost inwards."""
    found, level = "start-up", PLACES
    for function in functions:
        for place in level:
            if place.pattern.search(function):
                found, level = place.name or found, place.inner
                break
        if not level:
            break
    return found


class Program:
    """Functions and code of an executable."""

    def __init__(self, path):
        self.path = Path(path).resolve()
        listing = subprocess.run(["nm", "-C", "-n", "--defined-only", str(self.path)], capture_output=True, text=True, check=True).stdout
        self.addresses, self.names = [], []
        for line in listing.splitlines():
            address, kind, name = line.split(" ", 2)
            if kind in "tTwW":
                self.addresses.append(int(address, 16))
                self.names.append(name)
        self.image = self.path.read_bytes()
        self.segments = list(self._executable_segments())

    def _executable_segments(self):
        offset, = struct.unpack_from("<Q", self.image, 32)
        size, count = struct.unpack_from("<HH", self.image, 54)
        for i in range(count):
            kind, flags, begin, address, _, in_file = struct.unpack_from("<IIQQQQ", self.image, offset + i * size)
            if kind == 1 and flags & 1:
                yield address, begin, in_file

    def function(self, address):
        return self.names[bisect.bisect_right(self.addresses, address) - 1]

    def behind_a_call(self, address):
        """Of x86-64; elsewhere every address within the code counts."""
        for start, offset, size in self.segments:
            if start + 8 <= address < start + size:
                if self.image[18:20] != b"\x3e\x00":
                    return True
                code = self.image[offset + address - start - 7:offset + address - start]
                return code[2] == 0xE8 or 0xFF in (code[5], code[4], code[1], code[0])
        return False

    def stack_functions(self, pid):
        """From the outermost inwards, of the main thread of a stopped process."""
        stack_pointer, counter = (int(word, 16) for word in Path(f"/proc/{pid}/syscall").read_text().split()[-2:])
        base, stack_end = None, 0
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area, _, offset, *rest = line.split()
            begin, end = (int(word, 16) for word in area.split("-"))
            if base is None and rest[-1] == str(self.path):
                base = begin - int(offset, 16)
            if begin <= stack_pointer < end:
                stack_end = end
        if base is None or stack_end == 0:
            return []
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(stack_pointer)
            stack = memory.read(min(STACK_BYTES, stack_end - stack_pointer) // 8 * 8)
        addresses = [word - base for word, in struct.iter_unpack("<Q", stack)]
        functions = [self.function(address) for address in reversed(addresses) if self.behind_a_call(address)]
        if any(start <= counter - base < start + size for start, _, size in self.segments):
            functions.append(self.function(counter - base))
        return functions

    def place(self, pid):
        """None where the process has gone."""
        try:
            return place_of(self.stack_functions(pid))
        except (OSError, ValueError):
            return None


def state(pid):
    """Letter of /proc/PID/stat; None: there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def wait_until_stopped(pid, limit_s=5):
    end = time.monotonic() + limit_s
    while (letter := state(pid)) not in (None, "Z", "X") and time.monotonic() < end:
        if letter == "T":
            return True
        time.sleep(0.0002)
    return False
