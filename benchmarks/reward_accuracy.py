#!/usr/bin/env python3
"""How often a ranker prefers the answer that the data prefer, beside two baselines: a coin and "the longer answer wins".

usage: reward_accuracy.py RANKED.h5 [RANKED.h5 ...]

RANKED  iteration files with /ranking, made for instance of rows without generated answers:
          selm_import --input data/ultrafeedback_sample.jsonl --rows 900:1000 --on-empty-answer keep --output prefs.h5
          selm_gen --data prefs.h5 --responses none --output rows.h5
          selm_rank --iter rows.h5 --ranker reward:DIR

Prints a table: a pair counts 1 when the chosen answer scores higher, 1/2 at equal scores (or equal lengths), else 0; se is
the standard error of the mean over rows. A second line leaves out rows whose answers have equal scores in the data, where
"chosen" says nothing. Needs h5py and numpy.
"""

import sys

import h5py
import numpy as np

CHOSEN, REJECTED = 1, 2


def lengths(file, answer):
    """Characters of every row's answer."""
    text = file[f"responses/{answer}/text"][:].tobytes()
    bounds = file[f"responses/{answer}/text_offsets"][:]
    return np.array([len(text[begin:end].decode()) for begin, end in zip(bounds[:-1], bounds[1:])])


def wins(chosen, rejected):
    """1, 1/2 or 0 per row."""
    return np.where(chosen == rejected, 0.5, (chosen > rejected).astype(float))


def data_margins(file):
    """Difference of the scores that came with the data; NaN where unknown."""
    scores = file["scores"][:]
    return scores[:, 0] - scores[:, 1]


def line(name, values):
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{name:28s} {100 * values.mean():5.1f} %   se {100 * error:4.1f}   equal {int((values == 0.5).sum())}"


def report(path):
    with h5py.File(path) as file:
        if "ranking" not in file:
            sys.exit(f"{path} has no /ranking (nothing was scored). Run selm_rank on it first")
        scores = file["ranking/scores"][:]
        ranker = wins(scores[:, CHOSEN], scores[:, REJECTED])
        chosen, rejected = lengths(file, "chosen"), lengths(file, "rejected")
        longer = wins(chosen, rejected)
        margins = data_margins(file)
    if np.isnan(scores[:, [CHOSEN, REJECTED]]).any():
        sys.exit(f"{path} lacks scores of chosen or rejected answers (ranked with --generated-only on?). Rank it without")
    print(f"{path}: {len(ranker)} rows, {int((margins == 0).sum())} with equal scores in the data, "
          f"{int(((chosen == 0) | (rejected == 0)).sum())} with an empty answer")
    for title, rows in (("all rows", np.ones(len(ranker), bool)), ("without equal data scores", margins != 0)):
        print(f"  {title} (n = {int(rows.sum())})")
        print("    " + line("ranker", ranker[rows]))
        print("    " + line("the longer answer wins", longer[rows]))
        print(f"    {'a coin':28s} {50:5.1f} %   se {50 / np.sqrt(rows.sum()):4.1f}")


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        report(path)


if __name__ == "__main__":
    main()
