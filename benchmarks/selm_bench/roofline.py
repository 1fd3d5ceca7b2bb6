"""FLOPs and bytes that a phase needs at least, counted from the model's config and the lengths of its sequences.

A multiply-add is two FLOPs. Attention counts visible pairs of positions only. Backward is twice forward for every matrix product
(gradients of inputs and of weights) and 2.5 times for attention, as its scores are made again (Dao 2023). What recomputation,
padding or copies cost is not counted: that is what a phase may lose.
"""

import json
import os


class Decoder:
    def __init__(self, config):
        self.layers, self.hidden, self.ffn = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or self.hidden // self.heads
        self.vocabulary = config["vocab_size"]
        self.layer_weights = (self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim + self.heads * self.head_dim * self.hidden
                              + 3 * self.hidden * self.ffn)
        self.linear = self.layers * self.layer_weights
        self.head = self.vocabulary * self.hidden

    @staticmethod
    def read(directory):
        with open(os.path.join(directory, "config.json")) as file:
            return Decoder(json.load(file))

    def attention(self, pairs):
        """FLOPs of scores and weighted sums over so many visible (query, key) pairs, all layers."""
        return 4.0 * self.layers * self.heads * self.head_dim * pairs

    def forward(self, tokens, pairs, scored):
        return 2.0 * self.linear * tokens + 2.0 * self.head * scored + self.attention(pairs)

    def forward_backward(self, tokens, pairs, scored):
        return 3 * (2.0 * self.linear * tokens + 2.0 * self.head * scored) + 3.5 * self.attention(pairs)

    def kv_bytes(self, element):
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element

    def decode_seconds(self, prompts, answers, ranks, element, peak):
        """Least time to answer: prompts read by the arithmetic peak, then each step of each rank by the larger of its bytes (the
        weights once, keys and values of its sequences) and its FLOPs. Rows spread evenly; all of a rank's decode together."""
        prefill = sum(self.forward(p, causal(p), 1) for p in prompts)
        seconds = prefill / peak["flops"]
        weights = ranks * (self.linear + self.head) * element
        for step in range(1, max(answers, default=1)):  # the first token comes from the prompt's pass
            lengths = [p + step for p, a in zip(prompts, answers) if a > step]
            flops = sum(self.forward(1, length, 1) for length in lengths)
            read = weights + sum(lengths) * self.kv_bytes(element)
            seconds += max(flops / peak["flops"], read / peak["bytes"])
        return seconds


class Deberta:
    def __init__(self, layers, hidden=1024, ffn=4096, buckets=256):
        self.layers, self.hidden, self.ffn, self.positions = layers, hidden, ffn, 2 * buckets

    def forward(self, lengths):
        """Content products, disentangled attention (content to content, content to position both ways: each query and each key against
        the relative positions that occur), weighted sums. Projections of the position table are weights' products: once, not counted."""
        flops = 0.0
        for length in lengths:
            dense = 2.0 * length * (4 * self.hidden**2 + 2 * self.hidden * self.ffn)
            scores = 2.0 * length**2 * self.hidden * 2
            relative = 2 * 2.0 * length * min(self.positions, 2 * length) * self.hidden
            flops += self.layers * (dense + scores + relative)
        return flops


def causal(tokens):
    return tokens * (tokens + 1) / 2


def branches(prompt, answers):
    """(tokens, visible pairs, scored tokens) of a packed row: the prompt once, each answer attends to it and to itself. The last
    token of an answer is only predicted."""
    read = [max(0, answer - 1) for answer in answers]
    tokens = prompt + sum(read)
    pairs = causal(prompt) + sum(causal(r) + r * prompt for r in read)
    return tokens, pairs, sum(answers)
