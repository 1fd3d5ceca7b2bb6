"""Greedy answers: ours against transformers `generate` and llama.cpp on the same prompts."""

import os

from .harness import Comparison, Contestant, Work, number
from .roofline import Decoder
from .shared import chosen, element_bytes, figures, ours_name, remove, take, torch_options

TARGETS = {"16x64": (18, 2.5), "32x128": (10, 3.5)}


class Point:
    """So many prompts, so many new tokens."""

    def __init__(self, bench, rows, tokens):
        self.bench, self.rows, self.tokens = bench, rows, tokens
        self.prefs = bench.imported(rows, f"prefs-{rows}.h5")
        self.prompts = bench.made(f"prompts-{rows}.jsonl",
                                  lambda path: bench.python("encode", "prompts", "--model", bench.a.model, "--data", bench.data, "--rows", rows, "--output", path,
                                                           "--max-prompt-length", 1 << 20))  # selm_gen cuts no prompt
        with open(self.prompts) as file:
            self.lengths = [line.count(",") + 1 for line in file]
        self.reference_answers = None
        self.decoder = Decoder.read(bench.a.model)

    def sample(self, seconds, answers, **more):
        tokens = sum(map(len, answers))
        return dict({"seconds": seconds, "new_tokens": tokens, "tokens_per_s": tokens / seconds}, **more)

    def ours(self, ranks, repetition):
        bench, output = self.bench, self.bench.path(f"gen-{ranks}.h5")
        remove(output)
        done = bench.selm("selm_gen", "--data", self.prefs, "--policy", bench.a.model, "--output", output, "--max-new-tokens", self.tokens,
                          "--dtype", bench.a.dtype, ranks=ranks, memory=True)
        found = figures(bench, output, "generation")
        answers, = take(found, "answers")
        self.reference_answers = answers
        peak = bench.roofline(ranks)
        least = self.decoder.decode_seconds(self.lengths, list(map(len, answers)), ranks, element_bytes(bench), peak)
        return self.sample(found["seconds"], answers, idle_share=found["idle_share"], roofline_s=least, roofline_share=least / found["seconds"],
                           wall_s=done["wall_s"], pss_bytes=done["pss_bytes"], printed_s=number(r"([\d.]+) s,", done["out"]))

    def compared(self, done):
        """A peer's sample, with the share of our answers that it gives token by token."""
        answers, = take(done, "answers")
        sample = self.sample(done["seconds"], answers, wall_s=done["wall_s"], pss_bytes=done.get("pss_bytes", 0))
        if self.reference_answers:
            sample["equal_answers"] = sum(a == b for a, b in zip(answers, self.reference_answers)) / len(answers)
        return sample

    def transformers(self, repetition):
        return self.compared(self.bench.python("hf_generate", "--model", self.bench.a.model, "--prompts", self.prompts, "--new-tokens", self.tokens,
                                               *torch_options(self.bench), memory=True))

    def llama(self, repetition):
        bench = self.bench
        path = bench.made("model.gguf", lambda path: bench.python("make_gguf", bench.a.model, path, bench.a.dtype))
        return self.compared(bench.python("llama_generate", "--gguf", path, "--prompts", self.prompts, "--new-tokens", self.tokens, "--threads", bench.a.ranks,
                                          "--end", end_token(bench.a.model), *(["--gpu-layers", 999] if bench.a.device == "cuda" else []), memory=True))


def end_token(model):
    import json

    with open(os.path.join(model, "config.json")) as file:
        end = json.load(file)["eos_token_id"]
    return end[0] if isinstance(end, list) else end


def works(bench):
    for point in (bench.a.points or "16x64,32x128").split(","):
        rows, tokens = map(int, point.split("x"))
        yield lambda rows=rows, tokens=tokens: make(bench, rows, tokens)


def make(bench, rows, tokens):
    point, name = Point(bench, rows, tokens), f"{rows}x{tokens}"
    ranks = bench.a.ranks
    ours, one, hf, llama = ours_name(ranks), ours_name(1), "transformers generate", "llama.cpp"
    fewer = bench.a.peer_repetitions
    slow = fewer or (1 if bench.a.quick else 0)
    contestants = [Contestant(ours, lambda r: point.ours(ranks, r), warm_up=True), Contestant(llama, point.llama, fewer or (2 if bench.a.quick else 0)), Contestant(hf, point.transformers, slow)]
    if ranks > 1:
        contestants.insert(1, Contestant(one, lambda r: point.ours(1, r)))
    notes = ["transformers: left-padded batches of 16; llama.cpp: all sequences decoded together, a stream of keys and values each, flash attention as it chooses. "
             "Times of reading prompts and writing answers alone; models are loaded before."]
    if bench.a.quick and name == "32x128":
        contestants = [c for c in contestants if c.name not in (hf, one)]
        notes.append("--quick: transformers and one rank are left out at this point.")
    phase = f"generate {rows} x {tokens}"
    hf_target, llama_target = TARGETS.get(name, (None, None))
    comparisons = [Comparison(phase, ours, hf, "tokens_per_s", hf_target, peer_text="transformers `generate`, batch 16"),
                   Comparison(phase, ours, llama, "tokens_per_s", llama_target, peer_text="llama.cpp, same weights, parallel sequences"),
                   Comparison(phase, ours, "", "roofline_share", 0.6 if hf_target else None, peer_text="roofline of decode and prefill"),
                   Comparison(phase, ours, one, "tokens_per_s", 1.9 if hf_target else None, peer_text="ours on 1 rank")]
    return Work(f"generate-{name}", f"Greedy answers: {rows} prompts x {tokens} new tokens", "new tokens/s", "tokens_per_s", chosen(contestants, bench),
                comparisons, notes)
