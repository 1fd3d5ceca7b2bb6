"""PairRM's size with random weights (make), and transformers driven as LLM-Blender drives it (rank)."""

import argparse
import json
import time

from common import emit, read_rows


def checkpoints():
    """The tests' maker of pair rankers: tokenizer and configuration in llm-blender/PairRM's layout."""
    import os
    import sys

    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "..", "tests", "oracle"))
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
    """PairRM's size with random weights and a SentencePiece tokenizer of the sample."""
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
    return {"layers": arguments.layers}


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
    logits, lengths, padded = [[[0.0] * 3 for _ in range(3)] for _ in rows], [], 0
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
                lengths += map(len, batch)
                padded += ids.numel()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu, "rows": len(rows), "rows_per_s": len(rows) / seconds, "lengths": lengths, "padded_tokens": padded,
            "logits": logits}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "rank"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs")
    parser.add_argument("--layers", type=int, default=24)
    arguments = parser.parse_args()
    emit((make_pairrm if arguments.what == "make" else rank)(arguments))


main()
