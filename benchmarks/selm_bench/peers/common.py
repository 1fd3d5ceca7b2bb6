"""What the peers share. Each runs in its own process, in the environment of benchmarks/setup, and prints one JSON line last."""

import argparse
import json
import resource


def peer_parser(description, data):
    """Options that peers with a model have in common; @p data: the one that names the input, with its help."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument(data[0], required=True, help=data[1])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def emit(result):
    result["python_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result), flush=True)


def read_rows(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def count_until_end(ids, end):
    return ids.index(end) + 1 if end in ids else len(ids)


def load_decoder(directory, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))


def padded(rows, keys, pad):
    """ids, mask and labels of prompt + response, right-padded to the longest (labels -100 over the prompt)."""
    import torch

    sequences = [(row["prompt"], row[key]) for key in keys for row in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.full((len(sequences), width), pad)
    labels = torch.full((len(sequences), width), -100)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for i, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt): end] = torch.tensor(answer)
        mask[i, :end] = 1
    return ids, mask, labels


def log_probs(model, batch, device="cpu"):
    """Sums of the answers' log-probs, as the authors' trainer takes them: log_softmax of all logits, then gather."""
    import torch

    ids, mask, labels = (tensor.to(device) for tensor in batch)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:].clone()
    scored = targets != -100
    targets[~scored] = 0
    per_token = torch.gather(logits.log_softmax(-1), 2, targets.unsqueeze(2)).squeeze(2)
    return (per_token * scored).sum(-1).float()


def synchronize(device):
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
