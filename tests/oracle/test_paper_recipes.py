"""The recipes of the paper in configs/, by selm_iter --dry-run: rows, steps, learning rates, shards, memory of the real shapes."""
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SELM_BIN_DIR", ROOT / "build" / "release" / "bin"))
RANKS = 64
GPUS, ACCUMULATION = 8, 4  # of the authors' runs

pytestmark = pytest.mark.skipif(not (BIN / "selm_iter").exists(), reason=f"the programs are not built in {BIN}")

# What the authors ran: portions, iterations, micro-batch per GPU, alpha, learning rates (the first of Zephyr is plain DPO).
PAPER = {
    "zephyr_7b": dict(shape="mistral_7b", rows=15283, micro=8, alpha=[0, 0.001, 0.001, 0.001], rates=[5e-7, 5e-7, 5e-7, 1e-7], steps=59,
                      warmup=6, parameters=7_241_732_096),
    "llama3_8b": dict(shape="llama3_8b", rows=20378, micro=4, alpha=[0.0001] * 3, rates=[5e-7, 3e-7, 1e-7], steps=159, warmup=16,
                      parameters=8_030_261_248),
    "phi3_mini": dict(shape="phi3_mini", rows=20378, micro=4, alpha=[0.001] * 3, rates=[5e-7, 3e-7, 1e-7], steps=159, warmup=16,
                      parameters=3_821_079_552),
}


def dry_run(recipe, *arguments):
    command = [str(BIN / "selm_iter"), "--config", f"configs/{recipe}.cfg", "--policy", f"configs/shapes/{PAPER[recipe]['shape']}",
               "--dry-run", "--format", "json", "--ranks", str(RANKS), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=PAPER)
def planned(request):
    """(recipe, its plan on 64 ranks of 4 nodes with the engine that keeps every weight once)."""
    return request.param, dry_run(request.param, "--ranks-per-node", 16, "--engine", "aten")


def phases(plan, name):
    return [phase for iteration in plan["iterations"] for phase in iteration["phases"] if phase["phase"] == name]


def authors_steps(rows, micro):
    """Trainer: the last micro-batch is filled up, an incomplete group of accumulated ones makes no step."""
    return math.ceil(rows / (micro * GPUS)) // ACCUMULATION


def test_rows_and_phases(planned):
    recipe, plan = planned
    paper = PAPER[recipe]
    iterations = len(paper["rates"])
    assert (plan["rows"], plan["rows_per_iteration"], plan["test_rows"]) == (61135, paper["rows"], 2000)
    assert plan["rows_unused"] == 61135 - iterations * paper["rows"]
    assert [iteration["rows"] for iteration in plan["iterations"]] == [[i * paper["rows"], (i + 1) * paper["rows"]]
                                                                       for i in range(iterations)]
    for i, iteration in enumerate(plan["iterations"]):
        assert [phase["phase"] for phase in iteration["phases"]] == ["generate", "rank", "logprob", "train", "test_generate", "test_rank"]
        offline = recipe == "zephyr_7b" and i == 0
        assert iteration["phases"][0].get("answers") == ("none" if offline else None)
        assert iteration["phases"][1]["update_rule"] == ("offline" if offline else "best-worst")
    assert plan["iterations"][1]["policy"] == "RUN/iter1/policy"


def test_steps_and_learning_rates(planned):
    recipe, plan = planned
    paper = PAPER[recipe]
    assert authors_steps(paper["rows"], paper["micro"]) == paper["steps"]
    for train, alpha, peak in zip(phases(plan, "train"), paper["alpha"], paper["rates"], strict=True):
        assert train["steps"] == paper["steps"]
        assert train["warmup_steps"] == paper["warmup"] == math.ceil(0.1 * paper["steps"])
        assert train["global_batch"] == paper["micro"] * GPUS * ACCUMULATION
        assert (train["alpha"], train["beta"]) == (alpha, 0.01)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
        scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, paper["warmup"], paper["steps"])
        expected = []
        for _ in range(paper["steps"]):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert train["learning_rates"] == pytest.approx(expected, rel=1e-12, abs=0)


def shape(recipe):
    return json.loads((ROOT / "configs" / "shapes" / PAPER[recipe]["shape"] / "config.json").read_text())


def test_shapes(planned):
    """The bundled shapes have the published numbers of parameters, also for transformers' own model (without memory)."""
    recipe, plan = planned
    assert plan["model"]["parameters"] == PAPER[recipe]["parameters"]
    config = transformers.AutoConfig.from_pretrained(ROOT / "configs" / "shapes" / PAPER[recipe]["shape"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PAPER[recipe]["parameters"]
    assert plan["model"]["saved_bytes"] == 2 * PAPER[recipe]["parameters"]


def units(recipe, bucket=2**28 // 4):
    """Elements of what is reduced together: the embedding, runs of a layer's parameters of at most a bucket, the last norm, the head."""
    c = shape(recipe)
    h, ffn = c["hidden_size"], c["intermediate_size"]
    d = h // c["num_attention_heads"]
    qkv = (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * d
    layer = []
    for parameter in (h, qkv * h, h * h, h, 2 * ffn * h, h * ffn):
        if not layer or layer[-1] + parameter > bucket:
            layer.append(0)
        layer[-1] += parameter
    return [c["vocab_size"] * h, *layer * c["num_hidden_layers"], h, c["vocab_size"] * h]


def test_shards(planned):
    recipe, plan = planned
    total = PAPER[recipe]["parameters"]  # every tensor of these shapes is a multiple of 64 elements
    shares = [math.ceil(math.ceil(unit / RANKS) / 64) * 64 for unit in units(recipe)]
    smallest = sum(max(0, unit - (RANKS - 1) * share) for unit, share in zip(units(recipe), shares))
    assert plan["shards"] == {"elements": total, "ranks": RANKS, "units": len(shares), "smallest": smallest, "largest": sum(shares)}


def test_memory(planned):
    """Bytes by hand: fp32 but for the embedding, which is bf16 where it is read alone. Ranks 16 to a node: shared parts count once."""
    recipe, plan = planned
    c = shape(recipe)
    total = PAPER[recipe]["parameters"]
    h, ffn, layers, vocabulary = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["vocab_size"]
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    d = h // heads
    qkv = (heads + 2 * kv) * d
    slots, prefill = 16, 256
    # A middle-ranked answer is not cut: prompt and three answers of 1024, and 1024 more.
    tokens = 4 * 1024
    shard = plan["shards"]["largest"]
    assert (plan["nodes"], plan["ranks_per_node"]) == (4, 16)
    memory = {phase["phase"]: phase for phase in plan["memory"]}

    def rope_tables(tokens):
        context = min(c["max_position_embeddings"], c.get("sliding_window") or tokens)
        return 4 * d * math.ceil(min(tokens, context) / 256) * 256

    def forward(tokens, scored):
        return 4 * (tokens * (2 * h + heads + qkv + heads * d + 3 * ffn) + scored * 2 * h) + rope_tables(tokens)

    read_only = 4 * (total - vocabulary * h) + 2 * vocabulary * h
    assert memory["generate"]["per_node"] == {"weights": read_only}
    assert memory["generate"]["per_rank"] == {"keys and values": 4 * slots * 2 * layers * kv * d * (512 + 1024),
                                              "activations": forward(slots + prefill, slots), "logits": 4 * slots * vocabulary}
    assert memory["logprob"]["per_node"] == {"weights": read_only}
    assert memory["logprob"]["per_rank"] == {"activations": forward(tokens, tokens)}
    linear = layers * (qkv * h + h * heads * d + 2 * ffn * h + h * ffn) + vocabulary * h
    saved = 2 * h + heads + 2 + qkv + heads * d + 2 * ffn
    working = 2 * h + max(ffn, qkv) + max(ffn, heads * d)
    assert memory["train"]["per_node"] == {"parameters": 4 * total, "packed weights": 4 * linear}
    # Two neighbours are reduced at once at most: what arrives of each, and its sum. Units beyond a bucket go in rounds.
    moved = [0 if unit > 2**28 // 4 else unit + math.ceil(math.ceil(unit / RANKS) / 64) * 64 for unit in units(recipe)]
    in_flight = max(a + b for a, b in zip(moved, [*moved[1:], 0]))
    assert memory["train"]["per_rank"] == {
        "gradients": 4 * (total + shard + in_flight),
        "optimizer state": 3 * 4 * shard,  # master weights and two moments
        "activations": 4 * (tokens * (layers * saved + working) + tokens * (4 * h + 1)) + rope_tables(tokens),
    }
    for phase in memory.values():
        rank, node = sum(phase["per_rank"].values()), sum(phase["per_node"].values())
        assert (phase["rank_bytes"], phase["node_bytes"]) == (rank, node + 16 * rank)


def test_inputs_that_are_not_at_hand_are_named(planned):
    recipe, plan = planned
    assert {one["what"] for one in plan["inputs"] if not one["present"]} == {"train", "test", "policy weights", "policy tokenizer",
                                                                             "ranker pairrm"}


def test_a_recipe_that_cannot_run_is_refused():
    command = [str(BIN / "selm_iter"), "--config", "configs/phi3_mini.cfg", "--policy", "configs/shapes/phi3_mini", "--dry-run"]
    for arguments, code, message in ((["--max-length", "2048"], 78, "max-length 2048 is beyond the context"),  # the sliding window
                                     (["--ranks", "64", "--ranks-per-node", "1", "--node-memory", "48"], 78, "train needs"),
                                     (["--zero", "4"], 64, "--zero 4 is not known"),
                                     (["--rows-total", "1000"], 65, "asks for more than the 1000 rows")):
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert result.returncode == code, result.stderr
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1 and not result.stdout
