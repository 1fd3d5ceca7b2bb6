"""PairRM in plain PyTorch on transformers' DebertaV2Model: inputs, logits, scores and ranks, written apart from src/rank."""

import torch
import transformers
from safetensors.torch import load_file

import pairrm_checkpoint as checkpoints


class PairRm:
    def __init__(self, directory, tokenizer, source: int, candidate: int):
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")
        self.source_length, self.candidate_length = source, candidate
        self.prefix = [tokenizer.token_to_id(token) for token in checkpoints.PREFIXES]
        tensors = {name: value.float() for name, value in load_file(directory / "model.safetensors").items()}
        self.encoder = transformers.DebertaV2Model(checkpoints.encoder_config(checkpoints.len_of(tokenizer)))
        start = "pretrained_model."
        self.encoder.load_state_dict({name[len(start):]: value for name, value in tensors.items() if name.startswith(start)}, strict=True)
        self.encoder.eval()  # no dropout
        self.hidden = torch.nn.Linear(2 * checkpoints.HIDDEN, checkpoints.HIDDEN)
        self.out = torch.nn.Linear(checkpoints.HIDDEN, 1)
        for layer, number in ((self.hidden, 1), (self.out, 4)):
            layer.load_state_dict({"weight": tensors[f"head_layer.{number}.weight"], "bias": tensors[f"head_layer.{number}.bias"]})

    def parameters(self) -> dict:
        named = {"pretrained_model." + name: value for name, value in self.encoder.named_parameters()}
        named |= {f"head_layer.{number}.{name}": value for layer, number in ((self.hidden, 1), (self.out, 4))
                  for name, value in layer.named_parameters()}
        return named

    def encode(self, text: str, length: int) -> list[int]:
        return self.tokenizer.encode(text, max_length=length, truncation=True)

    def logit(self, ids: list[int]) -> torch.Tensor:
        states = self.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        source, left, right = (states[ids.index(prefix)] for prefix in self.prefix[:3])
        head = lambda candidate: self.out(torch.tanh(self.hidden(torch.cat([source, candidate]))))
        return (head(left) - head(right))[0]

    def pair_ids_per_row(self, source: str, left: str, right: str) -> list[int]:
        """PairRM-hf's tokenize_pair."""
        ids = self.encode("<|source|>" + source, self.source_length)
        length = (self.source_length + 2 * self.candidate_length - len(ids)) // 2
        return ids + self.encode("<|candidate1|>" + left, length) + self.encode("<|candidate2|>" + right, length)

    def pair_ids_blender(self, batch: list[dict]) -> list[dict]:
        """LLM-Blender's collator: per row {(i, j): ids}."""
        clean = lambda text: text.replace("[SEP]", " ")
        sources = [self.encode("<|source|>" + clean(row["prompt"]), self.source_length) for row in batch]
        length = self.candidate_length + (self.source_length - max(map(len, sources))) // 2
        place = lambda ids, prefix: [self.prefix[prefix] if token == self.prefix[3] else token for token in ids]
        out = []
        for row, source in zip(batch, sources, strict=True):
            parts = [self.encode("<|candidate|>" + clean(text), length) for text in row["answers"]]
            out.append({(i, j): source + place(parts[i], 1) + place(parts[j], 2) for i in range(3) for j in range(3) if i != j})
        return out

    def rank(self, rows: list[dict], mode: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """Logits [N, 3, 3], scores [N, 3] ("max_logits"), ranks [N, 3], lengths of the inputs."""
        if mode == "blender":
            ids = [pairs for begin in range(0, len(rows), 8) for pairs in self.pair_ids_blender(rows[begin:begin + 8])]
        else:
            ids = [{(i, j): self.pair_ids_per_row(row["prompt"], row["answers"][i], row["answers"][j])
                    for i in range(3) for j in range(3) if i != j} for row in rows]
        logits = torch.zeros(len(rows), 3, 3)
        with torch.no_grad():
            for row, pairs in enumerate(ids):
                done = {}
                for (i, j), sequence in pairs.items():
                    key = tuple(sequence)
                    if key not in done:
                        done[key] = self.logit(sequence)
                    logits[row, i, j] = done[key]
        scores = (logits - logits.transpose(1, 2)).mean(-1)
        ranks = 1 + (scores[:, None, :] > scores[:, :, None]).sum(-1)
        return logits, scores, ranks, [len(sequence) for pairs in ids for sequence in pairs.values()]


# --- training ----------------------------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 (Salmon et al., SC11)."""
    low = 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(second >> 32) ^ counter[1] ^ key[0], second & low, (first >> 32) ^ counter[3] ^ key[1], first & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def chosen_is_left(seed: int, epoch: int, row: int) -> bool:
    """The first bit of the stream (seed, 4, epoch, row) is 0."""
    mixed = philox([4, epoch, 0, 0x53454C4D], [seed, 0])
    return philox([0, 0, row, 0], mixed[:2])[0] < 1 << 31


def training_loss(ranker: PairRm, rows: dict[int, dict], seed: int, epoch: int) -> torch.Tensor:
    """Mean over rows of -log sigmoid(sign * logit) (LLM-Blender's loss for one pair of candidates)."""
    losses = []
    for number, row in rows.items():
        _, chosen, rejected = row["answers"]
        left = chosen_is_left(seed, epoch, number)
        logit = ranker.logit(ranker.pair_ids_per_row(row["prompt"], *((chosen, rejected) if left else (rejected, chosen))))
        losses.append(-torch.nn.functional.logsigmoid(logit if left else -logit))
    return torch.stack(losses).mean()
