"""Log-probs, gradients and updates of selm_logp and selm_train against an independent PyTorch training in float64: tiny models of
several shapes at every ZeRO stage on one to four ranks, and SmolLM2."""
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
h5py = pytest.importorskip("h5py")

import reference_training as reference  # noqa: E402  (beside this file)

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("SELM_BIN_DIR", ROOT / "build" / "release" / "bin"))
SMOLLM2 = Path(os.environ.get("SELM_SMOLLM2_DIR", ROOT / "build" / "models" / "smollm2"))
SAMPLE = ROOT / "data" / "ultrafeedback_sample.jsonl"
RATE = 1e-4

pytestmark = pytest.mark.skipif(not (BIN / "selm_train").exists(), reason=f"the programs are not built in {BIN}")
needs_smollm2 = pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").exists(),
                                   reason=f"no SmolLM2 in {SMOLLM2} (scripts/make_smollm2.py makes it)")


def run(program, *arguments, ranks=1):
    command = [str(BIN / program), *map(str, arguments)]
    if ranks > 1:
        command = [os.environ.get("SELM_MPIEXEC", "mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *command]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
                   "OMPI_MCA_mpi_yield_when_idle": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    return result


def run_ok(program, *arguments, **keywords):
    result = run(program, *arguments, **keywords)
    assert result.returncode == 0, f"{program}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@dataclass
class Case:
    """Rows of the sample with answers and scores, ranked and scored by a model."""
    directory: Path
    model: Path
    lines: list
    max_length: int
    max_prompt_length: int
    alpha: float = 0.1  # larger than the recipe's, so that a wrong optimism term shows
    beta: float = 0.1
    rows: list = field(default_factory=list)

    @property
    def iter_h5(self):
        return self.directory / "iter.h5"

    @property
    def common(self):
        return ["--dtype", "fp32", "--max-length", self.max_length, "--max-prompt-length", self.max_prompt_length,
                "--progress", "off"]

    def encoding(self):
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        return reference.Encoding(tokenizer, self.max_length, self.max_prompt_length)

    def prepare(self):
        sample = SAMPLE.read_text(encoding="utf-8").splitlines()
        source = [json.loads(sample[i]) for i in self.lines]
        (self.directory / "rows.jsonl").write_text("\n".join(sample[i] for i in self.lines) + "\n", encoding="utf-8")
        answers, scores = [], []
        for i, row in enumerate(source):
            text = f"Here is what I think about number {i}: it depends, and I would first ask what is meant."
            order = [[3, 2, 1], [2, 3, 1], [1, 3, 2]][i % 3]  # the generated answer is best, middle, worst
            answers.append(json.dumps({"prompt_id": row["prompt_id"], "response": text}))
            scores.append(json.dumps({"prompt_id": row["prompt_id"], "scores": order}))
            candidates = [text, row["chosen"][-1]["content"], row["rejected"][-1]["content"]]
            self.rows.append({"messages": row["chosen"][:-1], "generated": text, "best": candidates[int(np.argmax(order))],
                              "worst": candidates[int(np.argmin(order))]})
        (self.directory / "answers.jsonl").write_text("\n".join(answers) + "\n", encoding="utf-8")
        (self.directory / "scores.jsonl").write_text("\n".join(scores) + "\n", encoding="utf-8")
        run_ok("selm_import", "--input", self.directory / "rows.jsonl", "--output", self.directory / "prefs.h5")
        run_ok("selm_gen", "--data", self.directory / "prefs.h5", "--output", self.iter_h5, "--responses", self.directory / "answers.jsonl")
        run_ok("selm_rank", "--iter", self.iter_h5, "--ranker", f"file:{self.directory / 'scores.jsonl'}")
        run_ok("selm_logp", "--iter", self.iter_h5, "--model", self.model, *self.common)
        return self

    def train(self, name, *arguments, expect=0, ranks=1, rate=RATE, batch=None, epochs=5):
        output = self.directory / name
        result = run("selm_train", "--iter", self.iter_h5, "--policy", self.model, "--output", output, *self.common, "--alpha", self.alpha,
                     "--beta", self.beta, "--learning-rate", rate, "--schedule", "constant", "--warmup-ratio", "0", "--shuffle", "off",
                     "--global-batch", batch or len(self.rows), "--epochs", epochs, "--save-dtype", "fp32", *arguments, ranks=ranks)
        assert result.returncode == expect, result.stderr
        return output


def make_tiny(directory: Path, family="Llama", **changes) -> Path:
    torch.manual_seed(11)
    options = dict(vocab_size=275, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
                   num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.12,
                   bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, f"{family}Config")(**{**options, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # gains of 1 would hide a missing factor
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    for file in (ROOT / "tests" / "data" / "tiny_tokenizer").iterdir():
        shutil.copy(file, directory / file.name)
    return directory


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=needs_smollm2)])
def case(request, tmp_path_factory):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        made = Case(directory, make_tiny(directory / "model"), list(range(6)), 128, 64)
    else:
        made = Case(directory, SMOLLM2, [3, 5, 7, 11], 72, 40)
    made.prepare()
    yield made
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def start_log_probs(case):
    with torch.no_grad():
        return reference.row_log_probs(reference.load(case.model), case.encoding(), case.rows)


@pytest.fixture(scope="module")
def expected_steps(case, start_log_probs):
    """The reference's five steps: (losses, updates)."""
    model = reference.load(case.model)
    losses = reference.train(model, case.encoding(), [case.rows] * 5, case.alpha, case.beta, RATE, [start_log_probs] * 5)
    return losses, updates(model, case.model)


def updates(model, start):
    """What training changed, by tensor. `start` is a directory, `model` one too or a loaded model."""
    before = dict(reference.load(start, torch.float32).named_parameters())
    after = reference.load(model, torch.float32) if isinstance(model, Path) else model
    return {name: (p.detach() - before[name].detach()).float() for name, p in after.named_parameters()}


def relative_errors(found, expected):
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert update.norm() > 0, f"{name} did not move"
    return {name: ((found[name] - update).double().norm() / update.double().norm()).item() for name, update in expected.items()}


def expect_updates(found, expected, what):
    """Adam turns the sign of a tiny gradient into a whole step, so elements whose gradient is rounding differ: two attention
    implementations inside transformers differ by 8e-4 already."""
    errors = relative_errors(found, expected)
    worst, median = max(errors, key=errors.get), np.median(list(errors.values()))
    print(f"updates after 5 steps, {what}: worst relative {errors[worst]:.2e} ({worst}), median {median:.2e}")
    assert errors[worst] <= 5e-3, (what, worst)
    assert median <= 1e-3, what


@pytest.fixture(scope="module")
def trained(case):
    """Our five steps: (start weights, trained weights, losses)."""
    output = case.train("policy")
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    return output, losses


def test_log_probs(case, start_log_probs):
    with h5py.File(case.iter_h5) as file:
        sums, tokens = file["/logprobs/reference/sum"][:], file["/logprobs/reference/tokens"][:]
        best, worst = file["/pairs/best"][:], file["/pairs/worst"][:]
    encoding = case.encoding()
    for i, row in enumerate(case.rows):
        for which, candidate in ((0, best[i]), (1, worst[i]), (2, 0)):
            expected = start_log_probs[which][i].item()
            assert sums[i, candidate] == pytest.approx(expected, rel=2e-5), (i, which)
        for candidate, text in ((best[i], row["best"]), (0, row["generated"])):
            assert tokens[i, candidate] == len(encoding.response(text, len(encoding.prompt(row["messages"]))))
        unscored = {0, 1, 2} - {0, int(best[i]), int(worst[i])}
        assert all(np.isnan(sums[i, c]) and tokens[i, c] == 0 for c in unscored)


def checkpoint(path, kind):
    values = {}
    with h5py.File(path) as file:
        for name, group in file["parameters"].items():
            values[name] = torch.from_numpy(group[kind][:]).reshape(json.loads(group.attrs["shape"]))
    return values


def test_gradient_at_a_policy_that_differs_from_the_reference(case, start_log_probs):
    # With beta1 = 0 the first moment is the gradient itself. The checkpoint of step 1 has the policy of step 2, that of
    # step 2 its gradient. The reference runs in float64: PyTorch's own padded fp32 pass is up to 2.9e-4 away from it here.
    output = case.train("gradient", "--adam-beta1", "0", "--checkpoint-every", "1", "--max-steps", "2", expect=75,
                        rate=RATE if case.model == SMOLLM2 else 10 * RATE)
    policy = checkpoint(output / "checkpoints" / "step-000001.h5", "fp32")
    found = checkpoint(output / "checkpoints" / "step-000002.h5", "exp_avg")
    model = reference.load(case.model)
    with torch.no_grad():
        moved = 0.0
        for name, parameter in model.named_parameters():
            moved += (policy[name] - parameter).double().norm().item() ** 2
            parameter.copy_(policy[name])
    assert moved > 0
    loss, expected = reference.gradient(model, case.encoding(), case.rows, start_log_probs, case.alpha, case.beta)
    line = json.loads((output / "metrics.jsonl").read_text().splitlines()[1])
    print(f"loss {line['loss']:.9g}, reference {loss:.9g}")
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert abs(line["rewards/margins"]) > 1e-3  # the policy really differs
    assert found.keys() == expected.keys()
    errors = {name: ((found[name] - expected[name]).double().norm() / expected[name].double().norm()).item() for name in expected}
    worst = max(errors, key=errors.get)
    print(f"gradient: worst relative L2 {errors[worst]:.2e} ({worst}), median {np.median(list(errors.values())):.2e}")
    assert errors[worst] <= 1e-4, worst
    norm = sum(g.double().norm().item() ** 2 for g in expected.values()) ** 0.5
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    shutil.rmtree(output)


def test_five_steps(case, trained, expected_steps):
    output, losses = trained
    expected_losses, expected = expected_steps
    assert losses[0] == pytest.approx(np.log(2), abs=1e-12)
    print(f"losses {losses}, reference {expected_losses}")
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert losses[-1] < losses[0] - 0.01
    expect_updates(updates(output, case.model), expected, "one rank")


def test_parameters_cut_over_ranks(case, trained, expected_steps):
    """Stage 3 of a real model, one row in a pass."""
    if case.model != SMOLLM2:
        pytest.skip("test_stages does it with tiny models")
    output = case.train("stage3", "--zero", 3, "--tokens-per-microbatch", 1, ranks=2)
    found = updates(output, case.model)
    expect_updates(found, expected_steps[1], "stage 3 on two ranks")
    expect_updates(found, updates(trained[0], case.model), "stage 3 on two ranks against one rank")
    shutil.rmtree(output)


def test_the_written_policy_gives_the_same_logits(case, trained):
    """transformers reads the directory, and its log-probs there are those that selm_logp computes of it."""
    output, _ = trained
    again = case.directory / "again.h5"
    shutil.copy(case.iter_h5, again)
    run_ok("selm_logp", "--iter", again, "--model", output, "--name", "trained", *case.common)
    with torch.no_grad():
        expected = reference.row_log_probs(reference.load(output), case.encoding(), case.rows)
    with h5py.File(again) as file:
        sums = file["/logprobs/trained/sum"][:]
        best, worst = file["/pairs/best"][:], file["/pairs/worst"][:]
    rows = np.arange(len(case.rows))
    for found, wanted in ((sums[rows, best], expected[0]), (sums[rows, worst], expected[1]), (sums[:, 0], expected[2])):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer("Hello there")["input_ids"] == transformers.AutoTokenizer.from_pretrained(case.model)("Hello there")["input_ids"]


SHAPES = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "mistral": dict(family="Mistral", num_attention_heads=4, head_dim=128, sliding_window=256),
    "phi3": dict(family="Phi3", hidden_size=192, num_attention_heads=2, num_key_value_heads=1, sliding_window=256,
                 initializer_range=0.07, pad_token_id=9),  # one fused matrix for queries, keys, values; one for gate and up
}
LAYOUTS = {  # (stage, ranks, ranks of a node; 0: all); the first is what the others are compared with
    "untied": [(stage, ranks, node) for ranks, node in ((1, 0), (2, 1), (3, 2), (4, 0)) for stage in range(4)],
    "tied": [(0, 1, 0), (1, 3, 0), (2, 2, 1), (3, 2, 0), (3, 4, 2)],
    "mistral": [(1, 2, 0), (3, 3, 2)],
    "phi3": [(2, 3, 0), (3, 2, 1)],
}
CLIP = 0.25


@pytest.mark.parametrize("shape", SHAPES)
def test_stages(shape, tmp_path):
    """Five steps of three rows each, clipped, one or two rows in a pass; with four ranks one has no row."""
    case = Case(tmp_path, make_tiny(tmp_path / "model", **SHAPES[shape]), list(range(15)), 128, 64).prepare()
    batches = [case.rows[i:i + 3] for i in range(0, 15, 3)]

    def reference_run(clip):
        model = reference.load(case.model)
        losses, norms = reference.train(model, case.encoding(), batches, case.alpha, case.beta, RATE, max_grad_norm=clip)
        return losses, norms, updates(model, case.model)

    losses, norms, expected = reference_run(CLIP)
    print(f"losses {losses}, gradient norms {norms}")
    assert min(norms) > 2 * CLIP and max(norms) > 1.5 * min(norms)
    errors = relative_errors(reference_run(float("inf"))[2], expected)
    assert np.median(list(errors.values())) > 5e-3  # clipping matters
    first = None
    for stage, ranks, node in LAYOUTS[shape]:
        what = f"{shape}: stage {stage}, {ranks} rank(s), {node or 'all'} a node"
        output = case.train(f"{stage}-{ranks}-{node}", "--zero", stage, "--node-ranks", node, "--max-grad-norm", CLIP,
                            "--tokens-per-microbatch", 300, "--bucket-bytes", 4096 if ranks % 2 else 1 << 20, ranks=ranks, batch=3, epochs=1)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4), what
        assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3), what
        found = updates(output, case.model)
        expect_updates(found, expected, what)
        first = first or found
        difference = max(relative_errors(found, first).values())
        print(f"{what}: {difference:.2e} from the first")
        assert difference <= 1e-3, what


def test_reward_model(tmp_path):
    """A step of Bradley-Terry training on all weights: loss and gradients of a padded LlamaForSequenceClassification; the
    written directory loads in transformers."""
    case = Case(tmp_path, make_tiny(tmp_path / "model"), list(range(6)), 128, 64)
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    source = [json.loads(lines[i]) for i in case.lines]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[i] for i in case.lines) + "\n", encoding="utf-8")
    run_ok("selm_import", "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "prefs.h5")
    common = ["--data", tmp_path / "prefs.h5", "--objective", "bradley-terry", *case.common, "--learning-rate", "0.01", "--schedule",
              "constant", "--warmup-ratio", "0", "--shuffle", "off", "--global-batch", "6", "--save-dtype", "fp32"]
    run_ok("selm_train", "--policy", case.model, "--output", tmp_path / "first", "--epochs", "3", *common)
    # The same with the parameters cut over ranks.
    run_ok("selm_train", "--policy", case.model, "--output", tmp_path / "cut", "--epochs", "3", "--zero", "3", "--tokens-per-microbatch",
           "300", *common, ranks=2)
    # From the trained reward model one more step, whose first moment is the gradient.
    result = run("selm_train", "--policy", tmp_path / "first", "--output", tmp_path / "second", "--epochs", "2", "--adam-beta1", "0",
                 "--max-steps", "1", *common)
    assert result.returncode == 75, result.stderr
    model, cut = (transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / name, dtype=torch.float32)
                  for name in ("first", "cut"))
    assert type(model).__name__ == "LlamaForSequenceClassification"
    start = dict(reference.load(case.model, torch.float32).named_parameters())
    with torch.no_grad():
        of_model, of_cut = ({name: p - start.get(name, 0) for name, p in trained.named_parameters()} for trained in (model, cut))
        errors = relative_errors(of_cut, of_model)
    print(f"reward model, stage 3 on two ranks against stage 1 on one: worst {max(errors.values()):.2e}")
    assert max(errors.values()) <= 1e-3
    model.eval()
    encoding = case.encoding()

    def score(messages, text):
        prompt = encoding.prompt(messages)
        hidden = model.model(input_ids=torch.tensor([prompt + encoding.response(text, len(prompt))])).last_hidden_state
        return model.score(hidden[0, -1])[0]

    loss = torch.stack([-torch.nn.functional.logsigmoid(score(row["chosen"][:-1], row["chosen"][-1]["content"])
                                                         - score(row["chosen"][:-1], row["rejected"][-1]["content"]))
                        for row in source]).mean()
    loss.backward()
    line = json.loads((tmp_path / "second" / "metrics.jsonl").read_text())
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    found = checkpoint(tmp_path / "second" / "checkpoints" / "step-000001.h5", "exp_avg")
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
