"""The weights of a short training by SmolLM2-135M at every ZeRO stage, on 1 to 4 ranks, beside those of stage 0 on one rank.

    python tests/oracle/stages.py [--model build/models/smollm2] [--ranks 1,2,3,4] [--stages 0,1,2,3] [--work DIR]

Not a test of the suite: it takes minutes and 15 GiB. The 24 shortest rows of the bundled sample are answered, scored by the bundled reward head
and paired; then one epoch in steps of four rows, in fp32, saved as fp32. Compared per tensor: the norm of (update - update of
stage 0 on one rank), relative to the norm of that update. It ends
with 1 where a tensor is beyond 1e-3. With --work a run that was interrupted goes on.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SELM_BIN_DIR", ROOT / "build" / "release" / "bin"))
TOLERANCE, ROWS, BATCH = 1e-3, 24, 4
LENGTHS = ["--max-length", "256", "--max-prompt-length", "128", "--dtype", "fp32", "--progress", "off"]


def selm(ranks, program, *arguments, allowed=(0,)):
    command = [os.environ.get("SELM_MPIEXEC", "mpirun"), "--oversubscribe", "--bind-to", "none", "-np", ranks, BIN / program, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode not in allowed:
        sys.exit(f"{program} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def prepare(work, model):
    if not (work / "reward").exists():
        subprocess.run([sys.executable, ROOT / "scripts" / "make_reward.py", model, ROOT / "data" / "reward_head" / "smollm2_135m.safetensors",
                        work / "reward"], check=True)
    data, rows = work / "prefs.h5", work / "iter.h5"
    if (work / "prepared").exists():
        return rows
    sample = [json.loads(line) for line in (ROOT / "data" / "ultrafeedback_sample.jsonl").read_text(encoding="utf-8").splitlines()]
    sample = [row for row in sample if min(len(row[side][-1]["content"]) for side in ("chosen", "rejected")) > 20]
    sample.sort(key=lambda row: len(row["prompt"]) + sum(len(row[side][-1]["content"]) for side in ("chosen", "rejected")))
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample[:ROWS]), encoding="utf-8")
    selm(1, "selm_import", "--input", work / "rows.jsonl", "--output", data)
    selm(2, "selm_gen", "--data", data, "--policy", model, "--output", rows, "--max-new-tokens", 48, *LENGTHS)
    selm(2, "selm_rank", "--iter", rows, "--ranker", f"reward:{work / 'reward'}", *LENGTHS)
    selm(2, "selm_logp", "--iter", rows, "--model", model, "--name", "ref256", *LENGTHS)
    (work / "prepared").touch()
    return rows


def train(rows, model, output, stage, ranks):
    if not (output / "model.safetensors").exists():
        selm(ranks, "selm_train", "--iter", rows, "--policy", model, "--reference", "ref256", "--output", output, "--zero", stage, "--learning-rate",
             "1e-4", "--global-batch", BATCH, "--save-dtype", "fp32", *LENGTHS)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def tensors(directory):
    """Name and values (float64) of every tensor, one after the other."""
    data = np.memmap(directory / "model.safetensors", dtype=np.uint8, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    for name, entry in sorted(json.loads(data[8:8 + size].tobytes()).items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = data[8 + size + begin:8 + size + end]
            if entry["dtype"] == "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] == "F32":
                values = raw.view(np.float32)
            else:
                sys.exit(f"{directory}: {name} is {entry['dtype']}, BF16 or F32 was expected")
            yield name, values.astype(np.float64)


def differences(start, one, other):
    found = {}
    for (name, before), (name_1, values_1), (name_2, values_2) in zip(tensors(start), tensors(one), tensors(other), strict=True):
        if not name == name_1 == name_2:
            sys.exit(f"the tensors of {start}, {one} and {other} have other names: {name}, {name_1}, {name_2}")
        update = np.linalg.norm(values_1 - before)
        if update == 0:
            sys.exit(f"{name} was not trained")
        found[name] = np.linalg.norm(values_2 - values_1) / update
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "models" / "smollm2")
    parser.add_argument("--ranks", default="1,2,3,4")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--work", type=Path, help="stays, and is gone on with (default: a temporary directory)")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="selm-stages-"))
    work.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    try:
        rows = prepare(work, arguments.model)
        whole = work / "whole"
        lines = train(rows, arguments.model, whole, 0, 1)
        print(f"{len(lines)} steps, losses {', '.join(str(round(line['loss'], 6)) for line in lines)}\n")
        print("| ranks | stage | worst tensor | median tensor | of tensor | losses differ by |\n|---|---|---|---|---|---|", flush=True)
        for ranks in map(int, arguments.ranks.split(",")):
            for stage in map(int, arguments.stages.split(",")):
                output = work / "other"
                shutil.rmtree(output, ignore_errors=True)
                other = train(rows, arguments.model, output, stage, ranks)
                found = differences(arguments.model, whole, output)
                name = max(found, key=found.get)
                loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(lines, other, strict=True))
                print(f"| {ranks} | {stage} | {found[name]:.1e} | {np.median(list(found.values())):.1e} | {name} | {loss:.1e} |", flush=True)
                worst = max(worst, found[name])
                shutil.rmtree(output)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
