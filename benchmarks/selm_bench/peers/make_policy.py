"""A policy a little away from a model: every matrix with noise of 2 % of its deviation, rounded to bf16. Usage: make_policy.py MODEL OUTPUT"""

import os
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file

from common import emit


def main():
    source, output = sys.argv[1:3]
    os.makedirs(output)
    for name in os.listdir(source):
        if name != "model.safetensors" and os.path.isfile(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), output)
    torch.manual_seed(5)
    tensors = load_file(os.path.join(source, "model.safetensors"))
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            wide = tensor.float()
            tensors[name] = (wide + torch.randn_like(wide) * wide.std() * 0.02).to(torch.bfloat16)
    save_file(tensors, os.path.join(output, "model.safetensors"), metadata={"format": "pt"})
    emit({"tensors": len(tensors)})


main()
