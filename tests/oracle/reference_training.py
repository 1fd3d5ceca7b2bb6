"""An independent SELM training in PyTorch: full padded forwards of each answer, as the authors' trainer does.

Loss: Eq. 4.2 of Zhang et al. 2024, "Self-Exploring Language Models". Used by test_training.py; also a script:

    python tests/oracle/reference_training.py MODEL_DIR ROWS.json    (rows: messages, best, worst, generated)
"""
import json
import sys
from dataclasses import dataclass

import torch
import transformers

IGNORED = -100


@dataclass
class Encoding:
    tokenizer: object
    max_length: int
    max_prompt_length: int
    end_of_turn: str = "<|im_end|>"

    def prompt(self, messages):
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"][-self.max_prompt_length:]

    def response(self, text, prompt_tokens):
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.append(self.tokenizer.convert_tokens_to_ids(self.end_of_turn))
        return ids[:self.max_length - prompt_tokens]

    def training_row(self, row):
        """(prompt ids, response ids) of best, worst and generated (None: there is none)."""
        prompt = self.prompt(row["messages"])
        return {name: None if row[name] is None else (prompt, self.response(row[name], len(prompt)))
                for name in ("best", "worst", "generated")}


def sequence_log_probs(model, pairs):
    """Sums of log-probs of the response tokens of (prompt ids, response ids), one right-padded forward over all;
    differentiable. Also the counts."""
    sequences = [prompt + response for prompt, response in pairs]
    labels = [[IGNORED] * len(prompt) + response for prompt, response in pairs]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    targets = torch.tensor([s + [IGNORED] * (width - len(s)) for s in labels])[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    scored = targets != IGNORED
    log_probs = torch.log_softmax(logits, -1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return torch.where(scored, log_probs, 0).double().sum(1), scored.sum(1)


def row_log_probs(model, encoding, rows):
    """[best, worst, generated] sums; generated is NaN where a row has none. Policy forwards as the authors': chosen and
    rejected together, the generated answer apart."""
    encoded = [encoding.training_row(row) for row in rows]
    pair, _ = sequence_log_probs(model, [row["best"] for row in encoded] + [row["worst"] for row in encoded])
    have = [i for i, row in enumerate(encoded) if row["generated"] is not None]
    generated = torch.full((len(rows),), float("nan"), dtype=torch.double)
    if have:
        sums, _ = sequence_log_probs(model, [encoded[i]["generated"] for i in have])
        generated = generated.index_put((torch.tensor(have),), sums)
    return pair[:len(rows)], pair[len(rows):], generated


def selm_loss(policy, reference, alpha, beta):
    """Per row: -log sigmoid(beta z) + alpha beta (ly - ry); the second term only where there is a generated answer."""
    z = (policy[0] - policy[1]) - (reference[0] - reference[1])
    dpo = -torch.nn.functional.logsigmoid(beta * z)
    difference = policy[2] - reference[2]
    optimism = torch.where(torch.isnan(reference[2]), torch.zeros_like(difference), alpha * beta * difference.nan_to_num())
    return dpo + optimism, z


def load(directory, dtype=torch.float64):
    """In float64, so that what differs is the other side's rounding alone (transformers takes norms and softmax in float32
    even then)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return model.eval()


def gradient(model, encoding, rows, reference, alpha, beta):
    """Mean loss and its gradient by parameter name."""
    model.zero_grad(set_to_none=True)
    loss, _ = selm_loss(row_log_probs(model, encoding, rows), reference, alpha, beta)
    loss.mean().backward()
    return loss.mean().item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def train(model, encoding, batches, alpha, beta, learning_rate, reference=None, max_grad_norm=None):
    """AdamW steps over the batches (lists of rows); returns the mean loss of every step, and the gradient's norm before clipping
    where it is clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    if reference is None:
        with torch.no_grad():
            reference = [row_log_probs(model, encoding, rows) for rows in batches]
    losses, norms = [], []
    for rows, of_batch in zip(batches, reference):
        optimizer.zero_grad(set_to_none=True)
        loss, _ = selm_loss(row_log_probs(model, encoding, rows), of_batch, alpha, beta)
        loss.mean().backward()
        if max_grad_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item())
        optimizer.step()
        losses.append(loss.mean().item())
    return losses if max_grad_norm is None else (losses, norms)


def main():
    directory, rows_path = sys.argv[1:3]
    with open(rows_path, encoding="utf-8") as file:
        rows = json.load(file)
    encoding = Encoding(transformers.AutoTokenizer.from_pretrained(directory), 512, 256)
    for step, loss in enumerate(train(load(directory), encoding, [rows] * 5, 0.001, 0.01, 1e-4), 1):
        print(json.dumps({"step": step, "loss": loss}))


if __name__ == "__main__":
    main()
