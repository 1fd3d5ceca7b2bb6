"""The DeBERTa encoder and the pair head against transformers' DebertaV2Model with PairRM's head on it in PyTorch."""

import functools
import json
import os
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import tool_requests  # noqa: E402 (needs numpy)
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.models.deberta_v2 import modeling_deberta_v2  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(os.environ.get("SELM_TOOL_DIR", ROOT / "build" / "release" / "tests")) / "selm_pair_tool"
ENGINES = os.environ.get("SELM_TEST_ENGINES", "aten,xsmm").split(",")

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason=f"{TOOL} is not built")

PREFIX_IDS = dict(source_prefix_id=204, cand1_prefix_id=205, cand2_prefix_id=206, cand_prefix_id=207)


run_tool = functools.partial(tool_requests.run, TOOL)


class PairRM(torch.nn.Module):
    """Encoder and head under the original checkpoint's tensor names; the logit is left - right."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.pretrained_model = transformers.DebertaV2Model(config)
        self.head_layer = torch.nn.Sequential(torch.nn.Dropout(0.05), torch.nn.Linear(2 * hidden, hidden), torch.nn.Tanh(),
                                              torch.nn.Dropout(0.05), torch.nn.Linear(hidden, 1))

    def hidden_states(self, ids):
        return self.pretrained_model(torch.tensor([ids])).last_hidden_state[0]

    def logit(self, pair):
        states = self.hidden_states(pair["ids"])
        source, left, right = (states[pair[key]] for key in ("source", "left", "right"))
        return (self.head_layer(torch.cat([source, left])) - self.head_layer(torch.cat([source, right])))[0]


def make(directory: Path, spread: float, mixing: float = 1.0, **shape) -> PairRM:
    """A random model whose norms are not 1 and 0 and whose attention is not flat, saved in PairRM-hf's layout. `mixing` is the
    size of attention's part and of biases: deep random models make all tokens alike."""
    torch.manual_seed(5)
    config = transformers.DebertaV2Config(
        hidden_act="gelu", layer_norm_eps=1e-7, relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0, pad_token_id=0,
        max_relative_positions=-1, initializer_range=spread, **{**dict(position_buckets=256, max_position_embeddings=512), **shape})
    model = PairRM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * mixing * torch.randn_like(parameter))
            elif "LayerNorm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "rel_embeddings" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif "attention.output.dense" in name:
                parameter.mul_(mixing)
            elif "head_layer" in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(model.state_dict()), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**config.to_dict(), **PREFIX_IDS, "n_tasks": 1}, default=str))
    return model


SHAPES = {
    "usual": dict(vocab_size=211, hidden_size=48, num_attention_heads=3, intermediate_size=80, num_hidden_layers=3),
    "few_buckets": dict(vocab_size=211, hidden_size=40, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2,
                        position_buckets=16, max_position_embeddings=64),
    "no_buckets": dict(vocab_size=211, hidden_size=16, num_attention_heads=1, intermediate_size=24, num_hidden_layers=2,
                       position_buckets=-1, max_position_embeddings=40),
}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def tiny(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return directory, make(directory, 0.3, **SHAPES[request.param])


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    directory = tmp_path_factory.mktemp("usual")
    return directory, make(directory, 0.3, **SHAPES["usual"])


def random_ids(seed: int, length: int, vocabulary: int = 211) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, length).tolist()


def random_pairs(seed: int, lengths: list[int]) -> list[dict]:
    generator = np.random.default_rng(seed)
    pairs = []
    for i, length in enumerate(lengths):
        source, left, right = (int(p) for p in np.sort(generator.choice(length, 3, replace=False)))
        pairs.append(dict(ids=random_ids(seed + 100 + i, length), source=source, left=left, right=right))
    return pairs


def test_configuration_of_pairrm_hf(usual, tmp_path):
    read = json.loads(run_tool(tmp_path, dict(op="config", model=str(usual[0])))[1])
    assert read == dict(vocabulary=211, hidden=48, intermediate=80, layers=3, heads=3, layer_norm_eps=1e-7, position_buckets=256,
                        max_relative_positions=512, padding_token=0, has_head=True, prefix_ids=[204, 205, 206, 207])


@pytest.mark.parametrize("buckets,positions", [(256, 512), (16, 64), (-1, 40), (32, 512), (64, 128)])
def test_relative_positions_are_transformers(buckets, positions, tmp_path):
    make(tmp_path, 0.1, **{**SHAPES["no_buckets"], "position_buckets": buckets, "max_position_embeddings": positions})
    distances = torch.arange(-4200, 4201)
    expected = distances
    if buckets > 0:
        expected = modeling_deberta_v2.make_log_bucket_position(distances, buckets, positions).long()
    span = buckets if buckets > 0 else positions
    expected = torch.clamp(expected + span, 0, 2 * span - 1)
    read = json.loads(run_tool(tmp_path, dict(op="positions", model=str(tmp_path), distances=distances.tolist()))[1])
    assert read["positions"] == expected.tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_hidden_states_at_all_lengths(tiny, engine, tmp_path):
    directory, model = tiny
    sequences = [random_ids(1, length) for length in (1, 2, 17, 63, 64, 65, 130, 511, 513, 2048)]
    sequences.append([0, 0, 7])  # padding tokens are tokens like others where there is no padding
    ours, _ = run_tool(tmp_path, dict(op="hidden", model=str(directory), engine=engine, sequences=sequences))
    with torch.no_grad():
        expected = torch.cat([model.hidden_states(ids) for ids in sequences]).numpy()
    assert np.abs(expected).max() > 2
    difference = np.abs(ours.reshape(expected.shape) - expected).max()
    print(f"{engine}: largest difference {difference:.2e} over {len(expected)} positions")
    assert difference < 5e-5  # attention of large scores over up to 2,048 tokens; the reference is f32 itself


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_do_not_depend_on_the_batch(usual, engine, tmp_path):
    directory, model = usual
    pairs = random_pairs(3, [5, 9, 40, 64, 65, 200, 3, 700, 31])
    request = dict(op="logits", model=str(directory), engine=engine)
    ours, _ = run_tool(tmp_path, dict(request, pairs=pairs, tokens_per_batch=4096))
    with torch.no_grad():
        expected = np.array([model.logit(pair).item() for pair in pairs])
    assert np.abs(expected).min() > 1e-3
    assert np.abs(ours - expected).max() < 2e-5
    for budget, chosen in ((1, pairs), (150, pairs), (4096, pairs[3:5]), (4096, list(reversed(pairs)))):
        some, _ = run_tool(tmp_path, dict(request, pairs=chosen, tokens_per_batch=budget))
        assert some.tolist() == [ours[pairs.index(pair)] for pair in chosen]


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_rounds_the_weights(usual, engine, tmp_path):
    directory, model = usual
    rounded = PairRM(model.pretrained_model.config).eval()
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    pairs = random_pairs(4, [60, 20])
    ours, _ = run_tool(tmp_path, dict(op="logits", model=str(directory), engine=engine, dtype="bf16", pairs=pairs))
    with torch.no_grad():
        expected = np.array([rounded.logit(pair).item() for pair in pairs])
        exact = np.array([model.logit(pair).item() for pair in pairs])
    assert np.abs(ours - expected).max() < 2e-5 < np.abs(exact - expected).max()


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients(tiny, engine, tmp_path):
    directory, model = tiny
    pairs = random_pairs(5, [7, 30, 70, 140])
    pairs[1]["ids"][4] = 0  # as an input, the padding token gets no gradient
    coefficients = [1.0, -0.7, 0.4, 1.3]
    ours, stdout = run_tool(tmp_path, dict(op="gradients", model=str(directory), engine=engine, pairs=pairs, batch=3,
                                           coefficients=coefficients))
    answer = json.loads(stdout)
    model.zero_grad()
    logits = torch.stack([model.logit(pair) for pair in pairs])
    assert np.abs(logits.detach().numpy() - answer["logits"]).max() < 2e-5
    (logits * torch.tensor(coefficients)).sum().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert {tensor["name"] for tensor in answer["tensors"]} == set(expected)
    assert not np.any(expected["pretrained_model.embeddings.word_embeddings.weight"][0])
    offset, worst = 0, ("", 0.0)
    for tensor in answer["tensors"]:
        reference = expected[tensor["name"]]
        assert list(reference.shape) == tensor["shape"]
        value = ours[offset:offset + reference.size].reshape(reference.shape)
        offset += reference.size
        if tensor["name"] == "head_layer.4.bias":  # left - right: it cancels
            assert abs(value[0]) < 1e-6
            continue
        norm = np.linalg.norm(reference)
        assert norm > 1e-4
        worst = max(worst, (tensor["name"], float(np.linalg.norm(value - reference) / norm)), key=lambda item: item[1])
    assert offset == ours.size
    print(f"{engine}: largest relative difference {worst[1]:.2e} in {worst[0]}")
    assert worst[1] <= 1e-4


def test_full_size(tmp_path):
    """DeBERTa-v3-large's shape (but for the vocabulary) on the engine that this machine takes."""
    model = make(tmp_path, 0.03, 0.1, vocab_size=1000, hidden_size=1024, num_attention_heads=16, intermediate_size=4096,
                 num_hidden_layers=24)
    sequences = [random_ids(seed, length, 1000) for seed, length in ((1, 1), (2, 40), (3, 100))]
    ours, _ = run_tool(tmp_path, dict(op="hidden", model=str(tmp_path), engine="auto", sequences=sequences))
    with torch.no_grad():
        expected = torch.cat([model.hidden_states(ids) for ids in sequences]).numpy()
    (tmp_path / "model.safetensors").unlink()  # 1.2 GB
    difference = np.abs(ours.reshape(expected.shape) - expected).max()
    print(f"largest difference {difference:.2e} over {len(expected)} positions")
    assert expected[1:41].std(axis=0).mean() > 0.2, "tokens should differ"
    assert difference < 1e-4


def ranker_config(**changes) -> dict:
    """What llm-blender writes beside its weights: no shapes."""
    return {"ranker_type": "pairranker", "model_type": "deberta", "model_name": "microsoft/deberta-v3-large", "cache_dir": None,
            "load_checkpoint": None, "source_maxlength": 1224, "candidate_maxlength": 412, "n_tasks": 1, "num_pos": 1, "num_neg": 1,
            "sub_sampling_mode": "all_pair", "sub_sampling_ratio": 0.4, "loss_type": "instructgpt", "reduce_type": "linear",
            "inference_mode": "bubble", "drop_out": 0.05, "fp16": True, **changes}


@pytest.fixture(scope="module")
def original_layout(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    model = make(directory, 0.2, vocab_size=99, hidden_size=128, num_attention_heads=2, intermediate_size=96, num_hidden_layers=2)
    (directory / "config.json").write_text(json.dumps(ranker_config()))
    return directory, model


def test_original_layout_without_shapes(original_layout, tmp_path):
    directory, model = original_layout
    read = json.loads(run_tool(tmp_path, dict(op="config", model=str(directory)))[1])
    assert read == dict(vocabulary=99, hidden=128, intermediate=96, layers=2, heads=2, layer_norm_eps=1e-7, position_buckets=256,
                        max_relative_positions=512, padding_token=0, has_head=True, prefix_ids=[-1] * 4)
    pairs = [dict(ids=random_ids(1, 30, 99), source=1, left=7, right=20)]
    ours, _ = run_tool(tmp_path, dict(op="logits", model=str(directory), pairs=pairs))
    with torch.no_grad():
        assert abs(model.logit(pairs[0]).item() - ours[0]) < 2e-5


def test_an_encoder_of_transformers_is_read_but_is_no_ranker(usual, tmp_path):
    directory, model = usual
    for kind, name in ((model.pretrained_model, "encoder"),
                       (transformers.DebertaV2ForMaskedLM(model.pretrained_model.config), "language_model")):
        kind.save_pretrained(tmp_path / name)
        read = json.loads(run_tool(tmp_path, dict(op="config", model=str(tmp_path / name)))[1])
        assert read["hidden"] == 48 and not read["has_head"]
        _, message = run_tool(tmp_path, dict(op="logits", model=str(tmp_path / name), pairs=[]), expect=78)
        assert "head_layer.1.weight" in message and "without the head" in message


def test_saved_weights_are_the_same(usual, tmp_path):
    directory, model = usual
    run_tool(tmp_path, dict(op="save", model=str(directory), to=str(tmp_path / "saved"), dtype="fp32"))
    ours = load_file(tmp_path / "saved" / "model.safetensors")
    theirs = model.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_longer_embedding_is_cut(usual, tmp_path):
    """DeBERTa has 128,100 rows for 128,001 tokens; PairRM's config names the tokenizer's number."""
    directory, _ = usual
    tensors = load_file(directory / "model.safetensors")
    name = "pretrained_model.embeddings.word_embeddings.weight"
    tensors[name] = torch.cat([tensors[name], torch.randn(5, 48)])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    request = dict(op="hidden", sequences=[[1, 210, 4]])
    ours, _ = run_tool(tmp_path, dict(request, model=str(tmp_path)))
    assert ours.tolist() == run_tool(tmp_path, dict(request, model=str(directory)))[0].tolist()


@pytest.mark.parametrize("key,value,word", [
    ("conv_kernel_size", 3, "conv_kernel_size"), ("position_biased_input", True, "position_biased_input"),
    ("type_vocab_size", 2, "type_vocab_size"), ("share_att_key", False, "share_att_key"), ("pos_att_type", "c2p", "pos_att_type"),
    ("hidden_act", "gelu_new", "hidden_act"), ("relative_attention", False, "relative_attention"), ("norm_rel_ebd", "none", "norm_rel_ebd"),
    ("model_type", "deberta", "model_type"), ("hidden_size", None, "hidden_size"), ("num_attention_heads", 5, "num_attention_heads"),
    ("n_tasks", 2, "n_tasks"), ("layer_norm_eps", "x", "layer_norm_eps"), ("position_buckets", 2000, "position_buckets")])
def test_unsupported_configurations_are_refused(usual, key, value, word, tmp_path):
    directory, _ = usual
    config = json.loads((directory / "config.json").read_text())
    config[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    os.link(directory / "model.safetensors", tmp_path / "model.safetensors")
    _, message = run_tool(tmp_path, dict(op="config", model=str(tmp_path)), expect=78)
    assert word in message and "config.json" in message


@pytest.mark.parametrize("changes,word", [(dict(ranker_type="summareranker"), "ranker_type"), (dict(n_tasks=2), "n_tasks"),
                                          (dict(model_name="roberta-large"), "model_name")])
def test_other_rankers_are_refused(original_layout, changes, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ranker_config(**changes)))
    os.link(original_layout[0] / "model.safetensors", tmp_path / "model.safetensors")
    _, message = run_tool(tmp_path, dict(op="config", model=str(tmp_path)), expect=78)
    assert word in message


def test_damaged_weights_give_nan_and_unknown_tokens_an_error(usual, tmp_path):
    directory, _ = usual
    tensors = load_file(directory / "model.safetensors")
    tensors["pretrained_model.encoder.layer.1.output.dense.weight"][3, 2] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    for engine in ENGINES:
        ours, _ = run_tool(tmp_path, dict(op="logits", model=str(tmp_path), engine=engine, pairs=random_pairs(1, [9, 70])))
        assert np.isnan(ours).all()
    pairs = [dict(ids=[1, 211, 3], source=0, left=1, right=2)]
    _, message = run_tool(tmp_path, dict(op="logits", model=str(directory), pairs=pairs), expect=65)
    assert "211" in message and "vocabulary" in message
    tensors.pop("pretrained_model.encoder.layer.2.output.dense.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    _, message = run_tool(tmp_path, dict(op="logits", model=str(tmp_path), pairs=pairs), expect=65)
    assert "layer.2.output.dense.bias" in message
