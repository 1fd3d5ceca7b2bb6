"""The peers: the same work in PyTorch and transformers, as users of those libraries write it.

Run by benchmarks/run in the reference environment, one process per measurement; prints one JSON line.
"""

import argparse
import json
import resource
import time


def load_model(directory, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))


def generate(arguments):
    """transformers `generate`, greedy, one left-padded batch of all prompts."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = load_model(arguments.model, arguments.dtype).eval()
    rows = read_rows(arguments.data)[: arguments.rows]
    prompts = [tokenizer.apply_chat_template(row["chosen"][:-1], tokenize=False, add_generation_prompt=True) for row in rows]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    run = lambda limit: model.generate(**batch, max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=end)
    with torch.inference_mode():
        run(2)
        start = time.perf_counter()
        out = run(arguments.new_tokens)
        seconds = time.perf_counter() - start
    new = out[:, batch["input_ids"].shape[1]:]
    tokens = sum(count_until_end(row.tolist(), end) for row in new)
    return {"seconds": seconds, "new_tokens": tokens, "tokens_per_s": tokens / seconds}


def count_until_end(ids, end):
    return ids.index(end) + 1 if end in ids else len(ids)


def read_rows(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def train(arguments):
    """The authors' step: policy and reference model, two padded forwards each (chosen+rejected, reference response), DPO plus
    the optimism term, accumulation over micro-batches, AdamW on fp32 master weights. The middle answer is taken as the third
    response, which is never equal to the other two here: `third` rows hold texts made by selm_gen."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    policy = load_model(arguments.model, arguments.dtype).train()
    reference = load_model(arguments.model, arguments.dtype).eval()
    master = [parameter.detach().float().clone() for parameter in policy.parameters()]
    optimizer = torch.optim.AdamW(master, lr=5e-7, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    triples = [json.loads(line) for line in open(arguments.pairs)]
    start = time.perf_counter()
    accumulation = len(triples) // arguments.micro_batch
    loss_value = 0.0
    for begin in range(0, len(triples), arguments.micro_batch):
        rows = triples[begin: begin + arguments.micro_batch]
        loss = selm_loss(policy, reference, rows, tokenizer.pad_token_id or 0, arguments)
        (loss / accumulation).backward()
        loss_value += loss.item() / accumulation
    for target, parameter in zip(master, policy.parameters()):
        target.grad = parameter.grad.float()
    optimizer.step()
    with torch.no_grad():
        for source, parameter in zip(master, policy.parameters()):
            parameter.copy_(source)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "pairs": len(triples), "pairs_per_s": len(triples) / seconds, "loss": loss_value}


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


def log_probs(model, batch):
    import torch

    ids, mask, labels = batch
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:].clone()
    scored = targets != -100
    targets[~scored] = 0
    per_token = torch.gather(logits.log_softmax(-1), 2, targets.unsqueeze(2)).squeeze(2)
    return (per_token * scored).sum(-1).float()


def selm_loss(policy, reference, rows, pad, arguments):
    import torch

    pairs, responses = padded(rows, ("best", "worst"), pad), padded(rows, ("generated",), pad)
    half = len(rows)
    policy_pairs, policy_responses = log_probs(policy, pairs), log_probs(policy, responses)
    with torch.no_grad():
        reference_pairs, reference_responses = log_probs(reference, pairs), log_probs(reference, responses)
    z = (policy_pairs[:half] - policy_pairs[half:]) - (reference_pairs[:half] - reference_pairs[half:])
    optimism = arguments.alpha * arguments.beta * (policy_responses - reference_responses)
    return (-torch.nn.functional.logsigmoid(arguments.beta * z) + optimism).mean()


def encode(arguments):
    """Token ids of the pairs of a ranked iteration file, for `train`: prompt, best, worst and generated answer of each row."""
    import h5py
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    file = h5py.File(arguments.iter, "r")
    text = lambda group, i: bytes(file[f"{group}/text"][file[f"{group}/text_offsets"][i]: file[f"{group}/text_offsets"][i + 1]]).decode()
    names = ["generated", "chosen", "rejected"]
    with open(arguments.pairs, "w") as out:
        for i in range(len(file["pairs/best"])):
            rows = file["prompts/messages/row_offsets"]
            messages = [{"role": ["system", "user", "assistant"][file["prompts/messages/role"][j]], "content": text("prompts/messages", j)}
                        for j in range(rows[i], rows[i + 1])]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"][-arguments.max_prompt_length:]
            answer = lambda c: (tokenizer(text(f"responses/{names[c]}", i), add_special_tokens=False)["input_ids"] +
                                [tokenizer.convert_tokens_to_ids("<|im_end|>")])[: arguments.max_length - len(ids)]
            out.write(json.dumps({"prompt": ids, "best": answer(file["pairs/best"][i]), "worst": answer(file["pairs/worst"][i]),
                                  "generated": answer(0)}) + "\n")
    return {"rows": len(file["pairs/best"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["generate", "train", "encode"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data")
    parser.add_argument("--iter")
    parser.add_argument("--pairs")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-prompt-length", type=int, default=512)
    arguments = parser.parse_args()
    result = {"generate": generate, "train": train, "encode": encode}[arguments.work](arguments)
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
