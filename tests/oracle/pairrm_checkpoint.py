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


HIDDEN, LAYERS = 128, 2  # heads of 64, as DeBERTa-v3's


def encoder_config(vocabulary: int):
    from transformers import DebertaV2Config
    return DebertaV2Config(
        vocab_size=vocabulary, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HIDDEN // 64,
        intermediate_size=2 * HIDDEN, hidden_act="gelu", layer_norm_eps=1e-7, max_position_embeddings=512,
        max_relative_positions=-1, position_buckets=256, relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0, pad_token_id=0)


def make_weights(vocabulary: int, seed: int) -> dict:
    """Random weights under the originals' names, large enough that logits differ by more than rounding."""
    import torch
    from transformers import DebertaV2Model
    torch.manual_seed(seed)
    encoder = DebertaV2Model(encoder_config(vocabulary))
    tensors = {}
    for name, value in encoder.state_dict().items():
        value = value.float()
        if value.dim() == 2:
            value = torch.randn_like(value) * (1.0 if "word_embeddings" in name else 0.12)
        elif name.endswith("bias"):
            value = torch.randn_like(value) * 0.1
        else:
            value = 1 + torch.randn_like(value) * 0.1
        tensors["pretrained_model." + name] = value.contiguous()
    tensors["head_layer.1.weight"] = torch.randn(HIDDEN, 2 * HIDDEN) * 0.08
    tensors["head_layer.1.bias"] = torch.randn(HIDDEN) * 0.1
    tensors["head_layer.4.weight"] = torch.randn(1, HIDDEN) * 0.2
    tensors["head_layer.4.bias"] = torch.randn(1) * 0.1
    return tensors


def save_weights(directory: Path, tensors: dict) -> None:
    from safetensors.torch import save_file
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def make_config(directory: Path, layout: str, tokenizer, source: int, candidate: int) -> None:
    """config.json of llm-blender/PairRM ("original": a RankerConfig) or PairRM-hf ("hf")."""
    if layout == "original":
        config = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": "microsoft/deberta-v3-large", "cache_dir": None,
                  "load_checkpoint": None, "n_tasks": 1, "num_pos": 1, "num_neg": 1, "loss_type": "instructgpt", "reduce_type": "linear",
                  "inference_mode": "bubble", "drop_out": 0.05, "fp16": True, "device": "cpu"}
    else:
        config = encoder_config(len_of(tokenizer)).to_dict()
        config |= {"architectures": ["DebertaV2PairRM"], "n_tasks": 1, "drop_out": 0.05}
        config |= {f"{name}_prefix_id": tokenizer.token_to_id(token)
                   for name, token in zip(["source", "cand1", "cand2", "cand"], PREFIXES, strict=True)}
    config |= {"source_maxlength": source, "candidate_maxlength": candidate}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def len_of(tokenizer) -> int:
    return tokenizer.get_vocab_size(with_added_tokens=True)


def make_ranker(directory: Path, *, model: Path, layout: str, source: int, candidate: int, seed: int):
    """A whole ranker's directory; returns the reference tokenizer."""
    tokenizer = make_tokenizer(directory, model=model, normalized=layout == "original")
    make_config(directory, layout, tokenizer, source, candidate)
    save_weights(directory, make_weights(len_of(tokenizer), seed))
    return tokenizer
