"""A rehearsal of a paper recipe at real shape: a random model of Mistral's or Llama-3's layout (hidden 4096, ffn 14336, 32/8 heads,
real vocabulary and tokenizer) cut to a few layers runs one iteration of its recipe on real rows, compared with PyTorch.

    python tests/oracle/rehearsal.py mistral --layers 2 --ranks 2 [--training auto|on|off] [--work DIR]

Not a test of the suite: it takes minutes and up to 20 GiB. selm_iter --dry-run says what each phase needs; with --training auto the
training is left out where the memory that is free now does not hold it, and the script says so. Compared: the log-prob sums of
selm_logp, and of every optimizer step the loss and the mean log-probs that selm_train reports.
"""
import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
import transformers

import real_tokenizers
import reference_training as reference
from reference_recipe import RecipeEncoding

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SELM_BIN_DIR", ROOT / "build" / "release" / "bin"))
SAMPLE = ROOT / "data" / "ultrafeedback_sample.jsonl"
FAMILIES = {"mistral": ("zephyr_7b", "mistral_7b", real_tokenizers.make_mistral),
            "llama3": ("llama3_8b", "llama3_8b", real_tokenizers.make_llama3)}
GIB = 2**30
RESERVE = 2 * GIB  # stays free for others
MAX_LENGTH, MAX_PROMPT_LENGTH = 192, 96
ROWS, BATCH, RATE = 6, 2, 1e-5


def make_model(directory, shape, layers, make_tokenizer):
    torch.manual_seed(5)
    config = transformers.AutoConfig.from_pretrained(ROOT / "configs" / "shapes" / shape)
    config.num_hidden_layers = layers
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    make_tokenizer(directory)
    return sum(p.numel() for p in model.parameters())


def short_rows():
    """Rows of the sample whose texts are short: the recipe's encoding, at a length that two cores finish."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    rows = [r for r in rows if len(r["chosen"]) == 2 and r["chosen"][1]["content"].strip() and r["rejected"][1]["content"].strip()]
    rows.sort(key=lambda r: len(r["prompt"]) + len(r["chosen"][1]["content"]) + len(r["rejected"][1]["content"]))
    return rows[20:20 + ROWS]  # not the very shortest


def memory_available():
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


class Rehearsal:
    def __init__(self, work, family, ranks, engine):
        self.recipe, self.shape, self.make_tokenizer = FAMILIES[family]
        self.work, self.ranks, self.engine = work, ranks, engine
        self.model = work / "model"

    def options(self, program):
        common = ["--config", ROOT / "configs" / f"{self.recipe}.cfg", "--dtype", "fp32", "--engine", self.engine, "--progress", "off"]
        return common + (["--max-length", MAX_LENGTH, "--max-prompt-length", MAX_PROMPT_LENGTH] if program != "selm_import" else [])

    def run(self, program, *arguments, ranks=None):
        ranks = ranks or self.ranks
        command = [os.environ.get("SELM_MPIEXEC", "mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks),
                   str(BIN / program), *map(str, self.options(program)), *map(str, arguments)]
        environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
                       "OMPI_MCA_mpi_yield_when_idle": "1"}
        start = time.time()
        with (self.work / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            while process.poll() is None:
                time.sleep(0.2)
                if memory_available() < RESERVE / 2:  # another program has grown: this one gives way
                    os.killpg(process.pid, signal.SIGKILL)
                    sys.exit(f"{program} was ended: less than {RESERVE / 2 / GIB:.1f} GiB were left on the machine")
            log.seek(0)
            output = log.read()
        if process.returncode != 0:
            sys.exit(f"{program} ended with {process.returncode}\n{output}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(f"{program}: {time.time() - start:.1f} s on {ranks} rank(s); largest process so far {peak / GIB:.2f} GiB", flush=True)

    def memory(self):
        """Bytes per phase on this one node, by the dry run."""
        text = subprocess.run([str(BIN / "selm_iter"), *map(str, self.options("selm_iter")), "--policy", str(self.model), "--train",
                               str(self.work / "rows.jsonl"), "--train-rows", f"0:{ROWS}", "--test", "", "--iterations", "1",
                               "--first-iteration", "selm", "--ranker", f"file:{self.work / 'scores.jsonl'}", "--rank-mode", "per-row",
                               "--max-new-tokens", "8", "--slots", "2", "--dry-run", "--format", "json", "--ranks", str(self.ranks)],
                              capture_output=True, text=True, check=True).stdout
        return {phase["phase"]: phase["node_bytes"] for phase in json.loads(text)["memory"]}

    def prepare(self, layers):
        parameters = make_model(self.model, self.shape, layers, self.make_tokenizer)
        print(f"{self.shape} cut to {layers} layer(s): {parameters:,} parameters", flush=True)
        self.source = short_rows()
        (self.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.source), encoding="utf-8")
        orders = [[3, 2, 1], [2, 3, 1], [1, 3, 2]]  # the generated answer is best, middle, worst in turn
        (self.work / "scores.jsonl").write_text(
            "".join(json.dumps({"row": i, "scores": orders[i % 3]}) + "\n" for i in range(ROWS)), encoding="utf-8")

    def phases_before_training(self):
        work = self.work
        self.run("selm_import", "--input", work / "rows.jsonl", "--output", work / "prefs.h5", ranks=1)
        self.run("selm_gen", "--data", work / "prefs.h5", "--policy", self.model, "--output", work / "iter.h5", "--max-new-tokens", 8,
                 "--slots", 2)
        self.run("selm_rank", "--iter", work / "iter.h5", "--ranker", f"file:{work / 'scores.jsonl'}", "--rank-mode", "per-row")
        self.run("selm_logp", "--iter", work / "iter.h5", "--model", self.model)

    def rows(self):
        """The rows as selm_gen and selm_rank left them, for the reference."""
        rows = []
        with h5py.File(self.work / "iter.h5") as file:
            text, offsets = file["responses/generated/text"][:].tobytes(), file["responses/generated/text_offsets"][:]
            best, worst = file["pairs/best"][:], file["pairs/worst"][:]
            sums = file["logprobs/reference/sum"][:]
        for i, source in enumerate(self.source):
            answers = [text[offsets[i]:offsets[i + 1]].decode("utf-8"), source["chosen"][1]["content"], source["rejected"][1]["content"]]
            rows.append({"messages": source["chosen"][:1], "best": answers[best[i]], "worst": answers[worst[i]], "generated": answers[0]})
        index = np.arange(len(rows))
        return rows, [sums[index, best], sums[index, worst], sums[:, 0]]

    def train(self):
        self.run("selm_train", "--iter", self.work / "iter.h5", "--policy", self.model, "--output", self.work / "policy", "--global-batch", BATCH,
                 "--learning-rate", RATE, "--shuffle", "off", "--tokens-per-microbatch", 512, "--checkpoint-every", 0)
        return [json.loads(line) for line in (self.work / "policy" / "metrics.jsonl").read_text().splitlines()]

    def encoding(self):
        # The rendering of the authors' Llama-3 has BOS in the template; the trainer adds its own before it.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(self.model)
        return RecipeEncoding(tokenizer, MAX_LENGTH, MAX_PROMPT_LENGTH)


def check(what, found, expected, tolerance):
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    error = float(np.max(np.abs(found - expected) / np.abs(expected)))
    print(f"{what}: largest relative difference {error:.2e} (allowed {tolerance:.0e})", flush=True)
    if not error <= tolerance:
        sys.exit(f"{what} differ: {found} instead of {expected}")


def reference_steps(model, encoding, rows, alpha, beta):
    """Losses and mean log-probs of best, worst, generated at each step of an AdamW training with the recipe's schedule."""
    batches = [rows[i:i + BATCH] for i in range(0, len(rows), BATCH)]
    warmup = -(-len(batches) // 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
    with torch.no_grad():
        start = [reference.row_log_probs(model, encoding, batch) for batch in batches]
    steps = []
    for batch, of_batch in zip(batches, start):
        optimizer.zero_grad(set_to_none=True)
        policy = reference.row_log_probs(model, encoding, batch)
        loss, _ = reference.selm_loss(policy, of_batch, alpha, beta)
        loss.mean().backward()
        steps.append([loss.mean().item(), *(value.mean().item() for value in policy)])
        if len(steps) < len(batches):
            optimizer.step()
            scheduler.step()
    return np.array(steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--training", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    work = arguments.work or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        rehearsal = Rehearsal(work, arguments.family, arguments.ranks, arguments.engine)
        rehearsal.prepare(arguments.layers)
        needed = rehearsal.memory()
        free = memory_available() - RESERVE
        print("by the dry run: " + ", ".join(f"{phase} {size / GIB:.2f} GiB" for phase, size in needed.items())
              + f" on {arguments.ranks} rank(s); {free / GIB:.2f} GiB may be used", flush=True)
        if max(needed["generate"], needed["logprob"]) > free:
            sys.exit("the memory that is free does not hold the model")
        rehearsal.phases_before_training()
        rows, sums = rehearsal.rows()
        fits = needed["train"] <= free
        train = arguments.training == "on" or (arguments.training == "auto" and fits)
        if arguments.training == "on" and not fits:
            sys.exit("the memory that is free does not hold the training")
        metrics = rehearsal.train() if train else None
        if not train:
            print("training left out: " + ("asked for" if fits else "the memory that is free does not hold it"))
        model = reference.load(rehearsal.model, torch.float32)
        encoding = rehearsal.encoding()
        with torch.no_grad():
            expected = reference.row_log_probs(model, encoding, rows)
        for name, found, wanted in zip(("best", "worst", "generated"), sums, expected):
            check(f"log-probs of {name} answers", found, wanted.numpy(), 2e-5)
        alpha = {"mistral": 0.001, "llama3": 0.0001}[arguments.family]
        first, _ = reference.selm_loss(expected, [torch.tensor(of_answer) for of_answer in sums], alpha, 0.01)
        check("loss of PyTorch's policy against selm_logp's reference", first.mean().item(), np.log(2), 1e-6)
        if metrics:
            steps = reference_steps(model, encoding, rows, alpha, 0.01)
            keys = ("loss", "logps/chosen", "logps/rejected", "logps/generated")
            ours = np.array([[line[key] for key in keys] for line in metrics])
            for i, (step, wanted) in enumerate(zip(ours, steps), 1):
                print(f"step {i}: loss {step[0]:.9f}, reference {wanted[0]:.9f}")
            for column, key in enumerate(keys):
                check(f"{key} of {len(steps)} steps", ours[:, column], steps[:, column], 1e-5 if key == "loss" else 2e-5)
        print("rehearsal passed")
    finally:
        if not arguments.work:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
