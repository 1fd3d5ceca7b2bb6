"""transformers sequence classification of every candidate's sequence, padded batches of 8."""

import time

from common import emit, peer_parser, read_rows, synchronize


def main():
    parser = peer_parser(__doc__, ("--texts", "lines {messages, answers}"))
    parser.add_argument("--batch", type=int, default=8)
    a = parser.parse_args()
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(a.threads)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForSequenceClassification.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).eval().to(a.device)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad = model.config.pad_token_id if model.config.pad_token_id is not None else end
    sequences, prompts, scores, tokens = [], [], [], 0
    for row in read_rows(a.texts):
        prompt = tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True), add_special_tokens=False)["input_ids"][-512:]
        prompts.append(len(prompt))
        sequences += [prompt + (tokenizer(answer, add_special_tokens=False)["input_ids"] + [end])[: 1024 - len(prompt)] for answer in row["answers"]]
    with torch.inference_mode():
        model(input_ids=torch.ones((1, 8), dtype=torch.long, device=a.device))
        synchronize(a.device)
        start = time.perf_counter()
        for begin in range(0, len(sequences), a.batch):
            batch = sequences[begin: begin + a.batch]
            width = max(map(len, batch))
            # Padded on the left: the last position is every sequence's end, also where the padding token is the end token.
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=a.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=a.device)
            states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]
            scores += model.score(states)[:, 0].float().tolist()
            tokens += ids.numel()
        synchronize(a.device)
        seconds = time.perf_counter() - start
    emit({"seconds": seconds, "sequences": len(sequences), "lengths": list(map(len, sequences)), "prompts": prompts, "padded_tokens": tokens,
          "scores": [scores[i: i + 3] for i in range(0, len(scores), 3)]})


main()
