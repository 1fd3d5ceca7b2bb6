#!/usr/bin/env python3
"""Puts a reward head on a decoder: a Hugging Face sequence-classification directory that shares the decoder's weight file.

usage: make_reward.py BASE_DIR HEAD.safetensors OUT_DIR

BASE_DIR  a LlamaForCausalLM directory with one model.safetensors
HEAD      safetensors with score.weight [1, hidden], as `selm_train --objective bradley-terry --trainable head` learns it
OUT_DIR   config.json (LlamaForSequenceClassification), the tokenizer's files, a link to BASE_DIR's weights, the head, and
          model.safetensors.index.json. Written under another name first, then renamed; an existing OUT_DIR is kept.

Needs the Python standard library only.
"""

import json
import os
import shutil
import struct
import sys

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BACKBONE = "model-00001-of-00002.safetensors"
HEAD = "model-00002-of-00002.safetensors"


def header(path):
    """Tensor table of a safetensors file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    return table


def make(base, head, out):
    config = json.load(open(os.path.join(base, "config.json")))
    head_table = header(head)
    shape = head_table.get("score.weight", {}).get("shape")
    if shape != [1, config["hidden_size"]]:
        sys.exit(f"{head}: score.weight has shape {shape}, but {base} has hidden size {config['hidden_size']} "
                 "(the head belongs to another model). Pass the head made for this base")
    config.update(architectures=["LlamaForSequenceClassification"], num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    ends = config.get("eos_token_id")
    if config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
        # transformers reads the score at the last token that is no padding: here that would be the one before the end token.
        config["pad_token_id"] = None
    partial = f"{out}.partial-{os.getpid()}"
    os.makedirs(partial)
    with open(os.path.join(partial, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
    for name in COPIED:
        if os.path.exists(os.path.join(base, name)):
            shutil.copy(os.path.join(base, name), partial)
    weights = os.path.join(base, "model.safetensors")
    os.symlink(os.path.abspath(weights), os.path.join(partial, BACKBONE))
    shutil.copy(head, os.path.join(partial, HEAD))
    names = {name: BACKBONE for name in header(weights)} | {"score.weight": HEAD}
    size = os.path.getsize(weights) + os.path.getsize(head)
    with open(os.path.join(partial, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": size}, "weight_map": names}, file, indent=1)
    os.rename(partial, out)


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    base, head, out = sys.argv[1:]
    for path in (os.path.join(base, "config.json"), os.path.join(base, "model.safetensors"), head):
        if not os.path.exists(path):
            sys.exit(f"{path} does not exist (it is part of the reward model). Make it first")
    if os.path.exists(out):
        print(f"{out} exists already")
        return
    make(base, head, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
