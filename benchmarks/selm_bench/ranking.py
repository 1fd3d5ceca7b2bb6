"""PairRM's size against transformers driven as LLM-Blender does, and a reward model against sequence classification."""

import shutil

from .harness import Comparison, Contestant, Work
from .roofline import Deberta, Decoder, branches
from .shared import TORCH_DTYPE, chosen, figures, ours_name, take, torch_options


def largest_difference(a, b):
    """Of two nested lists of numbers."""
    if isinstance(a, list):
        return max(map(largest_difference, a, b))
    return abs(a - b)


def rank_works(bench):
    yield lambda: rank_work(bench)


def rank_work(bench):
    rows = bench.a.rows or 16  # a block of 8 rows for each of two ranks
    layers = bench.a.layers if not bench.a.quick or bench.a.layers != 24 else 1
    unranked, texts = bench.with_answers(rows)
    ranker = bench.made(f"pairrm-{layers}", lambda path: bench.python("pairrm", "make", "--model", path, "--layers", layers))
    ranks, noted = bench.a.ranks, f"pairrm-{layers}-{rows}"
    mode = "blender" if rows >= 8 * ranks else "per-row"  # a block of 8 rows is one rank's: fewer rows are handed out one by one

    def ours(count):
        path = shutil.copy(unranked, bench.path(f"ranked-by-{count}.h5"))
        done = bench.selm("selm_rank", "--iter", path, "--ranker", f"pairrm:{ranker}", "--rank-mode", mode, "--pairrm-dtype", bench.a.dtype, ranks=count, memory=True)
        found = figures(bench, path, "rank")
        logits, = take(found, "logits")
        sample = {"seconds": found["seconds"], "rows_per_s": rows / found["seconds"], "idle_share": found["idle_share"], "wall_s": done["wall_s"], "pss_bytes": done["pss_bytes"]}
        kept = bench.noted(noted)
        if kept:
            least = Deberta(layers).forward(kept["lengths"]) / bench.roofline(count)["flops"]
            sample.update(roofline_s=least, roofline_share=least / found["seconds"], largest_logit_difference=largest_difference(logits, kept["logits"]))
        return sample

    def peer(repetition):
        done = bench.python("pairrm", "rank", "--model", ranker, "--pairs", texts, "--layers", layers, "--dtype", TORCH_DTYPE[bench.a.dtype], "--threads", ranks, memory=True)
        bench.note(noted, dict(zip(("lengths", "logits"), take(done, "lengths", "logits"))))
        return {"seconds": done["seconds"], "rows_per_s": rows / done["seconds"], "padded_tokens": done["padded_tokens"],
                "wall_s": done["wall_s"], "pss_bytes": done["pss_bytes"]}

    name, one, hf = ours_name(ranks), ours_name(1), "transformers as LLM-Blender"
    # The peer first: it counts the sequences' lengths.
    contestants = [Contestant(hf, peer, bench.a.peer_repetitions or (1 if bench.a.quick else 0)), Contestant(name, lambda r: ours(ranks), warm_up=True)]
    if ranks > 1:
        contestants.append(Contestant(one, lambda r: ours(1)))
    size = "full size" if layers == 24 else f"{layers} of 24 layers"
    phase = f"rank, PairRM {size}"
    comparisons = [Comparison(phase, name, hf, "rows_per_s", 4 if bench.a.dtype == "fp32" else 2, peer_text="transformers DebertaV2 as LLM-Blender drives it"),
                   Comparison(phase, name, "", "roofline_share", peer_text="arithmetic peak x counted FLOPs"),
                   Comparison(phase, name, one, "rows_per_s", 1.9, peer_text="ours on 1 rank")]
    notes = [f"The peer: batches of {min(rows, 8)} padded rows, six passes. Ours: --rank-mode {mode}. Logits agree as `largest_logit_difference` in the JSON file says."]
    if layers != 24:
        notes.append("Fewer layers than PairRM's 24: cost is proportional to layers, but the encoding of the texts weighs more.")
    return Work("rank", f"PairRM (DeBERTa-v3-large, {size}, random weights) on {rows} rows of 3 candidates", "rows/s", "rows_per_s", chosen(contestants, bench),
                comparisons, notes)


def reward_works(bench):
    yield lambda: reward_work(bench)


def reward_work(bench):
    rows = bench.a.rows or (8 if bench.a.quick else 32)
    unranked, texts = bench.with_answers(rows)
    ranks, decoder, noted = bench.a.ranks, Decoder.read(bench.a.reward), f"reward-{rows}"

    def ours(count):
        path = shutil.copy(unranked, bench.path(f"scored-by-{count}.h5"))
        done = bench.selm("selm_rank", "--iter", path, "--ranker", f"reward:{bench.a.reward}", "--dtype", bench.a.dtype, ranks=count, memory=True)
        found = figures(bench, path, "rank")
        scores, = take(found, "scores")
        sample = {"seconds": found["seconds"], "rows_per_s": rows / found["seconds"], "idle_share": found["idle_share"], "wall_s": done["wall_s"], "pss_bytes": done["pss_bytes"]}
        kept = bench.noted(noted)
        if kept:
            least = kept["flops"] / bench.roofline(count)["flops"]
            sample.update(roofline_s=least, roofline_share=least / found["seconds"], largest_score_difference=largest_difference(scores, kept["scores"]))
        return sample

    def peer(repetition):
        done = bench.python("reward", "--model", bench.a.reward, "--texts", texts, *torch_options(bench), memory=True)
        lengths, scores, prompts = take(done, "lengths", "scores", "prompts")
        flops = sum(decoder.forward(*branches(prompt, [length - prompt + 1 for length in lengths[3 * i: 3 * i + 3]])[:2], 0) for i, prompt in enumerate(prompts))
        bench.note(noted, {"scores": scores, "flops": flops})
        return {"seconds": done["seconds"], "rows_per_s": rows / done["seconds"], "padded_tokens": done["padded_tokens"],
                "wall_s": done["wall_s"], "pss_bytes": done["pss_bytes"]}

    name, one, hf = ours_name(ranks), ours_name(1), "transformers classification"
    contestants = [Contestant(hf, peer, bench.a.peer_repetitions or (2 if bench.a.quick else 0)), Contestant(name, lambda r: ours(ranks), warm_up=True)]
    if ranks > 1:
        contestants.append(Contestant(one, lambda r: ours(1)))
    comparisons = [Comparison("reward model", name, hf, "rows_per_s", 3, peer_text="transformers sequence classification, batch 8"),
                   Comparison("reward model", name, "", "roofline_share", peer_text="arithmetic peak x counted FLOPs"),
                   Comparison("reward model", name, one, "rows_per_s", 1.9, peer_text="ours on 1 rank")]
    return Work("reward", f"Reward model (SmolLM2-135M with a head) on {rows} rows of 3 candidates", "rows/s", "rows_per_s", chosen(contestants, bench), comparisons,
                ["Padded batches of 8 sequences; scores agree as `largest_score_difference` in the JSON file says."])
