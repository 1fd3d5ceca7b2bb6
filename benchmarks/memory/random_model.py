#!/usr/bin/env python3
"""Writes a Llama-shaped model of random bf16 weights (the same for the same arguments) with another model's tokenizer.

usage: random_model.py --tokenizer DIR --output DIR [--hidden 2048] [--layers 18] [--intermediate 5632] [--heads 16] [--kv-heads 4]

Needs numpy alone. Tensors are made and written one by one, so memory holds the largest only.
"""

import argparse
import json
import os
import shutil
import struct

import numpy

SEED = 7


def shapes(config):
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "self_attn.q_proj.weight", (query, hidden)
        yield layer + "self_attn.k_proj.weight", (key, hidden)
        yield layer + "self_attn.v_proj.weight", (key, hidden)
        yield layer + "self_attn.o_proj.weight", (hidden, query)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", (config["intermediate_size"], hidden)
        yield layer + "mlp.up_proj.weight", (config["intermediate_size"], hidden)
        yield layer + "mlp.down_proj.weight", (hidden, config["intermediate_size"])
    yield "model.norm.weight", (hidden,)


def tensor(index, shape):
    """bf16 as uint16, rounded to nearest even."""
    if len(shape) == 1:
        values = numpy.ones(shape, numpy.float32)
    else:
        values = numpy.random.default_rng([SEED, index]).standard_normal(shape, numpy.float32)
        values *= 0.02
    bits = values.view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def make(tokenizer, output, hidden, layers, intermediate, heads, kv_heads):
    """@return parameters"""
    with open(os.path.join(tokenizer, "config.json")) as file:
        config = json.load(file)
    config.update(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate, num_attention_heads=heads,
                  num_key_value_heads=kv_heads, head_dim=hidden // heads, tie_word_embeddings=True, torch_dtype="bfloat16")
    os.makedirs(output, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if os.path.exists(os.path.join(tokenizer, name)):
            shutil.copy(os.path.join(tokenizer, name), output)
    header, end, parameters = {"__metadata__": {"format": "pt"}}, 0, 0
    for name, shape in shapes(config):
        elements = int(numpy.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * elements]}
        end += 2 * elements
        parameters += elements
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(output, "model.safetensors.partial"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for index, (_, shape) in enumerate(shapes(config)):
            tensor(index, shape).tofile(file)
    os.rename(os.path.join(output, "model.safetensors.partial"), os.path.join(output, "model.safetensors"))
    with open(os.path.join(output, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
    return parameters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output", required=True)
    for name, default in (("hidden", 2048), ("layers", 18), ("intermediate", 5632), ("heads", 16), ("kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(make(**vars(parser.parse_args())), "parameters")


if __name__ == "__main__":
    main()
