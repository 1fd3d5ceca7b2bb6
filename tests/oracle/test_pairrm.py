"""PairRM against independent implementations: the tokenizer against transformers' conversion of the same SentencePiece
model; logits, scores and ranks against reference_pairrm.py (PyTorch on transformers' DebertaV2Model)."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")
np = pytest.importorskip("numpy")
h5py = pytest.importorskip("h5py")
tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")

import pairrm_checkpoint as checkpoints  # noqa: E402 (imports what is checked above)
import reference_pairrm  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SELM_BIN_DIR", ROOT / "build" / "release" / "bin"))
TOOLS = Path(os.environ.get("SELM_TOOL_DIR", ROOT / "build" / "release" / "tests"))
PIECES = 1200

NASTY = [
    "", " ", "  ", "\t", "\n\n x", "a\r\nb\r\n\r\nc", "\u0085x\u0085", " \u3000x\u3000 ", "zero\u200bwidth\u200d\ufeff", "a\x00b\x00", "\x7f\x80\x9f",
    "\ufffd\ufffe\U0010ffff", "\u2581a\u2581\u2581b", "a\u2581", "<0x0A>", "<0x41>b", "[SEP]", "[SEP][SEP] [ SEP ]", "x[CLS]y[UNK]z[MASK][PAD]",
    "ﬁ\u0301x", ">\u0338= =\u0338", "e\u0301\u0323", "Z̷̧̢a̶l̵g̸o̴", "½⁄ ㎏ ㍿ ㌀ ｶﾞ", "\u1100\u1161\u11a8 각 각", "\u0958 क्षत्रिय हिन्दी", "ไทยไม่มีช่องว่าง",
    "中文分词，没有空格。", "👩‍👩‍👧‍👦 🏳️‍🌈🇩🇪🇫🇷🇩 family", "ＦＵＬＬ　ｗｉｄｔｈ", "Ⅻ ①② x²", "\u202eabc\u202c\u00ad", "a" * 300, "!" * 200, "word " * 500,
    "文" * 50 + "a" + "字" * 50, "def f(x):\n\treturn x**2  # sq\n\n\n", "İı ẞß", " 1,000.00 ",
]


def nasty_texts() -> list[str]:
    texts = NASTY + [prefix + text for prefix in checkpoints.PREFIXES for text in ["", " ", "x", "\n\nHi", "  a  b "]]
    texts += [before + token + after for token in [*checkpoints.PREFIXES, *checkpoints.SPECIALS, "[MASK]"] for before in ["x ", "  ", "y\n"]
              for after in [" z", "", "\u0301q", "\u0338 >"]]
    ranges = [(0, 0x250), (0x300, 0x370), (0x900, 0x980), (0x1100, 0x1200), (0x2000, 0x2100), (0x3000, 0x3100), (0xFB00, 0xFB20),
              (0xFF00, 0xFFEF), (0x1F1E6, 0x1F200), (0x1F300, 0x1F400), (0x200D, 0x200E), (0xFE0F, 0xFE10)]
    characters = [chr(code) for begin, end in ranges for code in range(begin, end)]
    draw = random.Random(1)
    return texts + ["".join(draw.choice(characters) for _ in range(draw.randrange(1, 40))) for _ in range(1500)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "spm.model"
    checkpoints.train_sentencepiece(path, PIECES)
    return path


def encode(directory: Path, texts: list[str]) -> list[list[int]]:
    requests = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    result = subprocess.run([TOOLS / "selm_unigram_tool", directory], input=requests, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["ids"] for line in result.stdout.splitlines()]


@pytest.mark.parametrize("files, normalized", [(("json", "spm"), True), (("json",), False), (("spm",), False)])
def test_unigram_ids_equal_transformers(model, tmp_path, files, normalized):
    """normalized: are the prefix tokens looked for in the normalised text? Both occur; tokenizer.json says which."""
    reference = checkpoints.make_tokenizer(tmp_path, model=model, normalized=normalized, files=files)
    assert [reference.token_to_id(token) for token in checkpoints.SPECIALS] == [0, 1, 2, 3]
    assert reference.token_to_id("[MASK]") == PIECES and reference.token_to_id("<|candidate|>") == PIECES + 4
    rows = checkpoints.sample_rows(0, 1000 if normalized else 200)
    texts = [text for row in rows for text in checkpoints.row_texts(row)] + nasty_texts()

    ours = encode(tmp_path, texts)

    expected = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
    wrong = [(text, theirs, mine) for text, theirs, mine in zip(texts, expected, ours, strict=True) if theirs != mine]
    assert not wrong, wrong[0]
    assert sum(3 in ids for ids in ours) > 500  # unknown characters occur


# --- ranking -----------------------------------------------------------------------------------------------------------

SOURCE, CANDIDATE = 150, 60  # lengths at which some of these rows' texts are cut and others are not
ROWS = 32


def run(*command, expect=0, **more) -> str:
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
                   "OMPI_MCA_mpi_yield_when_idle": "1"}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, env=environment, **more)
    assert result.returncode == expect, result.stderr
    return result.stdout + result.stderr


def mpirun(ranks: int) -> list:
    return [os.environ.get("SELM_MPIEXEC", "mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Sample rows; generated answers that are empty, equal to others, 100 KB long or hold a literal token."""
    source = checkpoints.sample_rows(0, ROWS)
    found = []
    for i, row in enumerate(source):
        prompt, chosen, rejected = checkpoints.row_texts(row)
        if i == 5:  # three equal candidates
            row["rejected"][-1]["content"] = rejected = chosen
        generated = ["", chosen, rejected[:300].strip(), "I would rather not say.", source[i - 1]["chosen"][-1]["content"],
                     "so [SEP] be it", "中文 \u2022 " * 9, rejected][i % 8]
        if i == 5:
            generated = chosen
        if i == 9:
            generated = "It is long. " * (100_000 // 12)
        found.append(dict(id=row["prompt_id"], line=json.dumps(row), prompt=prompt, answers=[generated, chosen, rejected]))
    return found


@pytest.fixture(scope="module")
def iteration(rows, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("rows")
    (directory / "rows.jsonl").write_text("".join(row["line"] + "\n" for row in rows), encoding="utf-8")
    (directory / "answers.jsonl").write_text("".join(json.dumps({"prompt_id": row["id"], "response": row["answers"][0]}) + "\n"
                                                     for row in rows), encoding="utf-8")
    run(BIN / "selm_import", "--input", directory / "rows.jsonl", "--output", directory / "prefs.h5", "--on-empty-answer", "keep")
    run(BIN / "selm_gen", "--data", directory / "prefs.h5", "--responses", directory / "answers.jsonl", "--output", directory / "iter.h5")
    return directory / "iter.h5"


def make_ranker(directory: Path, model: Path, layout: str):
    tokenizer = checkpoints.make_ranker(directory, model=model, layout=layout, source=SOURCE, candidate=CANDIDATE, seed=7)
    return reference_pairrm.PairRm(directory, tokenizer, SOURCE, CANDIDATE)


def rank(iteration: Path, copy: Path, *rankers: str, ranks=1, expect=0, arguments=()) -> str:
    shutil.copy(iteration, copy)
    words = [word for ranker in rankers for word in ("--ranker", ranker)]
    return run(*mpirun(ranks), BIN / "selm_rank", "--iter", copy, *words, "--progress", "off", *arguments, expect=expect)


@pytest.mark.parametrize("mode, layout", [("per-row", "hf"), ("blender", "original")])
def test_ranking_equals_reference(model, rows, iteration, tmp_path, mode, layout):
    reference = make_ranker(tmp_path / "ranker", model, layout)
    logits, scores, ranks, lengths = (part.numpy() if torch.is_tensor(part) else part for part in reference.rank(rows, mode))
    assert max(lengths) == SOURCE + 2 * CANDIDATE and min(lengths) < SOURCE
    assert np.abs(scores[:, 0] - scores[:, 1]).mean() > 0.05  # weights of zero would agree with anything

    digests, files = set(), []
    for np_ranks in (1, 2, 3, 4) if mode == "per-row" else (1, 4):
        files.append(tmp_path / f"np{np_ranks}.h5")
        rank(iteration, files[-1], f"pairrm:{tmp_path / 'ranker'}", ranks=np_ranks, arguments=("--rank-mode", mode))
        digests.add(run(BIN / "selm_inspect", "--digest", files[-1]).split()[-1])
    assert len(digests) == 1
    assert "verified" in run(BIN / "selm_inspect", "--verify", files[0])

    with h5py.File(files[0]) as file:
        ours = {name: file[f"ranking/{name}"][:] for name in ("scores", "ranks", "rankers/pairrm/scores", "rankers/pairrm/logits")}
        best, worst = file["pairs/best"][:], file["pairs/worst"][:]
    difference = np.abs(ours["rankers/pairrm/logits"] - logits).max()
    print(f"{mode}: largest difference of logits {difference:.1e}, logits from {logits.min():.2f} to {logits.max():.2f}")
    assert difference < 1e-4
    assert np.array_equal(ours["scores"], ours["rankers/pairrm/scores"])
    assert np.abs(ours["scores"] - scores).max() < 2e-4
    gaps = np.abs(scores[:, :, None] - scores[:, None, :]) + 10 * np.eye(3)
    close = ((gaps > 0) & (gaps < 1e-4)).any((1, 2))  # exact ties are of candidates with equal tokens, and must be ties here
    print(f"{mode}: {close.sum()} rows with scores closer than 1e-4")
    assert close.sum() <= 2
    assert np.array_equal(ours["ranks"][~close], ranks[~close])
    assert np.array_equal(best[~close], ranks[~close].argmin(1)) and np.array_equal(worst[~close], ranks[~close].argmax(1))
    assert list(ours["ranks"][5]) == [1, 1, 1] and (best[5], worst[5]) == (0, 0)  # three equal candidates


def test_ensemble_is_the_mean_of_standardised_scores(model, rows, iteration, tmp_path):
    for seed in (7, 8):
        checkpoints.make_ranker(tmp_path / f"ranker{seed}", model=model, layout="hf", source=SOURCE, candidate=CANDIDATE, seed=seed)

    rank(iteration, tmp_path / "both.h5", f"pairrm:{tmp_path / 'ranker7'}", f"pairrm:{tmp_path / 'ranker8'}", ranks=2)

    with h5py.File(tmp_path / "both.h5") as file:
        each = [file[f"ranking/rankers/{name}/scores"][:] for name in ("pairrm", "pairrm_2")]
        assert not np.array_equal(file["ranking/rankers/pairrm/logits"][:], file["ranking/rankers/pairrm_2/logits"][:])
        mean = file["ranking/scores"][:]
    expected = sum((scores - scores.mean()) / scores.std() for scores in each) / 2
    assert np.abs(mean - expected).max() < 1e-9


def test_held_out_answers_are_compared_with_the_data_sets(model, iteration, tmp_path):
    checkpoints.make_ranker(tmp_path / "ranker", model=model, layout="hf", source=SOURCE, candidate=CANDIDATE, seed=7)
    rank(iteration, tmp_path / "all.h5", f"pairrm:{tmp_path / 'ranker'}")
    rank(iteration, tmp_path / "held.h5", f"pairrm:{tmp_path / 'ranker'}", arguments=("--generated-only", "on"))

    assert "verified" in run(BIN / "selm_inspect", "--verify", tmp_path / "held.h5")
    with h5py.File(tmp_path / "all.h5") as every, h5py.File(tmp_path / "held.h5") as held:
        assert np.array_equal(held["ranking/scores"][:, 0], every["ranking/scores"][:, 0])
        assert np.isnan(held["ranking/scores"][:, 1:]).all()


def test_directories_that_are_no_pairrm_are_refused(model, iteration, tmp_path):
    tokenizer = checkpoints.make_ranker(tmp_path / "good", model=model, layout="hf", source=SOURCE, candidate=CANDIDATE, seed=7)
    weights = checkpoints.make_weights(checkpoints.len_of(tokenizer), 7)

    def refused(change, code: int, *words: str) -> None:
        directory = tmp_path / "bad"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "good", directory)
        change(directory)
        message = rank(iteration, tmp_path / "copy.h5", f"pairrm:{directory}", ranks=2, expect=code)
        assert message.count("error") == 1 and all(word in message for word in words), message

    def headless(directory):
        checkpoints.save_weights(directory, {name: value for name, value in weights.items() if not name.startswith("head")})

    def without_token(directory):
        data = json.loads((directory / "tokenizer.json").read_text())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<|candidate2|>"]
        (directory / "tokenizer.json").write_text(json.dumps(data))
        (directory / "added_tokens.json").unlink()

    def smaller_vocabulary(directory):
        name = "pretrained_model.embeddings.word_embeddings.weight"
        checkpoints.save_weights(directory, weights | {name: weights[name][:-2].contiguous()})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 2}))

    def not_finite(directory):
        name = "pretrained_model.encoder.layer.1.output.dense.bias"
        checkpoints.save_weights(directory, weights | {name: weights[name] * float("nan")})

    def reward_model(directory):
        (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama",
                                                           "hidden_size": 128, "num_hidden_layers": 2}))

    refused(headless, 78, "no PairRM", "head")
    refused(without_token, 78, "<|candidate2|>")
    refused(smaller_vocabulary, 78, "do not belong together")
    refused(not_finite, 65, "non-finite", "row")
    refused(reward_model, 78, "model_type", "llama")
    refused(lambda directory: (directory / "model.safetensors").unlink(), 78, "model.safetensors")
    refused(lambda directory: (directory / "tokenizer.json").unlink() or (directory / "spm.model").unlink(), 78, "tokenizer.json")


def test_blender_mode_is_for_pairwise_rankers(iteration, tmp_path):
    message = rank(iteration, tmp_path / "copy.h5", f"file:{tmp_path}", expect=64, arguments=("--rank-mode", "blender"))
    assert "pairrm" in message


# --- training ----------------------------------------------------------------------------------------------------------

SEED, BATCH, RATE = 42, 4, 1e-3


def train(prefs: Path, start: Path, output: Path, *arguments, rate=RATE, ranks=1, expect=0) -> str:
    return run(*mpirun(ranks), BIN / "selm_train", "--objective", "pairrm", "--data", prefs, "--policy", start, "--output", output, "--dtype", "fp32",
               "--save-dtype", "fp32", "--schedule", "constant", "--warmup-ratio", "0", "--shuffle", "off", "--global-batch", BATCH, "--progress", "off",
               "--learning-rate", rate, "--tokens-per-microbatch", 600, *arguments, expect=expect)


@pytest.mark.parametrize("files", [("json", "spm"), ("spm",)])
def test_training_starts_from_a_plain_encoder(model, rows, iteration, tmp_path, files):
    """A DeBERTa-v2 directory: no head, no prefix tokens. With a learning rate of 0 the start values are what is saved."""
    start, output = tmp_path / "deberta", tmp_path / "ranker"
    tokenizer = checkpoints.make_tokenizer(start, model=model, normalized=False, files=files)
    if "json" in files:
        data = json.loads((start / "tokenizer.json").read_text(encoding="utf-8"))
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in checkpoints.PREFIXES]
        (start / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (start / "added_tokens.json").unlink()
    whole = checkpoints.make_weights(PIECES + 3, 9)  # rows for [MASK] and two tokens more; four are needed
    weights = {name.replace("pretrained_model.", "deberta."): value for name, value in whole.items() if not name.startswith("head")}
    checkpoints.save_weights(start, weights)
    lengths = {"source_maxlength": SOURCE, "candidate_maxlength": CANDIDATE}
    (start / "config.json").write_text(json.dumps(checkpoints.encoder_config(PIECES + 3).to_dict() | lengths), encoding="utf-8")

    train(iteration.parent / "prefs.h5", start, output, "--rows", "0:4", rate=0)

    from safetensors.torch import load_file
    saved = load_file(output / "model.safetensors")
    embedding = "embeddings.word_embeddings.weight"
    assert torch.equal(saved["pretrained_model." + embedding][:PIECES + 3], weights["deberta." + embedding])
    assert 0.015 < saved["pretrained_model." + embedding][PIECES + 3:].std() < 0.025 and len(saved["pretrained_model." + embedding]) == PIECES + 5
    assert all(torch.equal(value, saved[name.replace("deberta.", "pretrained_model.")]) for name, value in weights.items() if embedding not in name)
    assert 0.015 < saved["head_layer.1.weight"].std() < 0.025 and not saved["head_layer.1.bias"].any()
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["DebertaV2PairRM"] and config["cand2_prefix_id"] == tokenizer.token_to_id("<|candidate2|>")
    assert config["vocab_size"] == PIECES + 5 and json.loads((output / "added_tokens.json").read_text())["[MASK]"] == PIECES
    if "json" in files:
        assert tokenizers.Tokenizer.from_file(str(output / "tokenizer.json")).get_vocab() == tokenizer.get_vocab()
    reference = reference_pairrm.PairRm(output, tokenizer, SOURCE, CANDIDATE)
    logits, _, _, _ = reference.rank(rows[:8], "per-row")
    rank(iteration, tmp_path / "ranked.h5", f"pairrm:{output}")
    with h5py.File(tmp_path / "ranked.h5") as file:
        assert np.abs(file["ranking/rankers/pairrm/logits"][:8] - logits.numpy()).max() < 1e-4


def test_training_equals_pytorch(model, rows, iteration, tmp_path):
    prefs = iteration.parent / "prefs.h5"
    tokenizer = checkpoints.make_ranker(tmp_path / "start", model=model, layout="hf", source=SOURCE, candidate=CANDIDATE, seed=9)

    first, last, epochs = 2, 10, 2
    arguments = ("--rows", f"{first}:{last}", "--epochs", epochs)
    train(prefs, tmp_path / "start", tmp_path / "trained", *arguments, "--max-steps", "1", ranks=2, expect=75)
    with h5py.File(tmp_path / "trained" / "checkpoints" / "step-000001.h5") as file:
        found = {name: file[f"parameters/{name}/exp_avg"][:] / (1 - 0.9) for name in file["parameters"]}

    reference = reference_pairrm.PairRm(tmp_path / "start", tokenizer, SOURCE, CANDIDATE)
    optimizer = torch.optim.AdamW(reference.parameters().values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    losses = []
    for epoch in range(epochs):
        for begin in range(first, last, BATCH):
            optimizer.zero_grad()
            loss = reference_pairrm.training_loss(reference, {i: rows[i] for i in range(begin, begin + BATCH)}, SEED, epoch)
            loss.backward()
            if not losses:
                expected = {name: value.grad.numpy().copy() for name, value in reference.parameters().items()}
            losses.append(loss.item())
            optimizer.step()

    assert set(found) == set(expected)
    worst = max((np.abs(found[name].reshape(expected[name].shape) - expected[name]).max() / np.abs(expected[name]).max(), name)
                for name in found if np.abs(expected[name]).max() > 1e-9)
    print(f"largest difference of a gradient, of the tensor's largest: {worst[0]:.1e} in {worst[1]}")
    assert worst[0] < 1e-3
    sides = {reference_pairrm.chosen_is_left(SEED, epoch, row) for epoch in range(epochs) for row in range(first, last)}
    assert sides == {True, False}

    train(prefs, tmp_path / "start", tmp_path / "trained", *arguments, ranks=3)  # goes on from the checkpoint
    metrics = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    print("losses", [line["loss"] for line in metrics], "PyTorch", losses)
    assert len(metrics) == len(losses) and np.abs(np.array([line["loss"] for line in metrics]) - losses).max() < 2e-3
    assert max(losses) - min(losses) > 0.02  # the weights move
    trained = reference_pairrm.PairRm(tmp_path / "trained", tokenizer, SOURCE, CANDIDATE)  # the originals' layout: loads strictly
    logits, scores, _, _ = trained.rank(rows, "per-row")
    rank(iteration, tmp_path / "ranked.h5", f"pairrm:{tmp_path / 'trained'}")
    with h5py.File(tmp_path / "ranked.h5") as file:
        assert np.abs(file["ranking/rankers/pairrm/logits"][:] - logits.numpy()).max() < 1e-4
