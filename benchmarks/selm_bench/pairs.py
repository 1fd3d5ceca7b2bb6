"""Log-probs and training on ranked pairs: ours against transformers, the authors' step, TRL, DeepSpeed."""

import json
import os
import shutil

from .harness import Comparison, Contestant, Failed, Work
from .roofline import Decoder, branches
from .shared import chosen, figures, ours_name, take, torch_options

BETA, STEPS, LEARNING_RATE = 0.1, 2, 1e-5  # large enough that the second step's loss is not log 2


class Pairs:
    """Ranked rows and their token ids."""

    def __init__(self, bench, rows):
        self.bench, self.rows = bench, rows

        def rank(path):
            shutil.copy(bench.with_answers(rows)[0], path)
            bench.selm("selm_rank", "--iter", path, "--ranker", f"reward:{bench.a.reward}")

        self.iter = bench.made(f"ranked-{rows}.h5", rank)
        self.ids = bench.made(f"pairs-{rows}.jsonl", lambda path: bench.python("encode", "pairs", "--model", bench.a.model, "--iter", self.iter, "--output", path))
        with open(self.ids) as file:
            self.triples = [json.loads(line) for line in file]
        self.decoder = Decoder.read(bench.a.model)

    def flops(self, backward, generated=True):
        """Of the packed pass over all rows: the prompt once, every different answer a branch."""
        count = self.decoder.forward_backward if backward else self.decoder.forward
        total = 0.0
        for row in self.triples:
            answers = [row["best"], row["worst"]] if row["candidates"][0] != row["candidates"][1] else [row["best"]]
            if generated and 0 not in row["candidates"]:
                answers.append(row["generated"])
            total += count(*branches(len(row["prompt"]), list(map(len, answers))))
        return total

    def copy(self, name):
        return shutil.copy(self.iter, self.bench.path(name))

    def common(self):
        return ["--dtype", self.bench.a.dtype, "--tokens-per-microbatch", self.bench.a.tokens_per_microbatch]

    def log_probs(self, path, ranks):
        done = self.bench.selm("selm_logp", "--iter", path, "--model", self.bench.a.model, *self.common(), ranks=ranks, memory=True)
        found = figures(self.bench, path, "logprob")
        return dict(found, wall_s=done["wall_s"], pss_bytes=done["pss_bytes"])


def logprob_works(bench):
    yield lambda: logprob_work(bench)


def logprob_work(bench):
    pairs = Pairs(bench, bench.a.rows or (8 if bench.a.quick else 32))
    ranks = bench.a.ranks

    def ours(count):
        path = pairs.copy(f"logp-{count}.h5")
        found = pairs.log_probs(path, count)
        os.remove(path)
        bench.note("sums", take(found, "sums")[0])
        seconds = found["seconds"]
        least = pairs.flops(False) / bench.roofline(count)["flops"]
        return {"seconds": seconds, "rows_per_s": pairs.rows / seconds, "idle_share": found["idle_share"], "roofline_s": least, "roofline_share": least / seconds,
                "wall_s": found["wall_s"], "pss_bytes": found["pss_bytes"]}

    def peer(repetition):
        done = bench.python("logprob", "--model", bench.a.model, "--pairs", pairs.ids, *torch_options(bench), memory=True)
        sums, ours_sums = take(done, "sums")[0], bench.noted("sums") or []
        difference = max((abs(a - b) / max(1.0, abs(a)) for x, y in zip(sums, ours_sums) for a, b in zip(x, y) if a is not None and b == b), default=None)
        return {"seconds": done["seconds"], "rows_per_s": pairs.rows / done["seconds"], "padded_tokens": done["padded_tokens"], "wall_s": done["wall_s"],
                "pss_bytes": done["pss_bytes"], "largest_relative_difference": difference}

    name, one, hf = ours_name(ranks), ours_name(1), "transformers forward"
    contestants = [Contestant(name, lambda r: ours(ranks), warm_up=True), Contestant(hf, peer, bench.a.peer_repetitions or (2 if bench.a.quick else 0))]
    if ranks > 1:
        contestants.insert(1, Contestant(one, lambda r: ours(1)))
    comparisons = [Comparison("log-prob pass", name, hf, "rows_per_s", 4, peer_text="transformers forward of the same sequences, padded"),
                   Comparison("log-prob pass", name, "", "roofline_share", peer_text="arithmetic peak x counted FLOPs"),
                   Comparison("log-prob pass", name, one, "rows_per_s", 1.9, peer_text="ours on 1 rank")]
    return Work("logprob", f"Log-probs of best, worst and generated answers of {pairs.rows} rows", "rows/s", "rows_per_s", chosen(contestants, bench), comparisons,
                ["Generated answers: the next row's chosen one. Seconds of the pass itself; models are loaded before. Sums agree as `largest_relative_difference` in the JSON file says."])


class Training:
    def __init__(self, bench, pairs):
        self.bench, self.pairs = bench, pairs

    def sample(self, seconds, **more):
        return dict({"seconds": seconds, "pairs_per_s": self.pairs.rows / seconds}, **more)

    def ours(self, ranks, alpha, *words):
        bench, pairs = self.bench, self.pairs
        path, output = pairs.copy(f"train-{ranks}.h5"), bench.path(f"trained-{ranks}")
        logp = pairs.log_probs(path, ranks)
        shutil.rmtree(output, ignore_errors=True)
        done = bench.selm("selm_train", "--iter", path, "--policy", bench.a.model, "--output", output, "--global-batch", pairs.rows // STEPS, "--shuffle", "off",
                          "--learning-rate", LEARNING_RATE, "--schedule", "constant", "--warmup-ratio", 0, "--alpha", alpha, "--beta", BETA, *pairs.common(), *words,
                          *(["--offload", "optimizer"] if bench.a.device == "cuda" else []), ranks=ranks, memory=True)
        with open(os.path.join(output, "metrics.jsonl")) as file:
            steps = [json.loads(line) for line in file]
        shutil.rmtree(output)
        os.remove(path)
        step, seconds = sum(line["step_s"] for line in steps), logp["seconds"] + sum(line["step_s"] for line in steps)
        peak = bench.roofline(ranks)
        least_step = pairs.flops(True, alpha != 0) / peak["flops"]
        least = least_step + pairs.flops(False, True) / peak["flops"]
        return self.sample(seconds, step_s=step, logp_s=logp["seconds"], loss=steps[-1]["loss"], roofline_s=least, roofline_share=least / seconds,
                           step_share=least_step / step, comm_s=steps[0]["comm_s"], peak_bytes_per_rank=steps[-1]["peak_bytes"],
                           pss_bytes=max(done["pss_bytes"], logp["pss_bytes"]), wall_s=done["wall_s"] + logp["wall_s"])

    def peer(self, script, *words):
        bench, pairs = self.bench, self.pairs
        options = ["--dtype", torch_options(bench)[1], "--ranks", bench.a.ranks] if script == "zero_step" else torch_options(bench)
        done = bench.python(script, "--model", bench.a.model, "--pairs", pairs.ids, "--micro-batch", min(2, pairs.rows // STEPS), "--steps", STEPS, "--learning-rate",
                            LEARNING_RATE, "--beta", BETA, *options, *words, memory=True)
        return self.sample(done["seconds"], loss=done["loss"], wall_s=done["wall_s"], pss_bytes=done["pss_bytes"], **{k: done[k] for k in ("train_s", "precompute_s") if k in done})


def train_works(bench):
    yield lambda: train_work(bench)


def train_work(bench):
    rows = bench.a.rows or (4 if bench.a.quick else 32)
    if rows % (2 * STEPS) != 0:
        raise Failed(f"train: --rows {rows} is not a multiple of {2 * STEPS}")
    training = Training(bench, Pairs(bench, rows))
    ranks, fewer = bench.a.ranks, bench.a.peer_repetitions
    slow = fewer or (1 if bench.a.quick else 0)
    name, one, alpha0, least = ours_name(ranks), ours_name(1), ours_name(ranks) + ", alpha 0", ours_name(ranks) + ", layers recomputed, ZeRO-3"
    authors, checkpointed, trl, precomputed, zero = "authors' step", "authors' step, gradient checkpointing", "TRL DPOTrainer", "TRL DPOTrainer, precomputed", "DeepSpeed ZeRO-1"
    contestants = [Contestant(name, lambda r: training.ours(ranks, 0.001)), Contestant(alpha0, lambda r: training.ours(ranks, 0)),
                   Contestant(authors, lambda r: training.peer("train"), slow),
                   Contestant(checkpointed, lambda r: training.peer("train", "--checkpointing"), slow),
                   Contestant(trl, lambda r: training.peer("trl_dpo"), slow), Contestant(precomputed, lambda r: training.peer("trl_dpo", "--precompute"), slow)]
    if ranks > 1:
        contestants.insert(1, Contestant(one, lambda r: training.ours(1, 0.001)))
    if ranks > 1 and bench.a.device == "cpu":
        contestants.insert(2, Contestant(least, lambda r: training.ours(ranks, 0.001, "--recompute", "layers", "--zero", 3), slow))
    if bench.a.device == "cpu" and bench.a.deepspeed:
        contestants.append(Contestant(zero, lambda r: training.peer("zero_step"), slow))
    phase = f"train step with reference log-probs, {rows} pairs"
    comparisons = [Comparison(phase, name, authors, "pairs_per_s", 6, peer_text="authors' step in PyTorch"),
                   Comparison(phase, name, checkpointed, "pairs_per_s", 6, peer_text="authors' step, gradient checkpointing"),
                   Comparison(phase + ": memory", name, authors, "pss_bytes", 0.6, True, "authors' step in PyTorch"),
                   Comparison(phase + ": memory", name, checkpointed, "pss_bytes", 0.6, True, "authors' step, gradient checkpointing"),
                   Comparison(phase + ", layers recomputed, ZeRO-3", least, checkpointed, "pairs_per_s", peer_text="authors' step, gradient checkpointing"),
                   Comparison(phase + ", layers recomputed, ZeRO-3: memory", least, checkpointed, "pss_bytes", 0.6, True, "authors' step, gradient checkpointing"),
                   Comparison(phase + ", alpha 0", alpha0, trl, "pairs_per_s", 6, peer_text="TRL DPOTrainer"),
                   Comparison(phase + ", alpha 0", alpha0, precomputed, "pairs_per_s", 6, peer_text="TRL DPOTrainer, reference log-probs precomputed (counted)"),
                   Comparison(phase, name, "", "roofline_share", 0.7, peer_text="arithmetic peak x counted FLOPs"),
                   Comparison(phase, name, one, "pairs_per_s", 1.8, peer_text="ours on 1 rank")]
    if bench.a.deepspeed:
        comparisons.append(Comparison(phase + ", alpha 0", alpha0, zero, "pairs_per_s", peer_text="DeepSpeed ZeRO-1 on CPU ranks (gloo)"))
    notes = [f"Generated answers: the next row's chosen one. {STEPS} optimizer steps of {rows // STEPS} pairs each; the reference's log-probs are part of it on all sides. Peers: micro-batches of 2 pairs, padded, accumulated. `loss` of "
             "every sample in the JSON file is the second step's, which the first one's update has moved away from log 2.", "Proportional set size: the larger of our two programs, all ranks."]
    if bench.a.quick:
        notes.append("--quick: peers once.")
    return Work("train", f"{STEPS} optimizer steps of {rows // STEPS} pairs, reference log-probs included", "pairs/s", "pairs_per_s", chosen(contestants, bench), comparisons, notes)
