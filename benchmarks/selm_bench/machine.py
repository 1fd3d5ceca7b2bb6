"""The machine beside a measurement: hardware, versions, what other processes do meanwhile, memory of a program and its ranks."""

import os
import platform
import resource
import subprocess
import threading
import time

BUSY_CORES = 0.15  # other processes' CPU time by elapsed time from which on a run is called busy


def cpu_info(key):
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith(key)), "")


def hardware():
    flags = cpu_info("flags").split()
    return {"cpu": cpu_info("model name") or platform.processor(), "cores": os.cpu_count(),
            "features": [name for name in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1), "system": platform.platform()}


def available_bytes():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def first_line(words):
    try:
        return subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "none"


def busy_seconds():
    """CPU seconds of all processes since the machine started (idle time and waiting for the disk left out)."""
    with open("/proc/stat") as file:
        fields = list(map(int, file.readline().split()[1:9]))
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds():
    """CPU seconds of this process and of its children that have ended, theirs included."""
    return sum(r.ru_utime + r.ru_stime for r in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)))


class Others:
    """How many cores the machine's other processes used between start and stop, on average."""

    def __init__(self, clock):
        self.clock = clock
        self.start = (clock(), busy_seconds(), own_seconds())

    def cores(self):
        then, busy, own = self.start
        elapsed = self.clock() - then
        if elapsed < 0.2:  # the kernel counts in hundredths of a second
            return 0.0
        return max(0.0, (busy_seconds() - busy) - (own_seconds() - own)) / elapsed


def proportional_set_size(pid):
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def with_descendants(root):
    """Process ids of a command and everything that it started."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parents.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(pid))
        except (OSError, ValueError, IndexError):
            pass
    found, ahead = [], [root]
    while ahead:
        found.append(ahead.pop())
        ahead += parents.get(found[-1], [])
    return found


class Memory(threading.Thread):
    """The largest sum of proportional set sizes of a command's processes, sampled."""

    def __init__(self, root, every_s=0.5):
        super().__init__(daemon=True)
        self.root, self.every_s = root, every_s
        self.peak = 0
        self.done = threading.Event()

    def run(self):
        wait = self.every_s
        while not self.done.wait(wait):
            start = time.perf_counter()
            self.peak = max(self.peak, sum(map(proportional_set_size, with_descendants(self.root))))
            wait = max(self.every_s, 50 * (time.perf_counter() - start))  # the kernel counts pages: not for more than 2 % of the time

    def stop(self):
        self.done.set()
        self.join()
        return self.peak
