"""Rewards against transformers: make_reward.py's directory scored by selm_rank and by LlamaForSequenceClassification."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
h5py = pytest.importorskip("h5py")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SELM_BIN_DIR", ROOT / "build" / "release" / "bin"))
SMOLLM2 = Path(os.environ.get("SELM_SMOLLM2_DIR", ROOT / "build" / "models" / "smollm2"))
HEAD = ROOT / "data" / "reward_head" / "smollm2_135m.safetensors"
SAMPLE = ROOT / "data" / "ultrafeedback_sample.jsonl"
LINES = [833, *range(900, 915)]  # line 833 has an empty chosen answer
MAX_LENGTH, MAX_PROMPT = 256, 128  # short enough that prompts and answers of these rows are cut
END = "<|im_end|>"

pytestmark = [pytest.mark.skipif(not (BIN / "selm_rank").exists(), reason=f"{BIN}/selm_rank is not built"),
              pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").exists(),
                                 reason=f"no SmolLM2 in {SMOLLM2} (scripts/make_smollm2.py makes it)")]


def run(*command, expect=0) -> str:
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
                   "OMPI_MCA_mpi_yield_when_idle": "1"}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == expect, result.stderr
    return result.stdout + result.stderr


def mpirun(ranks: int) -> list:
    return [os.environ.get("SELM_MPIEXEC", "mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "reward"
    run(sys.executable, ROOT / "scripts" / "make_reward.py", SMOLLM2, HEAD, directory)
    return directory


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Per row the conversation and its answers: generated, chosen, rejected."""
    lines = SAMPLE.read_text(encoding="utf-8").split("\n")
    found = []
    for i, line in enumerate(LINES):
        row = json.loads(lines[line])
        chosen, rejected = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
        generated = [chosen, "", "I would rather not say.", rejected[:120].strip()][i % 4]
        found.append(dict(id=row["prompt_id"], line=lines[line], messages=row["chosen"][:-1], answers=[generated, chosen, rejected]))
    assert any(row["answers"][1] == "" for row in found)
    return found


def make_iteration(directory: Path, rows: list[dict]) -> Path:
    (directory / "rows.jsonl").write_text("".join(row["line"] + "\n" for row in rows), encoding="utf-8")
    (directory / "answers.jsonl").write_text("".join(json.dumps({"prompt_id": row["id"], "response": row["answers"][0]}) + "\n"
                                                     for row in rows), encoding="utf-8")
    run(BIN / "selm_import", "--input", directory / "rows.jsonl", "--output", directory / "prefs.h5", "--on-empty-answer", "keep")
    run(BIN / "selm_gen", "--data", directory / "prefs.h5", "--responses", directory / "answers.jsonl", "--output", directory / "iter.h5")
    return directory / "iter.h5"


def rank(iteration: Path, reward: Path, *arguments, ranks=1, max_length=MAX_LENGTH, max_prompt=MAX_PROMPT) -> None:
    run(*mpirun(ranks), BIN / "selm_rank", "--iter", iteration, "--ranker", f"reward:{reward}", "--dtype", "fp32", "--progress", "off",
        "--max-length", max_length, "--max-prompt-length", max_prompt, *arguments)


def test_rewards_equal_transformers(reward, rows, tmp_path):
    iteration = make_iteration(tmp_path, rows)
    rank(iteration, reward)
    assert "verified" in run(BIN / "selm_inspect", "--verify", iteration)
    with h5py.File(iteration) as file:
        ours = file["ranking/scores"][:]

    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward)
    end = tokenizer.convert_tokens_to_ids(END)
    model.eval()
    cut_prompts = cut_answers = 0
    expected = np.zeros_like(ours)
    for i, row in enumerate(rows):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = whole[-MAX_PROMPT:]
        cut_prompts += len(whole) > len(prompt)
        for c, answer in enumerate(row["answers"]):
            ids = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"] + [end]
            cut_answers += len(ids) > MAX_LENGTH
            with torch.no_grad():
                expected[i, c] = model(torch.tensor([ids[:MAX_LENGTH]])).logits[0, 0].item()
    assert cut_prompts >= 2 and cut_answers >= 4
    assert expected.std() > 0.05  # a head of zeros would agree with anything
    difference = np.abs(ours - expected).max()
    print(f"largest difference {difference:.2e} over {ours.size} rewards between {expected.min():.2f} and {expected.max():.2f}")
    assert difference < 2e-4


def test_rewards_do_not_depend_on_ranks(reward, rows, tmp_path):
    iteration = make_iteration(tmp_path, rows[:7])
    digests = set()
    for ranks in (1, 2, 3, 4):
        copy = tmp_path / f"np{ranks}.h5"
        shutil.copy(iteration, copy)
        rank(copy, reward, ranks=ranks, max_length=96, max_prompt=48)
        digests.add(run(BIN / "selm_inspect", "--digest", copy).split()[-1])
    assert len(digests) == 1


def test_generated_only_files_are_verified(reward, rows, tmp_path):
    iteration = make_iteration(tmp_path, rows[:3])
    rank(iteration, reward, "--generated-only", "on", max_length=64, max_prompt=32)
    assert "verified" in run(BIN / "selm_inspect", "--verify", iteration)
    with h5py.File(iteration) as file:
        scores = file["ranking/scores"][:]
    assert np.isfinite(scores[:, 0]).all() and np.isnan(scores[:, 1:]).all()


def test_head_goes_out_and_in_unchanged(reward, tmp_path):
    run(sys.executable, ROOT / "scripts" / "extract_head.py", reward, tmp_path / "head.safetensors")
    from safetensors import safe_open
    with safe_open(tmp_path / "head.safetensors", "pt") as file, safe_open(HEAD, "pt") as bundled:
        assert list(file.keys()) == list(bundled.keys()) == ["score.weight"]
        assert file.metadata() == bundled.metadata() == {"format": "pt"}
        weight = file.get_tensor("score.weight")
        assert weight.dtype == torch.float32 and weight.shape == (1, 576)
        assert torch.equal(weight, bundled.get_tensor("score.weight"))


def test_head_of_another_model_is_refused(tmp_path):
    data = struct.pack("<8f", *range(8))
    table = json.dumps({"score.weight": {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "small.safetensors").write_bytes(struct.pack("<Q", len(table)) + table + data)
    message = run(sys.executable, ROOT / "scripts" / "make_reward.py", SMOLLM2, tmp_path / "small.safetensors", tmp_path / "out", expect=1)
    assert "hidden size 576" in message
    assert not (tmp_path / "out").exists()
