"""Makes small pair rankers in the layouts of llm-blender/PairRM and PairRM-hf: a SentencePiece unigram tokenizer trained on
the sample rows (ids as in DeBERTa-v3: [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3, pieces, [MASK], then PairRM's prefix tokens) and
random weights. Used by test_pairrm.py."""

import json
import shutil
import types
from pathlib import Path

import sentencepiece
import tokenizers
from transformers.convert_slow_tokenizer import DebertaV2Converter

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "ultrafeedback_sample.jsonl"
PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


def sample_rows(begin: int, end: int) -> list[dict]:
    lines = SAMPLE.read_text(encoding="utf-8").split("\n")[begin:end]
    return [json.loads(line) for line in lines]


def row_texts(row: dict) -> list[str]:
    return [row["prompt"], row["chosen"][-1]["content"], row["rejected"][-1]["content"]]


def train_sentencepiece(path: Path, pieces: int, rows: int = 120) -> None:
    """Byte fallback is on, as in DeBERTa-v3's model: the fast tokenizer does not use it."""
    sentences = [line for row in sample_rows(0, rows) for text in row_texts(row) for line in text.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(path.with_suffix("")), vocab_size=pieces, model_type="unigram",
        byte_fallback=True, pad_id=0, pad_piece="[PAD]", bos_id=1, bos_piece="[CLS]", eos_id=2, eos_piece="[SEP]", unk_id=3,
        unk_piece="[UNK]", normalization_rule_name="nmt_nfkc", character_coverage=0.998, num_threads=1, minloglevel=2)


def convert_tokenizer(model: Path, *, normalized: bool) -> tokenizers.Tokenizer:
    """transformers' own conversion of a DeBERTa-v2 SentencePiece model; the prefix tokens as LLM-Blender adds them
    (normalized: Hugging Face's default for tokens that are not special)."""
    proto = sentencepiece.SentencePieceProcessor(model_file=str(model))
    slow = types.SimpleNamespace(vocab_file=str(model), split_by_punct=False, do_lower_case=False, add_prefix_space=True,
                                 convert_tokens_to_ids=proto.piece_to_id)
    tokenizer = DebertaV2Converter(slow).converted()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in [*SPECIALS, "[MASK]"]])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=normalized) for token in PREFIXES])
    return tokenizer


def make_tokenizer(directory: Path, *, model: Path, normalized: bool, files: tuple[str, ...] = ("json", "spm")) -> tokenizers.Tokenizer:
    """Writes the tokenizer's files and returns the reference."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = convert_tokenizer(model, normalized=normalized)
    if "json" in files:
        tokenizer.save(str(directory / "tokenizer.json"))
    if "spm" in files:
        shutil.copy(model, directory / "spm.model")
    added = {token: tokenizer.token_to_id(token) for token in ["[MASK]", *PREFIXES]}
    (directory / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False, "split_by_punct": False, "sp_model_kwargs": {},
         "vocab_type": "spm", "model_max_length": 1000000000000000019884624838656}), encoding="utf-8")
    (directory / "special_tokens_map.json").write_text(json.dumps(
        {"bos_token": "[CLS]", "cls_token": "[CLS]", "eos_token": "[SEP]", "sep_token": "[SEP]", "pad_token": "[PAD]",
         "mask_token": "[MASK]", "unk_token": "[UNK]"}), encoding="utf-8")
    return tokenizer
