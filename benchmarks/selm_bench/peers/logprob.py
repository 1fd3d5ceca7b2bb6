"""transformers forward of the best, worst and generated answers' sequences, padded, and their log-probs."""

import time

from common import emit, load_decoder, log_probs, padded, peer_parser, read_rows, synchronize


def main():
    parser = peer_parser(__doc__, ("--pairs", "lines {prompt, best, worst, generated} of token ids"))
    parser.add_argument("--batch", type=int, default=4, help="rows; each has two or three different answers")
    a = parser.parse_args()
    import torch

    torch.set_num_threads(a.threads)
    model = load_decoder(a.model, a.dtype).eval().to(a.device)
    rows = read_rows(a.pairs)
    sums, tokens = [], 0
    with torch.inference_mode():
        model(input_ids=torch.ones((1, 8), dtype=torch.long, device=a.device))
        synchronize(a.device)
        start = time.perf_counter()
        for begin in range(0, len(rows), a.batch):
            batch = rows[begin: begin + a.batch]
            distinct = [{"prompt": row["prompt"], "answer": answer} for row in batch for answer in distinct_answers(row)]
            packed = padded(distinct, ("answer",), 0)
            tokens += packed[0].numel()
            sums += log_probs(model, packed, a.device).tolist()
        synchronize(a.device)
        seconds = time.perf_counter() - start
    given = iter(sums)
    by_candidate = []
    for row in rows:
        found = {candidate: next(given) for candidate, _ in named_answers(row)}
        by_candidate.append([found.get(candidate) for candidate in range(3)])
    emit({"seconds": seconds, "rows": len(rows), "padded_tokens": tokens, "sums": by_candidate})


def named_answers(row):
    """(candidate, ids), each candidate once."""
    named = dict(zip(row["candidates"], (row["best"], row["worst"])))
    named.setdefault(0, row["generated"])
    return sorted(named.items())


def distinct_answers(row):
    return [ids for _, ids in named_answers(row)]


main()
