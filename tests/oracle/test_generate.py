"""selm_gen against transformers' generate: greedy ids in fp32, and the stored log-probs of every token."""

import json
import os
import subprocess
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
h5py = pytest.importorskip("h5py")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SELM_BIN_DIR", ROOT / "build" / "release" / "bin"))
SMOLLM2 = Path(os.environ.get("SELM_SMOLLM2_DIR", ROOT / "build" / "models" / "smollm2"))
SAMPLE = ROOT / "data" / "ultrafeedback_sample.jsonl"
ROWS, NEW_TOKENS = 16, 64
TIE = 1e-3  # top-2 logits closer than this may come in either order: two fp32 implementations differ by up to 2e-4

pytestmark = [pytest.mark.skipif(not (BIN / "selm_gen").exists(), reason=f"{BIN}/selm_gen is not built"),
              pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").exists(),
                                 reason=f"no SmolLM2 in {SMOLLM2} (scripts/make_smollm2.py makes it)")]


def run(*command) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict]:
    """Per row: tokens, log-probs, finish reason and text that selm_gen stored, and the conversation."""
    directory = tmp_path_factory.mktemp("generate")
    prefs, output = directory / "prefs.h5", directory / "iter.h5"
    run(BIN / "selm_import", "--input", SAMPLE, "--rows", f"0:{ROWS}", "--output", prefs)
    run(BIN / "selm_gen", "--data", prefs, "--policy", SMOLLM2, "--output", output, "--dtype", "fp32",
        "--max-new-tokens", NEW_TOKENS, "--progress", "off")
    messages = [json.loads(line)["chosen"][:-1] for line in SAMPLE.read_text().splitlines()[:ROWS]]
    rows = []
    with h5py.File(output) as file:
        group = file["responses/generated"]
        tokens, bounds = group["tokens"][:], group["token_offsets"][:]
        text, text_bounds = group["text"][:].tobytes(), group["text_offsets"][:]
        for i in range(ROWS):
            part = slice(bounds[i], bounds[i + 1])
            rows.append(dict(tokens=tokens[part].tolist(), logprobs=group["logprobs"][part], messages=messages[i],
                             reason=int(group["finish_reason"][i]), text=text[text_bounds[i]:text_bounds[i + 1]].decode()))
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()


def prompt_ids(tokenizer, messages) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def next_logits(model, prompt: list[int], tokens: list[int]):
    """Logits [len(tokens), V] that predict each token, in one pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1:len(prompt) + len(tokens) - 1]


def test_greedy_ids_equal_generate(answers, tokenizer, model):
    ties = 0
    for i, row in enumerate(answers):
        prompt = prompt_ids(tokenizer, row["messages"])
        with torch.no_grad():
            output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                    max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        expected = output[0, len(prompt):].tolist()
        if expected == row["tokens"]:
            continue
        place = next((t for t, (a, b) in enumerate(zip(expected, row["tokens"])) if a != b), None)
        assert place is not None, f"row {i}: {len(row['tokens'])} tokens instead of {len(expected)}"
        top = next_logits(model, prompt, expected[:place + 1])[-1].topk(2)
        gap = float(top.values[0] - top.values[1])
        assert gap < TIE and row["tokens"][place] in top.indices.tolist(), (
            f"row {i} token {place}: {row['tokens'][place]} instead of {expected[place]} where the best two logits are {gap} apart")
        ties += 1
    print(f"\n{ROWS} prompts x {NEW_TOKENS} tokens: {ROWS - ties} rows equal, {ties} differ after a tie within {TIE}")
    assert ties <= ROWS // 4


def test_log_probs_are_those_of_the_unscaled_logits(answers, tokenizer, model):
    largest = 0.0
    for row in answers:
        prompt = prompt_ids(tokenizer, row["messages"])
        expected = next_logits(model, prompt, row["tokens"]).double().log_softmax(-1)
        expected = expected[torch.arange(len(row["tokens"])), torch.tensor(row["tokens"])].numpy()
        largest = max(largest, float(np.abs(expected - row["logprobs"]).max()))
    print(f"\nlargest difference of a log-prob: {largest:.2e}")
    assert largest < 2e-4


def test_texts_and_ends(answers, tokenizer):
    for row in answers:
        assert row["text"] == tokenizer.decode(row["tokens"], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        assert (row["reason"] == 0) == (row["tokens"][-1] == tokenizer.eos_token_id)
        assert row["reason"] == 0 or len(row["tokens"]) == NEW_TOKENS
    assert {row["reason"] for row in answers} == {0, 1}
