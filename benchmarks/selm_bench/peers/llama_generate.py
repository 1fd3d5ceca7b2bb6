"""llama.cpp through llama-cpp-python's C interface: all sequences decoded together, one batch a step, greedy; prompts read in batches of
n_batch tokens. Keys and values of each sequence in a stream of its own (kv_unified off), as llama.cpp advises."""

import argparse
import ctypes
import time

import llama_cpp
import numpy as np

from common import emit, read_rows


class Batch:
    def __init__(self, capacity):
        self.batch = llama_cpp.llama_batch_init(capacity, 0, 1)
        self.clear()

    def clear(self):
        self.batch.n_tokens = 0

    def add(self, token, position, sequence, wanted):
        i = self.batch.n_tokens
        self.batch.token[i], self.batch.pos[i] = token, position
        self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        self.batch.logits[i] = wanted
        self.batch.n_tokens = i + 1
        return i


def decode(context, batch):
    status = llama_cpp.llama_decode(context, batch.batch)
    if status != 0:
        raise SystemExit(f"llama_decode gave {status}")


def best(context, i, vocabulary):
    logits = llama_cpp.llama_get_logits_ith(context, i)
    return int(np.argmax(np.ctypeslib.as_array(logits, shape=(vocabulary,))))


def answer(context, prompts, limit, end, vocabulary, capacity):
    batch, answers, pending = Batch(capacity), [[] for _ in prompts], []

    def flush():
        decode(context, batch)
        for sequence, i in pending:
            answers[sequence].append(best(context, i, vocabulary))
        pending.clear()
        batch.clear()

    for sequence, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            if batch.batch.n_tokens == capacity:
                flush()
            i = batch.add(token, position, sequence, position + 1 == len(prompt))
            if position + 1 == len(prompt):
                pending.append((sequence, i))
    flush()
    while True:
        active = [s for s, given in enumerate(answers) if given[-1] != end and len(given) < limit]
        if not active:
            break
        for sequence in active:
            given = answers[sequence]
            pending.append((sequence, batch.add(given[-1], len(prompts[sequence]) + len(given) - 1, sequence, True)))
        flush()
    llama_cpp.llama_batch_free(batch.batch)
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--end", type=int, required=True)
    a = parser.parse_args()
    prompts = read_rows(a.prompts)
    silent = llama_cpp.llama_log_callback(lambda level, text, user: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.n_gpu_layers = a.gpu_layers
    model = llama_cpp.llama_model_load_from_file(a.gguf.encode(), model_parameters)
    parameters = llama_cpp.llama_context_default_params()
    each = (max(map(len, prompts)) + a.new_tokens + 255) // 256 * 256
    parameters.n_seq_max, parameters.n_ctx, parameters.kv_unified = len(prompts), each * len(prompts), False
    parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_threads = parameters.n_threads_batch = a.threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    answer(context, prompts[:2], 2, a.end, vocabulary, 512)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    start = time.perf_counter()
    answers = answer(context, prompts, a.new_tokens, a.end, vocabulary, 512)
    seconds = time.perf_counter() - start
    emit({"seconds": seconds, "new_tokens": sum(map(len, answers)), "answers": answers, "system": llama_cpp.llama_print_system_info().decode()})


main()
