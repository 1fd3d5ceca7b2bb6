"""Runs of a scaling study, one JSON line each in a file, so that a study can be made in pieces."""

import json
import os
import sys


def planned(ranks, cores, repetitions):
    """(repetition, mode, ranks) of all runs, in the order in which they are made. More ranks than cores: once, for the results alone."""
    timed, crowded = [n for n in ranks if n <= cores], [n for n in ranks if n > cores]
    runs = []
    for repetition in range(repetitions):
        for n in timed:
            runs += [(repetition, "strong", n)] + ([(repetition, "weak", n)] if n > 1 else [])
    return runs + [(0, "strong", n) for n in crowded]


class Samples:
    """`settings` is what all runs of a study have in common; a file with runs of other settings is refused."""

    def __init__(self, path, settings):
        self.path, self.settings, self.runs = path, settings, {}
        if not path or not os.path.exists(path):
            return
        with open(path) as file:
            for line in file:
                entry = json.loads(line)
                differing = sorted(k for k in settings if entry["settings"].get(k) != settings[k])
                if differing:
                    sys.exit(f"{path} holds runs of other settings ({', '.join(differing)}). Name another file by --samples, or remove this one")
                self.runs[(entry["repetition"], entry["mode"], entry["ranks"])] = entry

    def missing(self, plan):
        return [key for key in plan if key not in self.runs]

    def expected_seconds(self, key):
        """Of the longest run so far with that mode and number of ranks; of any run where there is none; 0 before the first."""
        alike = [e["wall_s"] for k, e in self.runs.items() if k[1:] == key[1:]] or [e["wall_s"] for e in self.runs.values()]
        return max(alike, default=0)

    def add(self, key, entry):
        entry.update(settings=self.settings, repetition=key[0], mode=key[1], ranks=key[2])
        self.runs[key] = entry
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
