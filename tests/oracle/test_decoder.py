"""The decoder against transformers: logits, log-probs, gradients, rewards, and directories that each reads of the other."""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tool_requests  # noqa: E402 (needs numpy)

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(os.environ.get("SELM_TOOL_DIR", ROOT / "build" / "release" / "tests")) / "selm_model_tool"
SMOLLM2 = Path(os.environ.get("SELM_SMOLLM2_DIR", ROOT / "build" / "models" / "smollm2"))
ENGINES = os.environ.get("SELM_TEST_ENGINES", "aten,xsmm").split(",")

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason=f"{TOOL} is not built")
needs_smollm2 = pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").exists(),
                                   reason=f"no SmolLM2 in {SMOLLM2} (scripts/make_smollm2.py makes it)")


run_tool = functools.partial(tool_requests.run, TOOL)


@dataclass
class Tiny:
    directory: Path
    model: torch.nn.Module


WINDOW = 300
LLAMA3_SCALING = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 64}  # of the 8 wavelengths one stays, two are mixed, five become longer
SHAPES = {
    "tied_grouped": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=48, tie_word_embeddings=True),
    "untied_multi_head": dict(num_attention_heads=4, num_key_value_heads=4, hidden_size=32, tie_word_embeddings=False),
    "wide_heads": dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=40, head_dim=16, tie_word_embeddings=False),
    "one_key_head": dict(num_attention_heads=4, num_key_value_heads=1, hidden_size=64, tie_word_embeddings=True),
    "padding_token": dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, tie_word_embeddings=True, pad_token_id=9),
    "llama3_scaling": dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, tie_word_embeddings=False,
                           rope_parameters=LLAMA3_SCALING),
    "mistral": dict(family="Mistral", num_attention_heads=4, num_key_value_heads=2, hidden_size=48, head_dim=128,
                    sliding_window=WINDOW),
    "phi3": dict(family="Phi3", num_attention_heads=2, num_key_value_heads=1, hidden_size=192, sliding_window=WINDOW,
                 initializer_range=0.07, pad_token_id=9, eos_token_id=2),
}


def make_tiny(directory: Path, shape: dict, head="CausalLM", **extra) -> Tiny:
    torch.manual_seed(7)
    options = dict(vocab_size=211, intermediate_size=72, num_hidden_layers=3, max_position_embeddings=512, rms_norm_eps=1e-5,
                   rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, initializer_range=0.15)
    options.update(shape, **extra)
    family = options.pop("family", "Llama")
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}For{head}")(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # gains of 1 would hide a missing factor
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory, max_shard_size="40KB")
    return Tiny(directory, model)


@pytest.fixture(scope="module", params=sorted(SHAPES))
def tiny(request, tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp(request.param), SHAPES[request.param])


@pytest.fixture(scope="module")
def smollm2():
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    return Tiny(SMOLLM2, model)


def reference_logits(model, ids: list[int], last: int) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), logits_to_keep=min(last, len(ids))).logits[0].numpy()


def real_prompts(count: int) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    rows = [json.loads(line) for line in (ROOT / "data" / "ultrafeedback_sample.jsonl").open()][:count]
    texts = [tokenizer.apply_chat_template(row["chosen"][:-1], add_generation_prompt=True, tokenize=False) for row in rows]
    return [tokenizer.encode(text, add_special_tokens=False)[-192:] for text in texts]


def random_ids(seed: int, lengths: list[int], vocabulary: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, length).tolist() for length in lengths]


@pytest.mark.parametrize("engine", ENGINES)
def test_tiny_logits_from_sharded_files(tiny, engine, tmp_path):
    assert (tiny.directory / "model.safetensors.index.json").exists()  # transformers cut it into several files
    sequences = random_ids(1, [1, 2, 17, 64, 65, 300], 211)
    ours, _ = run_tool(tmp_path, dict(op="logits", model=str(tiny.directory), engine=engine, sequences=sequences, last=512))
    expected = np.concatenate([reference_logits(tiny.model, ids, 512) for ids in sequences])
    assert np.abs(expected).max() > 1
    assert np.abs(ours.reshape(expected.shape) - expected).max() < 2e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_tiny_decoding_through_the_cache(tiny, engine, tmp_path):
    sequences = random_ids(2, [1, 5, 64, 130, 200], 211)
    request = dict(op="decode", model=str(tiny.directory), engine=engine, sequences=sequences, last=20, chunk=64)
    ours, _ = run_tool(tmp_path, request)
    expected = np.concatenate([reference_logits(tiny.model, ids, 20) for ids in sequences])
    assert np.abs(ours.reshape(expected.shape) - expected).max() < 2e-5


@pytest.fixture(scope="module")
def prompts_16(smollm2) -> tuple[list[list[int]], np.ndarray]:
    """Token ids and the logits of their last positions, computed once for all engines."""
    sequences = real_prompts(16)
    return sequences, np.concatenate([reference_logits(smollm2.model, ids, 24) for ids in sequences])


@pytest.fixture(scope="module")
def long_prompt(smollm2) -> tuple[list[int], np.ndarray]:
    ids = [token for prompt in real_prompts(64) for token in prompt][:2010]
    assert len(ids) == 2010
    return ids, reference_logits(smollm2.model, ids, 16)


@needs_smollm2
@pytest.mark.parametrize("engine", ENGINES)
def test_real_logits_on_16_prompts(prompts_16, engine, tmp_path):
    sequences, expected = prompts_16
    request = dict(op="logits", model=str(SMOLLM2), engine=engine, sequences=sequences, last=24)
    ours, _ = run_tool(tmp_path, request)
    difference = np.abs(ours.reshape(expected.shape) - expected).max()
    print(f"{engine}: largest difference {difference:.2e} over {len(expected)} positions")
    assert difference < 2e-4


@needs_smollm2
@pytest.mark.parametrize("engine", ENGINES)
def test_real_logits_at_position_2000(long_prompt, engine, tmp_path):
    ids, expected = long_prompt
    ours, _ = run_tool(tmp_path, dict(op="logits", model=str(SMOLLM2), engine=engine, sequences=[ids], last=16))
    difference = np.abs(ours.reshape(expected.shape) - expected).max()
    print(f"{engine}: largest difference {difference:.2e}")
    assert difference < 2e-4


def scored_rows(seed: int, vocabulary: int) -> list[dict]:
    """Rows with several branches, an unscored head, an empty branch, equal branches, a branch of one token; token 9 often."""
    ids = random_ids(seed, [9, 12, 30, 5, 1, 7, 40, 3, 8], vocabulary)
    ids[0][3] = ids[2][10] = ids[6][20] = 9
    return [
        {"trunk": ids[0], "branches": [{"tokens": ids[1]}, {"tokens": ids[2], "unscored": 2}]},
        {"trunk": ids[3], "branches": [{"tokens": ids[4]}, {"tokens": []}, {"tokens": ids[5]}, {"tokens": ids[5]}]},
        {"trunk": ids[6], "branches": [{"tokens": ids[7], "unscored": 3}, {"tokens": ids[8]}]},
    ]


def reference_log_probs(model, rows: list[dict]) -> torch.Tensor:
    """Every branch as a full sequence of its own."""
    values = []
    for row in rows:
        for branch in row["branches"]:
            ids = torch.tensor([row["trunk"] + branch["tokens"]])
            first = len(row["trunk"]) + branch.get("unscored", 0)
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            values.append(log_probs.gather(1, ids[0, 1:, None])[first - 1:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("engine", ENGINES)
def test_tiny_packed_log_probs(tiny, engine, tmp_path):
    rows = scored_rows(3, 211)
    ours, _ = run_tool(tmp_path, dict(op="log_probs", model=str(tiny.directory), engine=engine, rows=rows))
    with torch.no_grad():
        expected = reference_log_probs(tiny.model, rows).numpy()
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


def compare_gradients(tmp_path, subject: Tiny, rows: list[dict], engine: str, limit: float):
    model = subject.model
    count = sum(len(b["tokens"]) - b.get("unscored", 0) for row in rows for b in row["branches"])
    coefficients = np.random.default_rng(4).standard_normal(count).astype(np.float32)
    request = dict(op="gradients", model=str(subject.directory), engine=engine, rows=rows, coefficients=coefficients.tolist())
    ours, stdout = run_tool(tmp_path, request)
    model.zero_grad()
    (reference_log_probs(model, rows) * torch.from_numpy(coefficients)).sum().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    tensors = json.loads(stdout)["tensors"]
    assert {tensor["name"] for tensor in tensors} == set(expected)
    worst = ("", 0.0)
    offset = 0
    for tensor in tensors:
        reference = expected[tensor["name"]]
        assert list(reference.shape) == tensor["shape"]
        value = ours[offset:offset + reference.size].reshape(reference.shape)
        offset += reference.size
        assert np.linalg.norm(reference) > 0
        worst = max(worst, (tensor["name"], float(np.linalg.norm(value - reference) / np.linalg.norm(reference))),
                    key=lambda item: item[1])
    assert offset == ours.size
    print(f"{engine}: largest relative difference {worst[1]:.2e} in {worst[0]}")
    assert worst[1] <= limit


@pytest.mark.parametrize("engine", ENGINES)
def test_tiny_gradients(tiny, engine, tmp_path):
    compare_gradients(tmp_path, tiny, scored_rows(5, 211), engine, 2e-5)


@needs_smollm2
@pytest.mark.parametrize("engine", ENGINES)
def test_real_gradients(smollm2, engine, tmp_path):
    prompts = real_prompts(4)
    rows = [{"trunk": prompts[0][:60], "branches": [{"tokens": prompts[1][:60]}, {"tokens": prompts[2][:45], "unscored": 1}]},
            {"trunk": prompts[3][:30], "branches": [{"tokens": prompts[2][45:90]}]}]
    compare_gradients(tmp_path, smollm2, rows, engine, 1e-4)


@pytest.mark.parametrize("tiny", ["llama3_scaling", "mistral", "phi3"], indirect=True)  # Llama: test_generate.py
def test_greedy_generation(tiny, tmp_path):
    prompts = random_ids(11, [3, 70, 130], 211)
    answers = []
    for prompt in prompts:
        output = tiny.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                     max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        answers.append(output[0, len(prompt):].tolist())
        assert len(answers[-1]) == 40
    sequences = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers)]
    request = dict(op="decode", model=str(tiny.directory), engine=ENGINES[-1], sequences=sequences, last=40, chunk=64)
    ours, _ = run_tool(tmp_path, request)
    assert ours.reshape(3, 40, 211).argmax(-1).tolist() == answers  # so choosing the best token each time gives the answers


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_sequences_beyond_the_sliding_window_are_refused(kind, tmp_path):
    subject = make_tiny(tmp_path / "model", SHAPES[kind])
    ids = random_ids(12, [WINDOW + 2], 211)[0]
    windowed = reference_logits(subject.model, ids, 1)
    subject.model.config.sliding_window = None
    assert np.abs(reference_logits(subject.model, ids, 1) - windowed).max() > 1e-3  # with reason: the window changes them
    for op in (dict(op="logits"), dict(op="decode", chunk=64)):
        request = dict(model=str(subject.directory), sequences=[ids[:WINDOW + 1]], last=1, **op)
        _, message = run_tool(tmp_path, request, expect=65)
        assert "sliding_window" in message and f"{WINDOW} tokens" in message


@pytest.mark.parametrize("kind", ["wide_heads", "llama3_scaling", "mistral", "phi3"])
def test_rewards_of_a_sequence_classifier(kind, tmp_path):
    reward = make_tiny(tmp_path / "reward", SHAPES[kind], "SequenceClassification", num_labels=1, pad_token_id=None)
    sequences = random_ids(6, [1, 30, 70], 211)
    for engine in ENGINES:
        ours, _ = run_tool(tmp_path, dict(op="scores", model=str(reward.directory), engine=engine, sequences=sequences))
        with torch.no_grad():
            expected = [reward.model(torch.tensor([ids])).logits[0, 0].item() for ids in sequences]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
    target = tmp_path / "saved"
    run_tool(tmp_path, dict(op="save", model=str(reward.directory), to=str(target), dtype="bf16", max_shard_bytes=30_000))
    saved, report = transformers.AutoModelForSequenceClassification.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and saved.dtype == torch.bfloat16
    for name, value in reward.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value.to(torch.bfloat16)), name


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 30_000])
def test_saved_model_loads_in_transformers(tiny, shard_bytes, tmp_path):
    target = tmp_path / "saved"
    run_tool(tmp_path, dict(op="save", model=str(tiny.directory), to=str(target), dtype="fp32", max_shard_bytes=shard_bytes))
    assert (target / "model.safetensors.index.json").exists() == (shard_bytes == 30_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.dtype == torch.float32
    ids = random_ids(8, [50], 211)[0]
    assert np.array_equal(reference_logits(model.eval(), ids, 50), reference_logits(tiny.model, ids, 50))


@needs_smollm2
def test_saved_smollm2_is_the_same_model(tmp_path):
    target = tmp_path / "saved"
    run_tool(tmp_path, dict(op="save", model=str(SMOLLM2), to=str(target), dtype="bf16", max_shard_bytes=5_000_000_000))
    from safetensors.torch import load_file
    ours, theirs = load_file(target / "model.safetensors"), load_file(SMOLLM2 / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (SMOLLM2 / name).read_bytes()
    assert not (target / "conversion.json").exists()  # it describes the source's weights
    assert len(transformers.AutoTokenizer.from_pretrained(target)) == 49152


def test_damaged_shard_is_refused(tmp_path):
    broken = make_tiny(tmp_path / "broken", SHAPES["tied_grouped"])
    shard = sorted(broken.directory.glob("model-*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 4)
    _, message = run_tool(tmp_path, dict(op="logits", model=str(broken.directory), sequences=[[1]], last=1), expect=65)
    assert shard.name in message and "tensor '" in message
