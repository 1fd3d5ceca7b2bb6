"""A GGUF file with the weights of a Llama-architecture directory as they are (bf16) or widened (fp32), without a tokenizer: prompts are
given as ids. q and k rows are interleaved per head, as llama.cpp's rotary embedding wants them. Usage: make_gguf.py DIR FILE bf16|fp32"""

import json
import os
import sys

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from common import emit

NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def interleaved(weight, heads):
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns).contiguous()


def gguf_name(name):
    if name in OUTER:
        return OUTER[name]
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(middle)]}.weight"


def add(writer, name, tensor, dtype):
    if tensor.dim() == 1 or dtype == "fp32":  # norms are fp32 in every GGUF file
        writer.add_tensor(name, tensor.float().numpy())
        return
    bits = tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
    writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)


def main():
    directory, path, dtype = sys.argv[1:4]
    with open(os.path.join(directory, "config.json")) as file:
        config = json.load(file)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in load_file(os.path.join(directory, "model.safetensors")).items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                tensor = interleaved(tensor, count)
        add(writer, gguf_name(name), tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    emit({"bytes": os.path.getsize(path)})


main()
