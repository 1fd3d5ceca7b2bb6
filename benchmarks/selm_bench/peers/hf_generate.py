"""transformers `generate`, greedy, left-padded batches."""

import time

from common import count_until_end, emit, load_decoder, peer_parser, read_rows, synchronize


def main():
    parser = peer_parser(__doc__, ("--prompts", "lines of token ids"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    a = parser.parse_args()
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(a.threads)
    model = load_decoder(a.model, a.dtype).eval().to(a.device)
    end = AutoTokenizer.from_pretrained(a.model).convert_tokens_to_ids("<|im_end|>")
    prompts = read_rows(a.prompts)
    batches = [prompts[i: i + a.batch] for i in range(0, len(prompts), a.batch)]

    def run(rows, limit):
        width = max(map(len, rows))
        ids = torch.tensor([[end] * (width - len(row)) + row for row in rows], device=a.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=a.device)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=end)
        return [row[: count_until_end(row, end)] for row in out[:, width:].tolist()]

    with torch.inference_mode():
        run(batches[0][:2], 2)
        synchronize(a.device)
        start = time.perf_counter()
        answers = [answer for rows in batches for answer in run(rows, a.new_tokens)]
        seconds = time.perf_counter() - start
    emit({"seconds": seconds, "new_tokens": sum(map(len, answers)), "answers": answers})


main()
