"""PairRM against independent implementations: the tokenizer against transformers' conversion of the same SentencePiece model."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")
tokenizers = pytest.importorskip("tokenizers")

import pairrm_checkpoint as checkpoints  # noqa: E402 (imports what is checked above)

ROOT = Path(__file__).resolve().parents[2]
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
