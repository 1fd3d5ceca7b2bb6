"""TRL's DPOTrainer on the same pairs (no optimism term), one epoch; reference log-probs in the step or computed before."""

import os
import tempfile
import time

from common import emit, load_decoder, peer_parser, read_rows, synchronize


def main():
    parser = peer_parser(__doc__, ("--pairs", "lines {prompt, best, worst, generated} of token ids"))
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--precompute", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=5e-7)
    parser.add_argument("--steps", type=int, default=1)
    a = parser.parse_args()
    os.environ.update(TQDM_DISABLE="1", HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(a.threads)
    rows = read_rows(a.pairs)
    seconds = {}

    class Times(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            synchronize(a.device)
            seconds.setdefault("start", time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            synchronize(a.device)
            seconds["train"] = time.perf_counter() - seconds["start"]

    class OnIds(DPOTrainer):
        """The ids are given: nothing to tokenize; rows in their order."""

        def _get_train_sampler(self, *words, **more):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset, *rest, **more):
            return dataset

        def _precompute_ref_logps(self, *words, **more):
            start = time.perf_counter()
            done = super()._precompute_ref_logps(*words, **more)
            seconds["precompute"] = seconds.get("precompute", 0) + time.perf_counter() - start
            return done

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch
        data = Dataset.from_list([{"prompt_ids": row["prompt"], "chosen_ids": row["best"], "rejected_ids": row["worst"]} for row in rows])
        config = DPOConfig(output_dir=scratch, per_device_train_batch_size=a.micro_batch, gradient_accumulation_steps=len(rows) // a.steps // a.micro_batch, max_steps=a.steps,
                           beta=a.beta, learning_rate=a.learning_rate, lr_scheduler_type="constant", bf16=a.dtype == "bfloat16", max_length=1024,
                           gradient_checkpointing=a.checkpointing, precompute_ref_log_probs=a.precompute, precompute_ref_batch_size=a.micro_batch,
                           use_cpu=a.device == "cpu", report_to=[], save_strategy="no", logging_steps=1, max_grad_norm=0.0, dataloader_pin_memory=False,
                           weight_decay=0.0)
        policy, reference = load_decoder(a.model, a.dtype), load_decoder(a.model, a.dtype)
        trainer = OnIds(model=policy, ref_model=reference, args=config, train_dataset=data, callbacks=[Times()],
                        processing_class=AutoTokenizer.from_pretrained(a.model))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total = seconds["train"] + seconds.get("precompute", 0.0)
    emit({"seconds": total, "train_s": seconds["train"], "precompute_s": seconds.get("precompute", 0.0), "pairs": len(rows), "loss": losses[-1] if losses else None})


main()
