"""Figures of an iteration file of ours: seconds of a phase on its slowest rank, answers, scores, log-probs. Usage: figures.py FILE PHASE (the
beginning of its name under /timing)"""

import sys

import h5py

from common import emit


def main():
    with h5py.File(sys.argv[1], "r") as file:
        timing = file["timing"][next(name for name in file["timing"] if name.startswith(sys.argv[2]))]
        seconds = timing["busy_s"][:] + timing["idle_s"][:]
        result = {"seconds": float(seconds.max()), "idle_share": float(timing["idle_s"][:].sum() / seconds.sum())}
        if "responses/generated/tokens" in file:
            bounds, tokens = file["responses/generated/token_offsets"][:], file["responses/generated/tokens"][:]
            result["answers"] = [tokens[begin:end].tolist() for begin, end in zip(bounds, bounds[1:])]
        if "ranking/rankers/pairrm/logits" in file:
            result["logits"] = file["ranking/rankers/pairrm/logits"][:].reshape(-1, 3, 3).tolist()
        if "ranking/scores" in file:
            result["scores"] = file["ranking/scores"][:].tolist()
        if "logprobs/reference/sum" in file:
            result["sums"] = file["logprobs/reference/sum"][:].tolist()
        emit(result)


main()
