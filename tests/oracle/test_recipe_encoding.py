"""--encoding recipe: token ids, label starts and cuts against the authors' steps in Python (reference_recipe.py), and
log-probs and gradients of these ids against padded PyTorch."""
import json
import os
import subprocess
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
h5py = pytest.importorskip("h5py")

import real_tokenizers as real  # noqa: E402  (beside this file)
import reference_training as reference  # noqa: E402
import test_training as training  # noqa: E402
from reference_recipe import RecipeEncoding  # noqa: E402

BIN, SMOLLM2, SAMPLE = training.BIN, training.SMOLLM2, training.SAMPLE
run, run_ok = training.run, training.run_ok
pytestmark = [training.pytestmark, training.needs_smollm2]

# The format of Phi-3's first revision: <s> before an answer, no header.
PHI3_TEMPLATE = ("{{ '<s>' }}{% for m in messages %}{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' "
                 "if m['role'] == 'user' else m['content'] + '<|end|>\n' }}{% endfor %}")


class Tokens:
    """A tokenizer directory, its Python reference and the options that selm_inspect needs for it."""

    def __init__(self, name, directory):
        self.directory, self.options, template = directory, [], None
        if name == "smollm2":
            self.directory = SMOLLM2
            tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
        else:
            make, format_name, template, bos, eos = {
                "llama3": (real.make_llama3, "llama3", real.LLAMA3_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>"),
                "mistral": (real.make_mistral, "zephyr", real.ZEPHYR_TEMPLATE, "<s>", "</s>")}[name]
            make(directory)
            (directory / "tokenizer_config.json").unlink()  # tokenizer.json alone: BOS and EOS are the format's
            self.options = ["--chat-format", format_name]
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), bos_token=bos, eos_token=eos)
        self.reference = RecipeEncoding(tokenizer, 1024, 512, template=template)


@pytest.fixture(scope="module")
def prefs(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "prefs.h5"
    run_ok("selm_import", "--input", SAMPLE, "--output", path, "--on-empty-answer", "keep")
    with SAMPLE.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return path, [(row["chosen"][:-1], row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]


@pytest.fixture(scope="module", params=["smollm2", "llama3", "mistral"])
def tokens(request, prefs, tmp_path_factory):
    made = Tokens(request.param, tmp_path_factory.mktemp(request.param))
    made.reference.tokenize_ahead(prefs[1])
    return made


def encode(file, directory, limits, *options, encoding="recipe"):
    output = run_ok("selm_inspect", file, "--encode", directory, "--encoding", encoding, "--max-length", limits[0],
                    "--max-prompt-length", limits[1], *options)
    return [json.loads(line) for line in output.splitlines()]


def check_lines(lines, wanted, tokenizer, pieces=False):
    assert len(lines) == len(wanted)
    for line, row in zip(lines, wanted):
        assert line.keys() - {"row"} == row.keys(), line["row"]
        for name, sequence in row.items():
            found = line[name]
            assert found["label_start"] == len(sequence[0]), (line["row"], name)
            assert found["ids"] == sequence[0] + sequence[1], (line["row"], name)
            assert len(found["pieces"]) == len(found["ids"])
            if pieces:
                assert found["pieces"] == tokenizer.convert_ids_to_tokens(found["ids"]), (line["row"], name)


def kinds_of_cuts(unlimited, rows):
    """How often each thing happened to a sequence: (whole, prompt cut, answer cut, long prompt left whole)."""
    counts = dict(whole=0, prompt=0, answer=0, both=0)
    for free, row in zip(unlimited, rows):
        for name, (prompt, answer) in row.items():
            cut = (len(prompt) < len(free[name][0]), len(answer) < len(free[name][1]))
            counts[{(False, False): "whole", (True, False): "prompt", (False, True): "answer", (True, True): "both"}[cut]] += 1
    return counts


LIMITS = ((1024, 512), (160, 90), (400, 350))


def test_all_rows_under_every_limit(prefs, tokens):
    path, rows = prefs
    unlimited = [tokens.reference.with_limits(1 << 40, 1 << 39).row(*row) for row in rows]
    seen = dict(whole=0, prompt=0, answer=0, both=0)
    for limits in LIMITS if tokens.directory == SMOLLM2 else LIMITS[:2]:
        wanted = [tokens.reference.with_limits(*limits).row(*row) for row in rows]
        lines = encode(path, tokens.directory, limits, *tokens.options)
        assert [line["row"] for line in lines] == list(range(1000))
        check_lines(lines, wanted, tokens.reference.tokenizer, pieces=limits == (1024, 512))
        lengths = [len(prompt) + len(answer) for row in wanted for prompt, answer in row.values()]
        assert max(lengths) == limits[0]
        for kind, count in kinds_of_cuts(unlimited, wanted).items():
            seen[kind] += count
    print(seen)
    assert all(count >= 20 for count in seen.values()), seen
    first = wanted[0]["chosen"]
    assert first[1][0] != tokens.reference.eos and unlimited[0]["chosen"][1][-1] == tokens.reference.eos
    assert unlimited[0]["chosen"][0][0] == tokens.reference.bos


def test_a_sentencepiece_model_alone(prefs, tmp_path):
    """A directory with nothing but tokenizer.model gives what a tokenizer.json gives whose merges go by the model's scores
    (transformers 5 orders them by id: runs of spaces come out otherwise)."""
    for directory in (real.make_mistral(tmp_path / "json"), real.make_mistral(tmp_path / "model", "model")):
        (directory / "tokenizer_config.json").unlink()
    pieces = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(real.mistral_file()))
    content = json.loads((tmp_path / "json" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].sort(key=lambda merge: -pieces.get_score(pieces.piece_to_id("".join(merge))))
    (tmp_path / "json" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    one, other = (encode(prefs[0], tmp_path / kind, (600, 300), "--chat-format", "zephyr", "--rows", "100:200")
                  for kind in ("json", "model"))
    assert len(one) == 100 and one == other


def test_generation_prompts(prefs, tokens):
    """With the generation header and the tokenizer's own tokens around: Llama-3's BOS is there twice."""
    rows = prefs[1][:200]
    texts = [tokens.reference.render(messages, header=True) for messages, _, _ in rows]
    wanted = tokens.reference.tokenizer(texts)["input_ids"]
    requests = "".join(json.dumps({"op": "recipe_prompt", "messages": messages, **({"format": tokens.options[1]} if tokens.options else {})})
                       + "\n" for messages, _, _ in rows)
    tool = Path(os.environ.get("SELM_TOOL_DIR", BIN.parent / "tests")) / "selm_tokenize_tool"
    result = subprocess.run([str(tool), str(tokens.directory)], input=requests, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["ids"] for line in result.stdout.splitlines()] == wanted
    if "llama3" in tokens.options:
        assert all(ids[:2] == [128000, 128000] for ids in wanted)


def test_named_bos_and_eos(prefs):
    path, rows = prefs
    encoding = RecipeEncoding(transformers.AutoTokenizer.from_pretrained(SMOLLM2), 200, 100, bos=7, eos=0)
    encoding.tokenize_ahead(rows[10:30])
    lines = encode(path, SMOLLM2, (200, 100), "--bos-token", 7, "--eos-token", "<|endoftext|>", "--rows", "10:30")
    assert [line["row"] for line in lines] == list(range(10, 30))
    check_lines(lines, [encoding.row(*row) for row in rows[10:30]], encoding.tokenizer)


def test_chat_encoding(prefs):
    path, rows = prefs
    chat = reference.Encoding(transformers.AutoTokenizer.from_pretrained(SMOLLM2), 256, 128)
    wanted = [chat.training_row({"messages": messages, "best": chosen, "worst": rejected, "generated": None})
              for messages, chosen, rejected in rows[:50]]
    wanted = [{"chosen": row["best"], "rejected": row["worst"]} for row in wanted]
    check_lines(encode(path, SMOLLM2, (256, 128), "--rows", ":50", encoding="chat"), wanted, chat.tokenizer, pieces=True)


def test_what_cannot_be_encoded_is_refused(prefs, tmp_path):
    path, _ = prefs
    for arguments, code, words in (
        (["--encode", tmp_path / "nowhere"], 78, "nowhere"),
        (["--encode", SMOLLM2, "--rows", "0:2000"], 64, "0:2000"),
        (["--encode", SMOLLM2, "--encoding", "recipe", "--eos-token", "<|nothing|>"], 78, "<|nothing|>"),
        (["--encode", SMOLLM2, "--eos-token", "2"], 64, "--eos-token"),
        (["--rows", "0:2"], 64, "--encode"),
    ):
        result = run("selm_inspect", path, *arguments)
        assert result.returncode == code and words in result.stderr, (arguments, result.stderr)


# ----------------------------------------------------------------------- rows with generated answers, and a tiny model

LONG = " ".join(f"word{i}" for i in range(24))
# prompt, chosen, rejected, generated, scores [generated, chosen, rejected]. Before an answer that begins with Q the prompt's
# last token merges with it.
CASES = [
    ("short", "Q merges", "does not", "Q merges too", [2, 3, 1]),
    ("short", "plain", "Q merges", LONG, [2, 1, 3]),                     # a middle answer beyond the context
    ("short", "plain", "other", LONG, [3, 2, 1]),                        # the same as best: it is cut
    ("short", LONG, "other", LONG, [3, 3, 1]),                           # equal to best
    (LONG + LONG, "Q " + LONG, "no " + LONG, "and no " + LONG, [2, 3, 1]),  # prompts of other lengths, cut: nothing in common
    (LONG, "a", "b", "c", [1, 1, 1]),                                    # best and worst are the same
    ("short", "plain", "Q other", "yet another", [3, 2, 1]),
]
TINY_LIMITS = (96, 30)
CONTEXT = 112


def make_merging_tokenizer(path):
    """The tiny byte-level tokenizer in which a newline merges with "<s>Q" behind it, but not with "<s>" alone."""
    content = json.loads((training.ROOT / "tests" / "data" / "tiny_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in content["model"]["vocab"]]
    for new_id, (left, right) in enumerate((("<", "s"), ("<s", ">"), ("<s>", "Q"), ("Ċ", "<s>Q")), len(content["model"]["vocab"])):
        content["model"]["merges"].append(f"{left} {right}")
        content["model"]["vocab"][left + right] = new_id
    path.write_text(json.dumps(content), encoding="utf-8")


class TinyRows:
    """CASES ranked in an iter.h5, with a random model that has this tokenizer and the format of Phi-3's first revision."""

    def __init__(self, directory):
        self.directory, self.model, self.iter_h5 = directory, directory / "model", directory / "iter.h5"
        torch.manual_seed(5)
        config = transformers.LlamaConfig(vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
                                          initializer_range=0.2, bos_token_id=1, eos_token_id=2)
        transformers.LlamaForCausalLM(config).float().save_pretrained(self.model)
        make_merging_tokenizer(self.model / "tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(self.model / "tokenizer.json"))
        self.encoding = RecipeEncoding(tokenizer, *TINY_LIMITS, bos=1, eos=2, template=PHI3_TEMPLATE)
        self.limits = ["--max-length", TINY_LIMITS[0], "--max-prompt-length", TINY_LIMITS[1]]
        self.names = ["--encoding", "recipe", "--chat-format", "phi3-2024-04", "--bos-token", 1, "--eos-token", "<|im_end|>"]
        self.common = ["--dtype", "fp32", "--progress", "off", *self.names, *self.limits]
        self.rows = []
        lines, answers, scores = [], [], []
        for i, (prompt, chosen, rejected, generated, given) in enumerate(CASES):
            user = {"role": "user", "content": prompt}
            lines.append({"prompt_id": f"id{i}", "prompt": prompt, "chosen": [user, {"role": "assistant", "content": chosen}],
                          "rejected": [user, {"role": "assistant", "content": rejected}]})
            scores.append({"prompt_id": f"id{i}", "scores": given})
            answers.append({"prompt_id": f"id{i}", "response": generated})
            candidates = [generated, chosen, rejected]
            self.rows.append({"messages": [user], "best": candidates[int(np.argmax(given))], "worst": candidates[int(np.argmin(given))],
                              "generated": generated, "chosen": chosen, "rejected": rejected})
        for name, entries in (("rows", lines), ("answers", answers), ("scores", scores)):
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        run_ok("selm_import", "--input", directory / "rows.jsonl", "--output", directory / "prefs.h5")
        run_ok("selm_gen", "--data", directory / "prefs.h5", "--output", self.iter_h5, "--responses", directory / "answers.jsonl")
        run_ok("selm_rank", "--iter", self.iter_h5, "--ranker", f"file:{directory / 'scores.jsonl'}")

    def wanted(self):
        return [self.encoding.training_row(row) for row in self.rows]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyRows(tmp_path_factory.mktemp("tiny"))


def test_rows_of_an_iteration(tiny):
    wanted = [{"chosen": row["best"], "rejected": row["worst"], "generated": row["generated"]} for row in tiny.wanted()]
    lines = encode(tiny.iter_h5, tiny.model, TINY_LIMITS, *tiny.names[2:])
    check_lines(lines, wanted, tiny.encoding.tokenizer, pieces=True)
    lengths = [[len(line[name]["ids"]) for name in ("chosen", "rejected", "generated")] for line in lines]
    starts = [{line[name]["label_start"] for name in ("chosen", "rejected", "generated")} for line in lines]
    assert len(starts[0]) == 2 and len(starts[6]) == 2  # the split rule
    assert lengths[1][2] > CONTEXT and lengths[2][0] == TINY_LIMITS[0] and lengths[3][0] == lengths[3][2] == TINY_LIMITS[0]
    first = [line["chosen"]["ids"][0] for line in lines]
    assert lines[4]["rejected"]["ids"][0] != first[4] and starts[4] == {TINY_LIMITS[1]}  # nothing in common


def test_a_row_beyond_the_context_stops_before_work_or_is_capped(tiny):
    common = ["--iter", tiny.iter_h5, "--model", tiny.model, *tiny.common]
    result = run("selm_logp", *common)
    assert result.returncode == 65 and "row 1 " in result.stderr and "id1" in result.stderr and "--on-long-row cap" in result.stderr
    assert not Path(f"{tiny.iter_h5}.logprobs-reference.journal").exists()
    result = run("selm_logp", *common, "--on-long-row", "cap", ranks=2)
    assert result.returncode == 0 and "row 1 " in result.stderr, result.stderr
    wanted = tiny.wanted()
    prompt, answer = wanted[1]["generated"]
    wanted[1]["generated"] = (prompt, answer[:CONTEXT - len(prompt)])
    model = reference.load(tiny.model)
    with h5py.File(tiny.iter_h5) as file:
        sums, tokens = file["/logprobs/reference/sum"][:], file["/logprobs/reference/tokens"][:]
        best, worst = file["/pairs/best"][:], file["/pairs/worst"][:]
        attributes = dict(file["/logprobs/reference"].attrs)
    for name, value in (("encoding", "recipe"), ("bos_id", 1), ("eos_id", 2), ("on_long_row", "cap")):
        stored = attributes[name]
        assert (stored.decode() if isinstance(stored, bytes) else stored) == value
    for i, row in enumerate(wanted):
        for name, candidate in (("best", best[i]), ("worst", worst[i]), ("generated", 0)):
            with torch.no_grad():
                expected, count = reference.sequence_log_probs(model, [row[name]])
            assert tokens[i, candidate] == count.item() == len(row[name][1])
            assert sums[i, candidate] == pytest.approx(expected.item(), rel=2e-5), (i, name)


def test_log_probs_of_the_given_pairs(tiny):
    """The first iteration of the Zephyr recipe: no generated answer, chosen and rejected as they are."""
    offline = tiny.directory / "offline.h5"
    run_ok("selm_gen", "--data", tiny.directory / "prefs.h5", "--output", offline, "--responses", "none")
    run_ok("selm_rank", "--iter", offline, "--update-rule", "offline")
    run_ok("selm_logp", "--iter", offline, "--model", tiny.model, *tiny.common)
    wanted = [tiny.encoding.row(row["messages"], row["chosen"], row["rejected"]) for row in tiny.rows]
    with torch.no_grad():
        expected, counts = reference.sequence_log_probs(
            reference.load(tiny.model), [row["chosen"] for row in wanted] + [row["rejected"] for row in wanted])
    with h5py.File(offline) as file:
        sums, tokens = file["/logprobs/reference/sum"][:], file["/logprobs/reference/tokens"][:]
    assert np.isnan(sums[:, 0]).all()
    np.testing.assert_allclose(sums[:, 1:].T.ravel(), expected.numpy(), rtol=2e-5)
    assert tokens[:, 1:].T.ravel().tolist() == counts.tolist()


def test_training_refuses_log_probs_of_another_encoding(tiny):
    run_ok("selm_logp", "--iter", tiny.iter_h5, "--model", tiny.model, *tiny.common, "--on-long-row", "cap")
    base = ["selm_train", "--iter", tiny.iter_h5, "--policy", tiny.model, "--output", tiny.directory / "policy", "--dtype", "fp32",
            "--progress", "off", "--max-steps", "1", "--global-batch", "7", "--save-dtype", "fp32", *tiny.limits]
    def options(encoding="recipe", bos="1", eos="2", on_long_row="cap"):
        special = ["--bos-token", bos, "--eos-token", eos] if encoding == "recipe" else []
        return ["--encoding", encoding, "--chat-format", "phi3-2024-04", *special, "--on-long-row", on_long_row]

    for changed, word in ((dict(encoding="chat"), "encoding"), (dict(eos="0"), "eos_id"),
                          (dict(bos="none"), "bos_id")):
        result = run(*base, *options(**changed))
        assert result.returncode == 65 and f"another {word}" in result.stderr, (word, result.stderr)
    result = run(*base, *options(on_long_row="stop"))
    assert result.returncode == 65 and "--on-long-row cap" in result.stderr, result.stderr
    assert run(*base, *options()).returncode == 0


class RecipeCase(training.Case):
    @property
    def common(self):
        return [*super().common, "--encoding", "recipe"]

    def encoding(self):
        return RecipeEncoding(transformers.AutoTokenizer.from_pretrained(self.model), self.max_length, self.max_prompt_length)


def test_log_probs_and_gradient_of_a_training(tmp_path):
    """As in test_training: with beta1 = 0 the first moment after step 2 is the gradient at the policy of step 1."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    case = RecipeCase(tmp_path, training.make_tiny(tmp_path / "model"), list(range(6)), 128, 64).prepare()
    model, encoding = reference.load(case.model), case.encoding()
    with torch.no_grad():
        start = reference.row_log_probs(model, encoding, case.rows)
    with h5py.File(case.iter_h5) as file:
        sums, pairs = file["/logprobs/reference/sum"][:], (file["/pairs/best"][:], file["/pairs/worst"][:])
    rows = np.arange(len(case.rows))
    for found, expected in zip((sums[rows, pairs[0]], sums[rows, pairs[1]], sums[:, 0]), start):
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5)
    output = case.train("gradient", "--adam-beta1", "0", "--checkpoint-every", "1", "--max-steps", "2", expect=75, rate=10 * training.RATE)
    policy = training.checkpoint(output / "checkpoints" / "step-000001.h5", "fp32")
    found = training.checkpoint(output / "checkpoints" / "step-000002.h5", "exp_avg")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(policy[name])
    loss, expected = reference.gradient(model, encoding, case.rows, start, case.alpha, case.beta)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-12)
    assert lines[1]["loss"] == pytest.approx(loss, abs=2e-5) and abs(lines[1]["rewards/margins"]) > 1e-3
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
