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


def checkpoints():
    """The tests' maker of pair rankers: tokenizer and configuration in llm-blender/PairRM's layout."""
    import os
    import sys

    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "oracle"))
    import pairrm_checkpoint
    return pairrm_checkpoint


def deberta_config(vocabulary, layers):
    """DeBERTa-v3-large."""
    from transformers import DebertaV2Config

    return DebertaV2Config(
        vocab_size=vocabulary, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096, hidden_act="gelu",
        layer_norm_eps=1e-7, max_position_embeddings=512, max_relative_positions=-1, position_buckets=256, relative_attention=True,
        share_att_key=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0, pad_token_id=0)


def make_pairrm(arguments):
    """PairRM's size with random weights and a SentencePiece tokenizer of the sample; the rows to rank, where the third
    candidate is the next row's chosen answer (a text of real length)."""
    import pathlib
    import torch
    from transformers import DebertaV2Model

    made = checkpoints()
    directory = pathlib.Path(arguments.model)
    directory.mkdir()
    made.train_sentencepiece(directory / "trained.model", 8000, rows=300)
    tokenizer = made.make_tokenizer(directory, model=directory / "trained.model", normalized=False)
    made.make_config(directory, "original", tokenizer, 1224, 412)
    torch.manual_seed(3)
    encoder = DebertaV2Model(deberta_config(made.len_of(tokenizer), arguments.layers))
    tensors = {"pretrained_model." + name: value.contiguous() for name, value in encoder.state_dict().items()}
    for number, shape in ((1, (1024, 2048)), (4, (1, 1024))):
        tensors[f"head_layer.{number}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        tensors[f"head_layer.{number}.bias"] = torch.zeros(shape[0])
    made.save_weights(directory, tensors)
    rows = read_rows(arguments.data)[: arguments.rows + 1]
    with open(arguments.pairs, "w") as out:
        for row, following in zip(rows[: arguments.rows], rows[1:]):
            out.write(json.dumps({"prompt_id": row["prompt_id"], "response": following["chosen"][-1]["content"], "prompt": row["prompt"],
                                  "answers": [following["chosen"][-1]["content"], row["chosen"][-1]["content"], row["rejected"][-1]["content"]]}) + "\n")
    return {"rows": arguments.rows}


def blender_parts(tokenizer, batch):
    """LLM-Blender's collator: token ids of source and candidates of a batch's rows."""
    encode = lambda text, length: tokenizer.encode(text.replace("[SEP]", " "), max_length=length, truncation=True)
    sources = [encode("<|source|>" + row["prompt"], 1224) for row in batch]
    length = 412 + (1224 - max(map(len, sources))) // 2
    return sources, [[encode("<|candidate|>" + answer, length) for answer in row["answers"]] for row in batch]


def rank(arguments):
    """Blender.rank: batches of 8 rows; for each of the 6 ordered pairs of candidates one forward pass of 8 padded sequences."""
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(arguments.threads)
    tensors = load_file(f"{arguments.model}/model.safetensors")
    prefix = "pretrained_model."
    encoder = transformers.DebertaV2Model(deberta_config(tensors[prefix + "embeddings.word_embeddings.weight"].shape[0], arguments.layers))
    encoder.load_state_dict({name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)})
    dtype = getattr(torch, arguments.dtype)
    encoder = encoder.to(dtype).eval()
    first, last = (torch.nn.Linear(*tensors[f"head_layer.{n}.weight"].shape[::-1]).to(dtype) for n in (1, 4))
    for layer, n in ((first, 1), (last, 4)):
        layer.load_state_dict({name: tensors[f"head_layer.{n}.{name}"] for name in ("weight", "bias")})
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{arguments.model}/tokenizer.json", cls_token="[CLS]", sep_token="[SEP]",
                                                     pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")
    source, left, right, candidate = tokenizer.convert_tokens_to_ids(["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"])
    replaced = lambda ids, token: [token if i == candidate else i for i in ids]
    rows = read_rows(arguments.pairs)
    logits, tokens, padded = [[[0.0] * 3 for _ in range(3)] for _ in rows], 0, 0
    with torch.inference_mode():
        encoder(input_ids=torch.ones((1, 8), dtype=torch.long))
        start, cpu_start = time.perf_counter(), time.process_time()
        for begin in range(0, len(rows), 8):
            sources, parts = blender_parts(tokenizer, rows[begin: begin + 8])
            for i, j in ((i, j) for i in range(3) for j in range(3) if i != j):
                batch = [s + replaced(p[i], left) + replaced(p[j], right) for s, p in zip(sources, parts)]
                width = max(map(len, batch))
                ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
                states = encoder(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
                at = [states[torch.arange(len(batch)), (ids == token).int().argmax(1)] for token in (source, left, right)]
                head = lambda c: last(torch.tanh(first(torch.cat([at[0], c], 1))))
                for row, value in enumerate((head(at[1]) - head(at[2]))[:, 0].float().tolist()):
                    logits[begin + row][i][j] = value
                tokens, padded = tokens + sum(map(len, batch)), padded + ids.numel()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu, "rows": len(rows), "rows_per_s": len(rows) / seconds, "tokens": tokens, "padded_tokens": padded,
            "logits": logits}


def rank_result(arguments):
    """Seconds of the ranking itself (the slowest rank, loading the model left out) and logits of a ranked iteration file."""
    import h5py

    with h5py.File(arguments.iter, "r") as file:
        timing = file["timing/rank"]
        return {"seconds": float((timing["busy_s"][:] + timing["idle_s"][:]).max()), "logits": file["ranking/rankers/pairrm/logits"][:].reshape(-1, 3, 3).tolist()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["generate", "train", "encode", "make_pairrm", "rank", "rank_result"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data")
    parser.add_argument("--iter")
    parser.add_argument("--pairs")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-prompt-length", type=int, default=512)
    arguments = parser.parse_args()
    work = {"generate": generate, "train": train, "encode": encode, "make_pairrm": make_pairrm, "rank": rank, "rank_result": rank_result}
    result = work[arguments.work](arguments)
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
