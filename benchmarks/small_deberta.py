#!/usr/bin/env python3
"""A small random DeBERTa-v2 directory to train a pair ranker from: a SentencePiece model of the sample's first 900 rows.

usage: small_deberta.py DIRECTORY

What a ranker learns from 740 rows, beside a coin and "the longer answer wins":
    python3 benchmarks/small_deberta.py runs/deberta
    selm_import --input data/ultrafeedback_sample.jsonl --rows 160:900 --on-empty-answer keep --output runs/train.h5
    selm_train --objective pairrm --data runs/train.h5 --policy runs/deberta --output runs/ranker --dtype fp32 --save-dtype fp32 \\
        --learning-rate 1e-3 --global-batch 16 --epochs 1
    selm_import --input data/ultrafeedback_sample.jsonl --rows 900:1000 --on-empty-answer keep --output runs/test.h5
    selm_gen --data runs/test.h5 --responses none --output runs/rows.h5
    selm_rank --iter runs/rows.h5 --ranker pairrm:runs/ranker
    python3 benchmarks/reward_accuracy.py runs/rows.h5

Needs the reference environment (scripts/deps --reference).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "oracle"))
import pairrm_checkpoint as checkpoints  # noqa: E402


def main():
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    import torch
    from transformers import DebertaV2Model
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    model = directory / "spm.model"
    checkpoints.train_sentencepiece(model, pieces=4000, rows=900)
    model.with_suffix(".vocab").unlink()
    vocabulary = 4000 + 5  # [MASK] and PairRM's tokens
    torch.manual_seed(0)
    config = checkpoints.encoder_config(vocabulary)
    checkpoints.save_weights(directory, {"deberta." + name: value.contiguous() for name, value in DebertaV2Model(config).state_dict().items()})
    lengths = {"source_maxlength": 128, "candidate_maxlength": 128}
    (directory / "config.json").write_text(json.dumps(config.to_dict() | lengths), encoding="utf-8")
    print(f"{directory}: {config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {vocabulary}")


if __name__ == "__main__":
    main()
