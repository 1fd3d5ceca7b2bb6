#!/usr/bin/env python3
"""Takes the reward head out of a model directory: a safetensors file with score.weight alone, as make_reward.py reads it.

usage: extract_head.py MODEL_DIR HEAD.safetensors

MODEL_DIR  what `selm_train --objective bradley-terry` wrote (model.safetensors, or several with model.safetensors.index.json)
HEAD       score.weight [1, hidden], F32; written under another name first, then renamed

Needs the Python standard library only.
"""

import json
import os
import struct
import sys

NAME = "score.weight"


def file_of(directory):
    """The weight file that holds the head."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if not os.path.exists(index):
        return os.path.join(directory, "model.safetensors")
    with open(index) as file:
        names = json.load(file)["weight_map"]
    if NAME not in names:
        sys.exit(f"{index} has no {NAME} (the model is no reward model). Pass one that --objective bradley-terry wrote")
    return os.path.join(directory, names[NAME])


def read_head(path):
    """Shape and bytes of the head, as F32."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length)).get(NAME)
        if entry is None:
            sys.exit(f"{path} has no {NAME} (the model is no reward model). Pass one that --objective bradley-terry wrote")
        if entry["dtype"] != "F32":
            sys.exit(f"{path}: {NAME} is {entry['dtype']} (rounded; the head is kept in F32). Train with --save-dtype fp32")
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        return entry["shape"], file.read(end - begin)


def write_head(path, shape, data):
    table = {"__metadata__": {"format": "pt"}, NAME: {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    partial = f"{path}.partial-{os.getpid()}"
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
    os.rename(partial, path)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    directory, out = sys.argv[1:]
    source = file_of(directory)
    if not os.path.exists(source):
        sys.exit(f"{source} does not exist (it is part of the reward model). Pass a directory that selm_train wrote")
    shape, data = read_head(source)
    write_head(out, shape, data)
    print(f"wrote {out}: {NAME} {shape}")


if __name__ == "__main__":
    main()
