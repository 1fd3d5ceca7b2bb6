#include <cmath>

#include "selm/algo/schedule.hpp"
#include "selm/base/error.hpp"
#include "selm/phases/train.hpp"

namespace selm {

namespace {

void at_least(const char* name, std::int64_t value, std::int64_t lowest)
{
    SELM_VALIDATE(value >= lowest, ExitCode::usage,
                  "--" << name << " " << value << " is too small. Use " << lowest << " or more");
}

void not_negative(const char* name, double value)
{
    SELM_VALIDATE(std::isfinite(value) && value >= 0, ExitCode::usage,
                  "--" << name << " " << value << " is out of range. Use 0 or more");
}

void list_of(const char* name, const std::vector<double>& values)
{
    SELM_VALIDATE(!values.empty(), ExitCode::usage, "--" << name << " has no value. Pass one, or one per iteration");
    for (const double value : values)
        not_negative(name, value);
}

} // namespace

void TrainOptions::describe(OptionVisitor& visitor)
{
    using enum OptionRole;
    common.describe(visitor);
    encoding.describe(visitor);
    visitor.option("train", "iter", iter, "iter.h5 with /pairs and log-probs (objective selm)", operational);
    visitor.option("train", "data", data, "prefs.h5 (objectives bradley-terry and pairrm)", operational);
    visitor.option("train", "rows", rows, "rows A:B of --data (0-based, B excluded); empty: all", recipe);
    visitor.option("train", "policy", policy, "Hugging Face model directory to start from", operational);
    visitor.option("train", "output", output, "model directory to write", operational);
    visitor.option("train", "objective", objective, "selm|bradley-terry|pairrm", recipe);
    visitor.option("train", "trainable", trainable, "all|head (head: bradley-terry only, on the frozen decoder)",
                   recipe);
    visitor.option("train", "reference", reference, "which log-probs are the reference's: group under /logprobs",
                   recipe);
    visitor.option("train", "alpha", alpha, "weight of the optimism term, by iteration (0: iterative DPO)", recipe);
    visitor.option("train", "beta", beta, "strength of the tie to the reference, by iteration", recipe);
    visitor.option("train", "learning-rate", learning_rate, "peak learning rate, by iteration", recipe);
    visitor.option("train", "schedule", schedule, "cosine|linear|constant, after the warm-up", recipe);
    visitor.option("train", "warmup-ratio", warmup_ratio, "part of the steps that warms up", recipe);
    visitor.option("train", "global-batch", global_batch, "rows per optimizer step, over all ranks", recipe);
    visitor.option("train", "tokens-per-microbatch", tokens_per_microbatch, "packed tokens computed together per rank",
                   operational);
    visitor.option("train", "epochs", epochs, "passes over the rows", recipe);
    visitor.option("train", "shuffle", shuffle, "on|off: seeded order of rows in each epoch", recipe);
    visitor.option("train", "max-grad-norm", max_grad_norm, "clip the gradient's norm (0: off, the recipe's value)",
                   recipe);
    visitor.option("train", "adam-beta1", adam_beta1, "AdamW: decay of the first moment", recipe);
    visitor.option("train", "adam-beta2", adam_beta2, "AdamW: decay of the second moment", recipe);
    visitor.option("train", "adam-epsilon", adam_epsilon, "AdamW: added to the root of the second moment", recipe);
    visitor.option("train", "weight-decay", weight_decay, "AdamW: decoupled weight decay", recipe);
    visitor.option("train", "zero", zero,
                   "0|1|2|3: what is cut over the ranks: nothing, optimizer state, gradients too, parameters too",
                   operational);
    visitor.option("train", "zero3-group", zero3_group,
                   "world|node: at --zero 3, parameters cut over all ranks, or over those of each node", operational);
    visitor.option("train", "prefetch", prefetch, "at --zero 3, layers that are gathered ahead", operational);
    visitor.option("train", "bucket-bytes", bucket_bytes,
                   "gradient that is reduced at once, at most (a larger parameter is one piece)", operational);
    visitor.option("train", "accumulate-dtype", accumulate_dtype,
                   "fp32|bf16: gradients as they are kept between passes and sent (sums are fp32)", recipe);
    visitor.option("train", "recompute", recompute,
                   "none|layers|auto: layers whose activations backward computes again (auto: as few as fit "
                   "--activation-bytes)",
                   operational);
    visitor.option("train", "activation-bytes", activation_bytes,
                   "activations of a rank's pass, at most; rows that cannot fit are refused at start (0: no limit)",
                   operational);
    visitor.option("train", "offload", offload,
                   "none|optimizer: with --device cuda, master weights, moments and sums of gradients on the host",
                   operational);
    visitor.option("train", "node-ranks", node_ranks,
                   "ranks that share memory at most, say those of a NUMA domain (0: all of a host)", operational);
    visitor.option("train", "freeze", freeze,
                   "tensors that are not trained: names with * and ?, separated by commas", recipe);
    visitor.option("train", "save-dtype", save_dtype, "bf16|fp32: type of the written weights", recipe);
    visitor.option("train", "checkpoint-every", checkpoint_every,
                   "optimizer steps between checkpoints (0: only when stopped)", operational);
    visitor.option("train", "keep", keep, "newest checkpoints that stay", operational);
    visitor.option("train", "resume", resume, "auto|never: go on from the newest checkpoint", operational);
    visitor.option("train", "stop-file", stop_file, "stop, with everything saved, when this file appears", operational);
    visitor.option("train", "max-steps", max_steps, "stop after so many steps of this run (0: all)", operational);
}

void TrainOptions::validate() const
{
    common.validate();
    encoding.validate();
    const bool reward = objective == "bradley-terry" || objective == "pairrm"; // a ranker, from preference rows
    SELM_VALIDATE(reward || objective == "selm", ExitCode::usage,
                  "--objective " << objective << " is not known. Use one of selm|bradley-terry|pairrm");
    SELM_VALIDATE(trainable == "all" || trainable == "head", ExitCode::usage,
                  "--trainable " << trainable << " is not known. Use one of all|head");
    SELM_VALIDATE(objective == "bradley-terry" || trainable == "all", ExitCode::usage,
                  "--trainable head is for --objective bradley-terry (only there the decoder's outputs are kept). Use all");
    SELM_VALIDATE(reward || !iter.empty(), ExitCode::usage,
                  "--iter is missing (there are no rows). Pass --iter iter.h5");
    SELM_VALIDATE(!reward || !data.empty(), ExitCode::usage,
                  "--data is missing (there are no rows). Pass --data prefs.h5");
    SELM_VALIDATE(!policy.empty(), ExitCode::usage,
                  "--policy is missing (training starts from a model). Pass --policy DIR");
    SELM_VALIDATE(!output.empty(), ExitCode::usage,
                  "--output is missing (the model needs a directory). Pass --output DIR");
    list_of("alpha", alpha);
    list_of("beta", beta);
    list_of("learning-rate", learning_rate);
    parse_schedule(schedule);
    SELM_VALIDATE(warmup_ratio >= 0 && warmup_ratio <= 1, ExitCode::usage,
                  "--warmup-ratio " << warmup_ratio << " is out of range. Use 0 to 1");
    at_least("global-batch", global_batch, 1);
    at_least("tokens-per-microbatch", tokens_per_microbatch, 1);
    at_least("epochs", epochs, 1);
    at_least("keep", keep, 1);
    at_least("checkpoint-every", checkpoint_every, 0);
    at_least("max-steps", max_steps, 0);
    not_negative("max-grad-norm", max_grad_norm);
    not_negative("weight-decay", weight_decay);
    SELM_VALIDATE(
        adam_beta1 >= 0 && adam_beta1 < 1 && adam_beta2 >= 0 && adam_beta2 < 1 && adam_epsilon > 0, ExitCode::usage,
        "the AdamW constants are out of range. Use 0 <= --adam-beta1, --adam-beta2 < 1 and --adam-epsilon > 0");
    SELM_VALIDATE(zero >= 0 && zero <= 3, ExitCode::usage, "--zero " << zero << " is not known. Use one of 0|1|2|3");
    SELM_VALIDATE(zero3_group == "world" || zero3_group == "node", ExitCode::usage,
                  "--zero3-group " << zero3_group << " is not known. Use one of world|node");
    SELM_VALIDATE(zero != 3 || objective == "selm" || (objective == "bradley-terry" && trainable == "all"),
                  ExitCode::configuration,
                  "--zero 3 is for decoders (the parameters of "
                      << (objective == "pairrm" ? "pair rankers" : "a head") << " are not cut). Use --zero 2");
    at_least("prefetch", prefetch, 0);
    at_least("bucket-bytes", bucket_bytes, 4096);
    at_least("node-ranks", node_ranks, 0);
    at_least("activation-bytes", activation_bytes, 0);
    SELM_VALIDATE(recompute == "none" || recompute == "layers" || recompute == "auto", ExitCode::usage,
                  "--recompute " << recompute << " is not known. Use one of none|layers|auto");
    SELM_VALIDATE(recompute != "auto" || activation_bytes > 0, ExitCode::usage,
                  "--recompute auto has nothing to fit (it recomputes as little as a budget allows). Pass "
                  "--activation-bytes, or use --recompute layers");
    SELM_VALIDATE((recompute == "none" && activation_bytes == 0) || objective == "selm" ||
                      (objective == "bradley-terry" && trainable == "all"),
                  ExitCode::configuration,
                  "--recompute and --activation-bytes are for decoders ("
                      << (objective == "pairrm" ? "pair rankers keep" : "a head alone keeps")
                      << " all activations). Leave them out");
    SELM_VALIDATE(accumulate_dtype == "fp32" || accumulate_dtype == "bf16", ExitCode::usage,
                  "--accumulate-dtype " << accumulate_dtype << " is not known. Use one of fp32|bf16");
    SELM_VALIDATE(accumulate_dtype == "fp32" || zero > 0, ExitCode::usage,
                  "--accumulate-dtype bf16 saves nothing at --zero 0 (every rank keeps the summed gradient in fp32). "
                  "Use --zero 1 or higher");
    SELM_VALIDATE(save_dtype == "bf16" || save_dtype == "fp32", ExitCode::usage,
                  "--save-dtype " << save_dtype << " is not known. Use one of bf16|fp32");
    SELM_VALIDATE(resume == "auto" || resume == "never", ExitCode::usage,
                  "--resume " << resume << " is not known. Use one of auto|never");
    SELM_VALIDATE(offload == "none" || offload == "optimizer", ExitCode::usage,
                  "--offload " << offload << " is not known. Use one of none|optimizer");
    const bool on_device = common.device != "cpu";
    SELM_VALIDATE(on_device || offload == "none", ExitCode::usage,
                  "--offload " << offload << " is for training on a device (here everything is on the host already). "
                                             "Leave it out, or pass --device cuda");
    SELM_VALIDATE(!on_device || (offload == "optimizer" && objective == "selm" && zero <= 2), ExitCode::configuration,
                  "training on --device " << common.device
                                          << " is built for --objective selm with --offload optimizer and --zero 0 to 2 "
                                             "(optimizer state on the device, and parameters cut over devices, are "
                                             "not). Pass these, or --device cpu");
    SELM_VALIDATE(!reward || encoding.encoding == "chat", ExitCode::usage,
                  "--encoding " << encoding.encoding
                                << " is for policies (rankers have an encoding of their own). Use --encoding chat");
}

} // namespace selm
