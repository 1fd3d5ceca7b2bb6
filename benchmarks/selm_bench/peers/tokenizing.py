"""Hugging Face `tokenizers` on one thread. make DIRECTORY: tokenizers to compare and the texts; encode TOKENIZER TEXTS IDS N: seconds of N
repetitions of encode_batch and of encode_batch_fast (no offsets)."""

import json
import os
import sys
import time

from common import emit, read_rows


def make(directory, model, data):
    import shutil

    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, os.path.join(here, "..", "..", "..", "tests", "oracle"))
    from pathlib import Path

    made, missing = ["SmolLM2"], {}
    os.makedirs(os.path.join(directory, "SmolLM2"), exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(os.path.join(model, name), os.path.join(directory, "SmolLM2", name))
    for name, maker in (("Llama-3", "make_llama3"), ("Mistral-7B", "make_mistral")):
        try:
            import real_tokenizers

            getattr(real_tokenizers, maker)(Path(directory) / name)
            made.append(name)
        except (ImportError, FileNotFoundError) as error:
            missing[name] = str(error)
    texts = [text for row in read_rows(data) for text in (row["prompt"], row["chosen"][-1]["content"], row["rejected"][-1]["content"])]
    with open(os.path.join(directory, "texts"), "wb") as out:
        out.write(b"".join(text.replace("\0", "").encode() + b"\0" for text in texts))
    return {"made": made, "missing": missing}


def encode(tokenizer, texts_path, ids_path, repetitions):
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with open(texts_path, "rb") as file:
        texts = [text.decode() for text in file.read().split(b"\0")[:-1]]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    np.concatenate([np.array(row, np.int32) for row in ids]).tofile(ids_path)
    seconds = {}
    for name in ("encode_batch", "encode_batch_fast"):
        call = getattr(tokenizer, name)
        call(texts, add_special_tokens=False)
        for _ in range(repetitions):
            start = time.perf_counter()
            call(texts, add_special_tokens=False)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": sum(map(len, ids)), "bytes": sum(len(text.encode()) for text in texts)}


emit(make(*sys.argv[2:5]) if sys.argv[1] == "make" else encode(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])))
