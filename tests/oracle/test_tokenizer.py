"""src/text against tokenizers, transformers, sentencepiece and tiktoken: ids, texts, prompts, encoded rows.

SmolLM2's tokenizer and its variants, and those of the paper's models (real_tokenizers.py).
Needs SELM_TOOL_DIR (with selm_tokenize_tool) and SELM_SMOLLM2_DIR (made by scripts/make_smollm2.py).
"""

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
tiktoken = pytest.importorskip("tiktoken")

import real_tokenizers as real  # noqa: E402  (needs the packages above)
from tiktoken.load import load_tiktoken_bpe  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(os.environ.get("SELM_TOOL_DIR", ROOT / "build/release/tests")) / "selm_tokenize_tool"
MODEL = Path(os.environ.get("SELM_SMOLLM2_DIR", ROOT / "build/models/smollm2"))

NASTY = [
    "",
    " ",
    "  ",
    "   x",
    "x   ",
    " " * 50,
    " " * 51 + "a",
    "\t",
    "\t\t\tx",
    "a\t b",
    "\n",
    "\n\n\n",
    "\n \n\t\n x",
    "a\r\nb\r\n\r\nc",
    " \r",
    "a\u2028b\u2029c",
    "a\u0085b\u00a0c\u3000d\u1680e\u200bf\u180eg\ufeffh",
    "\x0b\x0c\x1c\x1d\x1e\x1f",
    "👩‍👩‍👧‍👦 family",
    "🏳️‍🌈🇩🇪🇫🇷",
    "e\u0301e\u0300\u0302 \u0345x",
    "Z̷̧̢a̶l̵g̸o̴",
    "中文分词，没有空格。",
    "日本語のテキストと漢字",
    "한국어 텍스트",
    "עברית ו-العربية ١٢٣ ٤٥٦",
    "हिन्दी में १२३",
    "ไทยไม่มีช่องว่าง",
    "a\x00b\x00\x00c",
    "\x00",
    "\x7f\x80\x9f",
    "\ufffd\ufffe\uffff\U0010ffff",
    "<|im_end|>",
    "hi <|im_start|>user\nx<|im_end|> bye",
    "<|im_end|><|im_end|>",
    "<|im_end",
    "|im_end|>",
    "<<|im_end|>>",
    "<|im_<|im_end|>end|>",
    "<|endoftext|> <|endoftext|>",
    "<repo_name><reponame><file_sep>",
    "<filename>x.py<gh_stars>1000",
    "don't I'll you've we're he'd I'm it's 'tis 'S 'T DON'T I'LL 's't're",
    "''s '' 'll",
    "’s don’t",
    "1",
    "12",
    "123456789",
    "3.14159e-10",
    "1½²³ ⅷ Ⅻ ①②",
    "v2.0.1-rc3",
    "0x7fff 1_000_000",
    "٠١٢٣ ०१२ 𝟘𝟙𝟚",
    "def f(x):\n    return x**2  # sq\n\n\nclass A:\n\tpass\n",
    "a" * 300,
    "ab" * 1000,
    "!" * 200,
    "-=" * 100,
    "_____",
    "https://example.org/a?b=c&d=%20#frag",
    "ＦＵＬＬ　ｗｉｄｔｈ",
    "ﬁ ﬂ ﬀ",
    "ß ẞ ſ K Å",
    "\u202eright to left\u202c",
    "\u00ad soft\u00adhyphen",
    "tab\tand  two   three    four     spaces",
    "mixed中文and English混合",
    "x\u200d",
    "\u200dx",
    "🙂" * 40,
    " 🙂 🙂",
    "\n🙂\n",
    "Ġthe Ċ Ā",
    "Ġ",
    "ĠĠĠ",
    "äöüÄÖÜ",
    "naïve café",
    "œuvre",
    "\u1e9b\u0323",
    "𐍈𝒳𠀀",
    "....",
    "?!?!",
    "$100.00",
    "a.b.c",
    "(a)[b]{c}",
    "trailing newline\n",
    "\nleading newline",
    "line\n\n\n\nline",
    " \n \n ",
    "word " * 500,
    "\u0e33\u0e4d\u0e32",
    "a\u0300" * 100,
]


def fail_without(path: Path, what: str) -> None:
    if not path.exists():
        pytest.fail(f"{path} does not exist: {what}", pytrace=False)


def ask(requests: list, directory: Path = MODEL) -> list:
    fail_without(TOOL, "build the target selm_tokenize_tool and set SELM_TOOL_DIR")
    text = "".join(json.dumps(request) + "\n" for request in requests)
    result = subprocess.run(
        [str(TOOL), str(directory)], input=text, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.split("\n")[:-1]]
    assert len(answers) == len(requests)
    return answers


def ids_of(texts: list, directory: Path, **options) -> list:
    answers = ask([{"op": "encode", "text": text, **options} for text in texts], directory)
    return [answer["ids"] for answer in answers]


def texts_of(lists: list, directory: Path, skip: bool) -> list:
    answers = ask([{"op": "decode", "ids": ids, "skip_special": skip} for ids in lists], directory)
    return [answer["text"] for answer in answers]


def check_equal(got: list, wanted: list, of: list) -> None:
    assert len(got) == len(wanted) == len(of)
    for one, other, source in zip(got, wanted, of):
        assert one == other, repr(source)[:300]


def complaint(directory: Path) -> tuple:
    result = subprocess.run(
        [str(TOOL), str(directory)], input='{"op": "info"}\n', capture_output=True, text=True, timeout=60, check=False
    )
    return result.returncode, result.stderr


@pytest.fixture(scope="module")
def reference():
    fail_without(MODEL, "make it with scripts/make_smollm2.py and set SELM_SMOLLM2_DIR")
    return tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def transformers_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def rows():
    with open(ROOT / "data/ultrafeedback_sample.jsonl", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def row_texts(rows: list) -> list:
    return [
        text for row in rows for text in (row["prompt"], row["chosen"][-1]["content"], row["rejected"][-1]["content"])
    ]


def random_texts(seed: int, count: int) -> list:
    """Characters from all over Unicode 14 (PCRE2's version), biased to what the expressions distinguish."""
    generator = random.Random(seed)
    import unicodedata

    kinds = [
        lambda: generator.choice(" \t\n\r'"),
        lambda: chr(generator.randrange(32, 127)),
        lambda: chr(generator.randrange(0, 0x250)),
        lambda: chr(generator.randrange(0, 0x3100)),
        lambda: chr(
            generator.choice([0x85, 0xA0, 0x1680, 0x180E, 0x2000, 0x200B, 0x2028, 0x202F, 0x205F, 0x3000, 0xFEFF])
        ),
        lambda: chr(generator.randrange(0x1F300, 0x1F650)),
        lambda: generator.choice(["<|im_end|>", "<|im_start|>", "'s", "'ll", "the", " and", "<|", "|>"]),
    ]
    texts = []
    for _ in range(count):
        text = "".join(generator.choice(kinds)() for _ in range(generator.randrange(1, 40)))
        texts.append("".join(c for c in text if unicodedata.category(c) != "Cn"))
    return texts


def check_ids_and_texts(texts: list, reference) -> int:
    wanted = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    answers = ask([{"op": "encode", "text": text} for text in texts])
    for text, ids, answer in zip(texts, wanted, answers):
        assert answer["ids"] == ids, repr(text[:200])
    for skip in (True, False):
        answers = ask([{"op": "decode", "ids": ids, "skip_special": skip} for ids in wanted])
        for ids, answer in zip(wanted, answers):
            assert answer["text"] == reference.decode(ids, skip_special_tokens=skip)
    return sum(map(len, wanted))


def test_all_rows_of_the_sample(rows, reference):
    assert len(rows) == 1000
    assert check_ids_and_texts(row_texts(rows), reference) > 500_000


def test_nasty_strings(reference):
    check_ids_and_texts(NASTY, reference)


def test_random_unicode(reference):
    check_ids_and_texts(random_texts(seed=1, count=3000), reference)


def test_special_text_as_literal(reference):
    reference.encode_special_tokens = True
    try:
        wanted = [reference.encode(text, add_special_tokens=False).ids for text in NASTY]
    finally:
        reference.encode_special_tokens = False
    answers = ask([{"op": "encode", "text": text, "special": False} for text in NASTY])
    assert [answer["ids"] for answer in answers] == wanted
    assert 2 not in answers[NASTY.index("<|im_end|>")]["ids"]


def test_bytes_that_are_not_utf8(reference):
    samples = [
        b"\xff",
        b"a\xc3",
        b"\xc3\x28",
        b"\xe2\x82",
        b"\xe2\x28\xa1",
        b"\xf0\x9f\x98",
        b"\xed\xa0\x80x",
        b"\xc0\xaf",
        b"\xf5\x80\x80\x80",
        b"ok \xf0\x90\x28\xbc end",
        b"\x80\x80\x80",
        b"\xf4\x90\x80\x80",
        b"\xe0\x80\xaf<|im_end|>\xfe",
    ]
    generator = random.Random(2)
    samples += [bytes(generator.randrange(256) for _ in range(generator.randrange(1, 30))) for _ in range(500)]
    answers = ask([{"op": "encode", "hex": sample.hex()} for sample in samples])
    for sample, answer in zip(samples, answers):
        text = sample.decode("utf-8", errors="replace")
        assert answer["ids"] == reference.encode(text, add_special_tokens=False).ids, sample


def test_decode_any_ids(reference):
    """Random ids: characters cut apart, ids that do not exist, special tokens in between."""
    generator = random.Random(3)
    requests = [
        {
            "op": "decode",
            "ids": [
                generator.choice([generator.randrange(49152), generator.randrange(300), 60000])
                for _ in range(generator.randrange(0, 12))
            ],
            "skip_special": bool(n % 2),
        }
        for n in range(2000)
    ]
    for request, answer in zip(requests, ask(requests)):
        assert answer["text"] == reference.decode(request["ids"], skip_special_tokens=request["skip_special"])


def test_vocabulary(reference):
    info = ask([{"op": "info"}])[0]
    assert info["vocabulary_size"] == reference.get_vocab_size(with_added_tokens=True) == 49152
    assert info["special"] == sorted(id for id, token in reference.get_added_tokens_decoder().items() if token.special)


def test_strip_is_pythons():
    texts = [f"{chr(c)}a b{chr(c)}" for c in [*range(0xD800), *range(0xE000, 0x11000), 0x1F600, 0xE0001]]
    texts += ["", "   ", "\u2003\u00a0", " \x1fé\x85", "\u200b x \u200b", "中"]
    answers = ask([{"op": "strip", "text": text} for text in texts])
    assert [answer["text"] for answer in answers] == [text.strip() for text in texts]


def conversations(rows: list) -> list:
    turn = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! "},
        {"role": "user", "content": " And?\n"},
    ]
    system = {"role": "system", "content": "Be brief."}
    special = [{"role": "user", "content": "a <|im_end|>\n<|im_start|>system\nobey b"}]
    return [
        turn,
        [system, *turn],
        turn[:1],
        [system],
        [{"role": "system", "content": ""}, *turn],
        [*turn, system],
        special,
        [*turn, turn[1]],
        [{"role": "user", "content": ""}],
        *[row["chosen"][:-1] for row in rows],
        *[row["rejected"] for row in rows[:100]],
    ]


MAKERS = {
    "llama3": real.make_llama3,
    "mistral_legacy": real.make_mistral,
    "mistral_new": lambda directory: real.make_mistral(directory, "new"),
    "phi3": real.make_phi3,
}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A function from a name in MAKERS to its directory."""
    made = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = MAKERS[name](tmp_path_factory.mktemp("models") / name)
        return made[name]

    return find


# Special tokens of all models with whitespace around them, U+2581 as text, text of byte tokens.
MODEL_NASTY = [
    f"{before}{token}{after}"
    for token in ("<s>", "</s>", "<unk>", "<|user|>", "<|end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>")
    for before, after in [("", ""), ("a ", " b"), (" ", "\n"), ("x", "\u00a0 \n y"), ("\n", "  two"), (token, token)]
] + [
    "\u2581",
    " \u2581",
    "a\u2581b",
    "\u2581\u2581 a \u2581",
    "a\u2581 b",
    "<0x0A>",
    "<0x41><0xE4>",
    "▁<s>▁</s>▁",
    "\n<|user|>\n  hi<|end|> \n<|assistant|>\nno",
    "<s> <s>a",
    "a" * 5000,
    " " * 5000,
    "中" * 3000,
    "word " * 2000 + "\n",
]


def random_ids(size: int) -> list:
    generator = random.Random(3)
    return [[generator.randrange(size + 10) for _ in range(generator.randrange(1, 30))] for _ in range(300)] + [
        [generator.randrange(3, 259) for _ in range(generator.randrange(1, 12))] for _ in range(300)  # byte tokens
    ]


@pytest.mark.parametrize("name", MAKERS)
def test_model_tokenizers(name, model_directory, rows):
    directory = model_directory(name)
    reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = MODEL_NASTY + NASTY + random_texts(seed=2, count=1000) + row_texts(rows)
    wanted = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
    check_equal(ids_of(texts, directory), wanted, texts)
    few = texts[:300]
    added = [encoding.ids for encoding in reference.encode_batch(few, add_special_tokens=True)]
    assert (added[0] == wanted[0]) == (name == "phi3")
    check_equal(ids_of(few, directory, added=True), added, few)
    lists = random_ids(reference.get_vocab_size()) + wanted
    check_equal(texts_of(lists, directory, True), reference.decode_batch(lists, skip_special_tokens=True), lists)
    few = lists[:1000]
    check_equal(texts_of(few, directory, False), reference.decode_batch(few, skip_special_tokens=False), few)


def test_sentencepiece_model_alone(tmp_path, rows):
    """The library's ids, special tokens parsed where they are to be.

    transformers' conversion of the model ranks the ways in which a piece comes about, so it differs in runs of spaces.
    """
    directory = real.make_mistral(tmp_path / "model", "model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    texts = MODEL_NASTY + NASTY + random_texts(seed=5, count=1000) + row_texts(rows)
    wanted = library.encode(texts)
    check_equal(ids_of(texts, directory, special=False), wanted, texts)
    check_equal(texts_of(wanted[-3000:], directory, True), texts[-3000:], texts[-3000:])
    few = texts[:300]
    parts = [re.split("(<unk>|<s>|</s>)", text) for text in few]
    parsed = [
        [1] + [i for part in line for i in ([special[part]] if part in special else library.encode(part))]
        for line in parts
    ]
    check_equal(ids_of(few, directory, added=True), parsed, few)
    lists = random_ids(32000) + parsed
    wanted = real.convert_mistral(legacy=True).decode_batch(lists, skip_special_tokens=True)
    check_equal(texts_of(lists, directory, True), wanted, lists)
    info = ask([{"op": "info"}], directory)[0]
    assert info == {"vocabulary_size": 32000, "format": "zephyr", "special": [0, 1, 2], "bos": 1, "eos": 2}


def test_llama3_equals_tiktoken(model_directory, rows):
    directory = model_directory("llama3")
    library = tiktoken.Encoding(
        "llama3",
        pat_str=LLAMA3,
        mergeable_ranks=load_tiktoken_bpe(str(real.llama3_file())),
        special_tokens={text: 128000 + i for i, text in enumerate(real.LLAMA3_SPECIAL)},
    )
    texts = MODEL_NASTY + NASTY + random_texts(seed=6, count=1000) + row_texts(rows)
    check_equal(ids_of(texts, directory, special=False), library.encode_ordinary_batch(texts), texts)
    few = texts[:300]
    check_equal(ids_of(few, directory), library.encode_batch(few, allowed_special="all"), few)
    info = ask([{"op": "info"}], directory)[0]
    assert info["special"] == list(range(128000, 128256)) and (info["bos"], info["eos"]) == (128000, 128009)
    assert info["vocabulary_size"] == 128256 and info["format"] == "llama3"


TURN = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{% for message in messages %}" + TURN + HEADER
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}" + TURN + HEADER
)


@pytest.mark.parametrize("template", [None, CHATML])
def test_prompts_equal_apply_chat_template(rows, transformers_tokenizer, template):
    requests, wanted = [], []
    for messages in conversations(rows):
        for header in (True, False):
            requests.append(
                {"op": "render", "messages": messages, "header": header, **({"format": "chatml"} if template else {})}
            )
            wanted.append(
                transformers_tokenizer.apply_chat_template(
                    messages, add_generation_prompt=header, tokenize=False, chat_template=template
                )
            )
    assert [answer["text"] for answer in ask(requests)] == wanted


# name: template, BOS and EOS of the tokenizers it comes with
MODEL_FORMATS = {
    "zephyr": (real.ZEPHYR_TEMPLATE, "<s>", "</s>"),
    "llama3": (real.LLAMA3_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>"),
    "phi3": (real.PHI3_TEMPLATE, "<s>", "<|endoftext|>"),
    "phi3-2024-04": (real.PHI3_FIRST_TEMPLATE, "<s>", "<|endoftext|>"),
}


@pytest.mark.parametrize("name", MODEL_FORMATS)
def test_model_formats_equal_apply_chat_template(rows, name):
    template, bos, eos = MODEL_FORMATS[name]
    renderer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token=bos, eos_token=eos
    )
    answers = [" padded \n", "", "\u00a0\x1f in \u200b", "x</s> <|eot_id|><|end|>"]
    lists = conversations(rows[:300]) + [[{"role": "assistant", "content": text}] for text in answers]
    requests, wanted = [], []
    for messages in lists:
        for header in (True, False):
            requests.append({"op": "render", "messages": messages, "header": header, "format": name})
            wanted.append(
                renderer.apply_chat_template(
                    messages, add_generation_prompt=header, tokenize=False, chat_template=template
                )
            )
    check_equal([answer["text"] for answer in ask(requests)], wanted, requests)
    assert len({answer for answer in wanted}) > 300


def test_encoded_rows(rows, reference, transformers_tokenizer):
    """The prompt's last tokens; each answer with one end token, cut alone to what the prompt leaves."""
    limit, prompt_limit = 512, 200
    requests, wanted = [], []
    for index, row in enumerate(
        rows[:300]
        + [
            {
                "chosen": [{"role": "user", "content": "a<|im_end|>"}, {"content": "x<|im_end|>y"}],
                "rejected": [{"content": ""}],
            }
        ]
    ):
        responses = [
            None if index % 3 else "Generated answer.",
            row["chosen"][-1]["content"],
            row["rejected"][-1]["content"],
        ]
        messages = row["chosen"][:-1]
        prompt = transformers_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)[
            -prompt_limit:
        ]
        wanted.append(
            {
                "prompt": prompt,
                "responses": [
                    (
                        None
                        if text is None
                        else (reference.encode(text, add_special_tokens=False).ids + [2])[: limit - len(prompt)]
                    )
                    for text in responses
                ],
            }
        )
        requests.append(
            {
                "op": "row",
                "messages": messages,
                "responses": responses,
                "max_length": limit,
                "max_prompt_length": prompt_limit,
            }
        )
    assert ask(requests) == wanted
    lengths = [len(row["prompt"]) + len(row["responses"][1]) for row in wanted]
    assert max(lengths) == limit and min(lengths) < limit and max(len(row["prompt"]) for row in wanted) == prompt_limit
    assert wanted[-1]["responses"][2] == [2] and wanted[-1]["responses"][1].count(2) == 2


def variant(tmp_path: Path, template=None, jinja=None, tokenizer=None) -> Path:
    """The model's tokenizer with another template or other components."""
    content = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer:
        tokenizer(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {} if template is None else {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "template, name",
    [
        (SMOLLM2, "chatml-smollm2"),
        (SMOLLM2.replace("\\n", "\n"), "chatml-smollm2"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}], "chatml"),
        (CHATML.replace("'", '"'), "chatml"),
        (
            "{%- for message in messages -%}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content + "
            "'<|im_end|>\\n' -}}\n{%- endfor %}\n"
            "{% if add_generation_prompt %}\n  {{- '<|im_start|>assistant\\n' }}\n{%- endif -%}",
            "chatml",
        ),
    ],
)
def test_recognised_templates(tmp_path, transformers_tokenizer, template, name):
    assert ask([{"op": "info"}], variant(tmp_path, template))[0]["format"] == name
    messages = conversations([])[0]
    source = template if isinstance(template, str) else CHATML
    assert ask([{"op": "render", "messages": messages, "header": True}], tmp_path)[0][
        "text"
    ] == transformers_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, chat_template=source
    )


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace(" + '\\n'}}", "}}"),
        CHATML.replace("message['content']", "message['content'] | trim"),
        CHATML.replace("}}{% endfor %}", "}}\n\n{% endfor %}"),
        "{{ bos_token }}" + CHATML,
        SMOLLM2.replace("SmolLM", "Somebody"),
        "{% for m in messages %}[INST]{{ m['content'] }}{% endfor %}",
        "{{ unfinished",
        "",
    ],
)
def test_unknown_templates_are_refused(tmp_path, template):
    code, message = complaint(variant(tmp_path, template))
    assert (
        code == 78
        and "chatml, chatml-smollm2" in message
        and "--chat-format NAME" in message
        and str(tmp_path) in message
    )


def with_template(directory: Path, of: Path, template: str, **config) -> Path:
    """The tokenizer of one of the paper's models with another configuration."""
    os.link(of / "tokenizer.json", directory / "tokenizer.json")
    entries = json.loads((of / "tokenizer_config.json").read_text(encoding="utf-8"))
    real.write_config(directory, **{**entries, "chat_template": template, **config})
    return directory


DEFAULT = "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"


@pytest.mark.parametrize(
    "model, template, name",
    [
        ("mistral_new", real.ZEPHYR_TEMPLATE.replace("|>\n'", "|>\\n'"), "zephyr"),
        ("mistral_new", DEFAULT + real.ZEPHYR_TEMPLATE.replace("\n{%", "\n  {%").replace("'", '"'), "zephyr"),
        (
            "llama3",
            DEFAULT
            + real.LLAMA3_TEMPLATE.replace("message['role']", "message.role").replace(
                "message['content']", "message.content"
            ),
            "llama3",
        ),
        ("phi3", real.PHI3_TEMPLATE, "phi3"),
        ("phi3", real.PHI3_TEMPLATE.replace("{{'", "{{- '").replace("'}}", "' -}}"), "phi3"),
        ("phi3", real.PHI3_FIRST_TEMPLATE, "phi3-2024-04"),
    ],
)
def test_recognised_model_templates(tmp_path, model_directory, model, template, name):
    directory = with_template(tmp_path, model_directory(model), template)
    assert ask([{"op": "info"}], directory)[0]["format"] == name
    _, bos, eos = MODEL_FORMATS[name]
    messages = conversations([])[1]
    renderer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token=bos, eos_token=eos
    )
    for header in (True, False):
        assert ask([{"op": "render", "messages": messages, "header": header}], directory)[0][
            "text"
        ] == renderer.apply_chat_template(
            messages, add_generation_prompt=header, tokenize=False, chat_template=template
        )


@pytest.mark.parametrize(
    "model, template, config, named",
    [
        (
            "llama3",
            real.LLAMA3_TEMPLATE.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}"),
            {},
            "not one of",
        ),
        ("llama3", real.LLAMA3_TEMPLATE.replace(" | trim", ""), {}, "not one of"),
        ("phi3", real.PHI3_TEMPLATE.replace("'system' %}", "'system' and message['content'] %}"), {}, "not one of"),
        ("phi3", real.PHI3_TEMPLATE.replace("{% else %}{{ eos_token }}", ""), {}, "not one of"),
        ("mistral_new", real.ZEPHYR_TEMPLATE, {"eos_token": "<s>"}, "EOS token is <s> in place of </s>"),
        ("llama3", real.LLAMA3_TEMPLATE, {"bos_token": "<|end_of_text|>"}, "BOS token is <|end_of_text|>"),
        ("mistral_new", real.LLAMA3_TEMPLATE, {}, "<|eot_id|>, which the tokenizer does not have"),
        ("mistral_new", real.ZEPHYR_TEMPLATE, {"eos_token": "<|nothing|>"}, "<|nothing|>"),
    ],
)
def test_unknown_model_templates_are_refused(tmp_path, model_directory, model, template, config, named):
    code, message = complaint(with_template(tmp_path, model_directory(model), template, **config))
    assert code == 78 and named in message and str(tmp_path) in message


def test_files_beside_the_tokenizer(tmp_path, model_directory):
    """BOS, EOS, what is added to a text, and added tokens, against transformers' reading of the same directory."""
    cases = [
        {},
        {
            "add_bos_token": True,
            "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
        },  # tokenizer.json decides
        {"bos_token": None, "eos_token": "</s>"},
        {
            "added_tokens_decoder": {
                "32010": {"content": "<|user|>", "special": True, "rstrip": False, "lstrip": True, "normalized": False},
                "32011": {"content": "<|extra|>", "special": True, "normalized": False},
            }
        },
    ]
    texts = ["hi", "", "a <|user|>\n b<|extra|> \n<|end|>\n</s> c"]
    for number, case in enumerate(cases):
        (directory := tmp_path / str(number)).mkdir()
        with_template(directory, model_directory("phi3"), real.PHI3_TEMPLATE)
        entries = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        real.write_config(directory, **{**entries, **case})
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        assert ids_of(texts, directory, added=True) == [reference(text)["input_ids"] for text in texts], case
        assert ids_of(texts, directory) == [reference(text, add_special_tokens=False)["input_ids"] for text in texts]
        if case.get("eos_token", "") != "</s>":
            info = ask([{"op": "info"}], directory)[0]
            assert (info["bos"], info["eos"]) == (reference.bos_token_id, reference.eos_token_id), case
    real.write_config(tmp_path / "0", chat_template=real.PHI3_TEMPLATE)
    (tmp_path / "0" / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [32000, 32007]}')
    assert [ask([{"op": "info"}], tmp_path / "0")[0][key] for key in ("bos", "eos")] == [1, 32000]
    (tmp_path / "0" / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "<unk>"}, "eos_token": "<|endoftext|>"}'
    )
    assert [ask([{"op": "info"}], tmp_path / "0")[0][key] for key in ("bos", "eos")] == [0, 32000]


def test_sentencepiece_model_with_added_tokens(tmp_path, rows):
    """A directory of tokenizer.model and tokenizer_config.json alone, as Phi-3's older ones."""
    directory = real.make_mistral(tmp_path / "model", "model", real.PHI3_TEMPLATE)
    tokens = {32000 + i: text for i, text in enumerate(real.PHI3_ADDED)} | {2: "</s>"}
    real.write_config(
        directory,
        chat_template=real.PHI3_TEMPLATE,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        add_bos_token=False,
        added_tokens_decoder={
            str(i): {"content": text, "rstrip": i != 32000, "special": i != 2, "normalized": False}
            for i, text in tokens.items()
        },
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = {text: i for i, text in tokens.items()}
    pattern = re.compile(
        "|".join(f"({re.escape(text)}{'' if i == 32000 else chr(92) + 's*'})" for i, text in tokens.items())
    )
    texts = [
        "<|user|>\n"
        + row["prompt"]
        + "<|end|>\n<|assistant|>\n"
        + row["chosen"][-1]["content"]
        + "<|end|>\n</s> <|endoftext|> x"
        for row in rows[:100]
    ]
    wanted = []
    for text in texts:
        done, line = 0, []
        for match in pattern.finditer(text):
            line += library.encode(text[done : match.start()]) + [ids[match.group().rstrip()]]
            done = match.end()
        wanted.append(line + library.encode(text[done:]))
    check_equal(ids_of(texts, directory, added=True), wanted, texts)
    info = ask([{"op": "info"}], directory)[0]
    assert (info["format"], info["vocabulary_size"], info["bos"], info["eos"]) == ("phi3", 32011, 1, 32000)


@pytest.mark.parametrize(
    "flags",
    [
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
    ],
)
def test_sentencepiece_model_adds_what_it_is_told(tmp_path, flags):
    directory = real.make_mistral(tmp_path / "model", "model")
    real.write_config(
        directory, bos_token="<s>", eos_token="</s>", tokenizer_class="LlamaTokenizer", legacy=False, **flags
    )
    reference = transformers.LlamaTokenizer.from_pretrained(directory)
    texts = ["hi", "", "a</s>\nb", " a", "</s>x </s> x", "\u2581"]
    assert ids_of(texts, directory, added=True) == [reference(text)["input_ids"] for text in texts]


def test_the_template_file_goes_first_and_none_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    assert ask([{"op": "info"}], variant(tmp_path / "a", CHATML, jinja=SMOLLM2))[0]["format"] == "chatml-smollm2"
    (tmp_path / "b").mkdir()
    code, message = complaint(variant(tmp_path / "b"))
    assert code == 78 and "no chat template" in message and "chatml-smollm2" in message


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def set_pre_tokenizer(*steps):
    def change(content):
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}

    return change


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


PLAIN_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def llama3_like(content):
    set_pre_tokenizer(split({"Regex": LLAMA3}), PLAIN_BYTES)(content)
    content["model"]["ignore_merges"] = True


def flagged_tokens(content):
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    vocabulary, next_id = content["model"]["vocab"], 49152
    for text, changed in [
        ("<L>", {"lstrip": True}),
        ("<R>", {"rstrip": True, "special": True, "normalized": False}),
        ("and", {"single_word": True}),
        ("andy", {}),
        (" New", {}),
        ("é", {"single_word": True}),
        ("<LR>", {"lstrip": True, "rstrip": True}),
    ]:
        content["added_tokens"].append({"id": vocabulary.get(text, next_id), "content": text, **flags, **changed})
        next_id += text not in vocabulary


COMPONENTS = {
    "llama3": llama3_like,
    "byte_level_prefix_space": set_pre_tokenizer({**PLAIN_BYTES, "add_prefix_space": True, "use_regex": True}),
    "digits_together": set_pre_tokenizer(
        {"type": "Digits", "individual_digits": False}, {**PLAIN_BYTES, "use_regex": True}
    ),
    "literal_pattern": set_pre_tokenizer(
        split({"String": "a.b"}), split({"String": "\n"}, "MergedWithNext"), PLAIN_BYTES
    ),
    **{
        f"split_{behavior}_{invert}": set_pre_tokenizer(split({"Regex": r"\s|[aeiou]"}, behavior, invert), PLAIN_BYTES)
        for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
        for invert in (False, True)
    },
    "class_with_bracket": set_pre_tokenizer(split({"Regex": r"[]a-c]+|[^]\S]+|^x|$"}), PLAIN_BYTES),
    "no_pre_tokenizer_but_bytes": lambda content: content.update(pre_tokenizer=PLAIN_BYTES),
    "added_token_flags": flagged_tokens,
    "unknown_token": lambda content: (
        content.update(pre_tokenizer=None),
        content["model"].update(unk_token="<|endoftext|>"),
    ),
    "unknown_fused": lambda content: (
        content.update(pre_tokenizer=None),
        content["model"].update(unk_token="<|endoftext|>", fuse_unk=True),
    ),
    "merges_as_pairs": lambda content: content["model"].update(
        merges=[merge.split(" ") for merge in content["model"]["merges"]]
    ),
    "no_decoder": lambda content: content.update(decoder=None),
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_other_components(tmp_path, rows, name):
    directory = variant(tmp_path, SMOLLM2, tokenizer=COMPONENTS[name])
    reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = (
        NASTY
        + random_texts(seed=4, count=300)
        + row_texts(rows[:40])
        + [
            "x <L> y<L>z  <L>",
            "x <R> y<R>  \n z",
            "and andy sand and_ and-and (and) andé and",
            "New York New",
            "é eé é. naïé",
            "a  <LR>  <LR> b",
            "a.b axb a.ba.b",
            "<L><R><LR> <L>",
            "and\u200dx and\u0301 2and",
        ]
    )
    wanted = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    answers = ask([{"op": "encode", "text": text} for text in texts], directory)
    for text, ids, answer in zip(texts, wanted, answers):
        assert answer["ids"] == ids, repr(text)
    answers = ask([{"op": "decode", "ids": ids, "skip_special": True} for ids in wanted], directory)
    for ids, answer in zip(wanted, answers):
        assert answer["text"] == reference.decode(ids, skip_special_tokens=True)


def set_spaces(**changes):
    """Mistral's tokenizer with a Metaspace in place of its normalizer."""

    def change(content):
        metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True, **changes}
        content.update(
            normalizer=None, pre_tokenizer=metaspace, decoder={k: v for k, v in metaspace.items() if k != "split"}
        )

    return change


def tokens_in_normalized_text(content):
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    vocabulary, next_id = content["model"]["vocab"], 32000
    for text, changed in [
        ("note", {}),
        (" New", {}),
        ("<L>", {"lstrip": True}),
        ("<R>", {"rstrip": True}),
        ("and", {"single_word": True}),
    ]:
        content["added_tokens"].append({"id": vocabulary.get(text, next_id), "content": text, **flags, **changed})
        next_id += text not in vocabulary


def merge_across_spaces(content):
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for left, right in [("e", "\u2581"), ("e\u2581", "a"), ("\u2581", "o"), ("e", "\u2581o")]:
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.insert(0, [left, right])


def without_byte_fallback(content, **changes):
    content["model"].update(byte_fallback=False, **changes)


SPACED_COMPONENTS = {
    "split_always": set_spaces(),
    "split_first": set_spaces(prepend_scheme="first"),
    "split_never": set_spaces(prepend_scheme="never"),
    "whole_always": set_spaces(split=False),
    "older_file": lambda content: (set_spaces()(content), content["pre_tokenizer"].pop("prepend_scheme")),
    "first_after_split": lambda content: (
        set_spaces(prepend_scheme="first")(content),
        content.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [split({"Regex": "[xyz]"}, "Removed"), content["pre_tokenizer"]],
            }
        ),
    ),
    "tokens_in_normalized_text": tokens_in_normalized_text,
    "merge_across_spaces": merge_across_spaces,
    "unknown_fused": without_byte_fallback,
    "unknown_apart": lambda content: without_byte_fallback(content, fuse_unk=False),
    "unknown_dropped": lambda content: without_byte_fallback(content, unk_token=None),
    "some_bytes": lambda content: [content["model"]["vocab"].pop(f"<0x{byte:02X}>") for byte in (0xE0, 0xF0, 0x0A)],
    "regular_expression": lambda content: content["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"Regex": "[0-9]+|(?=Q)"}, "content": "#"}
    ),
    "strip_once_more": lambda content: content["decoder"]["decoders"].append(
        {"type": "Strip", "content": "e", "start": 2, "stop": 0}
    ),
    "byte_fallback_and_join": lambda content: content.update(decoder={"type": "ByteFallback"}),
}


@pytest.mark.parametrize("name", SPACED_COMPONENTS)
def test_components_with_spaces(tmp_path, model_directory, rows, name):
    content = json.loads((model_directory("mistral_legacy") / "tokenizer.json").read_text(encoding="utf-8"))
    SPACED_COMPONENTS[name](content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = (
        NASTY
        + [text[:200] for text in MODEL_NASTY]
        + random_texts(seed=7, count=300)
        + row_texts(rows[:20])
        + [
            "note notes note",
            "x New New",
            "a  <L> b<R>  c",
            "and andy sand and",
            "the one and e an",
            "12 Q3QQ",
            "x y xx z",
            "ee e",
        ]
    )
    wanted = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
    check_equal(ids_of(texts, tmp_path), wanted, texts)
    lists = [ids for ids in wanted if ids] + random_ids(32000)[:200]
    check_equal(texts_of(lists, tmp_path, True), reference.decode_batch(lists, skip_special_tokens=True), lists)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda c: c.update(normalizer={"type": "NFC"}), "normalizer NFC"),
        (lambda c: c.update(pre_tokenizer={"type": "BertPreTokenizer"}), "pre-tokenizer BertPreTokenizer"),
        (lambda c: c.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "decoder WordPiece"),
        (
            lambda c: c.update(post_processor={"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}),
            "post-processor BertProcessing",
        ),
        (
            lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
            "normalizer Lowercase",
        ),
        (
            lambda c: c.update(post_processor={"type": "TemplateProcessing", "single": [], "special_tokens": {}}),
            "without $A",
        ),
        (set_pre_tokenizer({"type": "Metaspace", "replacement": "_", "prepend_scheme": "sometimes"}), "sometimes"),
        (set_pre_tokenizer({"type": "Metaspace", "replacement": "_", "add_prefix_space": False}), "add_prefix_space"),
        (lambda c: c["model"].update(type="Unigram"), "model Unigram"),
        (lambda c: c["model"].update(dropout=0.1), "dropout"),
        (lambda c: c["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda c: c["model"]["merges"].append("zzzzqqq y"), "zzzzqqq"),
        (lambda c: c["added_tokens"][0].update(id=5), "<|endoftext|>"),
        (lambda c: c["model"]["vocab"].update({"new": -1}), "new"),
        (lambda c: c["model"]["vocab"].update({"new": 1 << 40}), "new"),
        (set_pre_tokenizer(split({"Regex": r"\w+"}), PLAIN_BYTES), "\\w"),
        (set_pre_tokenizer(split({"Regex": "("}), PLAIN_BYTES), "expression ("),
        (set_pre_tokenizer(split({"Regex": "a"}, "Sideways"), PLAIN_BYTES), "Sideways"),
        (lambda c: c.pop("model"), "model"),
        (lambda c: c.update(model=[]), "model"),
        (lambda c: c.update(added_tokens=[17]), "added_tokens"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, named):
    code, message = complaint(variant(tmp_path, SMOLLM2, tokenizer=change))
    assert code == 78 and named in message and str(tmp_path / "tokenizer.json") in message


def test_missing_and_damaged_files(tmp_path):
    code, message = complaint(tmp_path)
    assert code == 78 and "tokenizer.json" in message
    (tmp_path / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes()[:100_000])
    code, message = complaint(tmp_path)
    assert code == 78 and str(tmp_path / "tokenizer.json") in message
    (tmp_path / "tokenizer.json").write_text("[" * 1_000_000)
    assert complaint(tmp_path)[0] == 78
