#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/phases/generate.hpp"

namespace selm {

/// Options of selm_train ([train]).
struct TrainOptions {
    CommonOptions common;
    EncodingOptions encoding;
    std::string iter;                      ///< iter.h5 with /pairs and /logprobs/reference (objective selm)
    std::string data;                      ///< prefs.h5 (objectives bradley-terry and pairrm)
    std::string rows;                      ///< A:B, rows of `data`; empty: all
    std::string policy;                    ///< model directory to start from
    std::string output;                    ///< model directory to write
    std::string objective = "selm";        ///< selm | bradley-terry | pairrm
    std::string trainable = "all";         ///< all | head (bradley-terry only)
    std::string reference = "reference";   ///< /logprobs/NAME
    std::vector<double> alpha = {0.001};   ///< by iteration (last value repeats)
    std::vector<double> beta = {0.01};
    std::vector<double> learning_rate = {5e-7};
    std::string schedule = "cosine";
    double warmup_ratio = 0.1;
    std::int64_t global_batch = 256;       ///< rows per optimizer step
    std::int64_t tokens_per_microbatch = 1024;
    std::int64_t epochs = 1;
    bool shuffle = true;
    double max_grad_norm = 0;              ///< 0: no clipping (the recipe's value)
    double adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8, weight_decay = 0;
    std::int64_t zero = 1;                 ///< 0 | 1 | 2 | 3
    std::string zero3_group = "world";     ///< world | node: ranks that the parameters are cut over at stage 3
    std::int64_t prefetch = 1;             ///< layers gathered ahead at stage 3
    std::int64_t bucket_bytes = std::int64_t{256} << 20; ///< of gradient that is reduced at once
    std::string accumulate_dtype = "fp32"; ///< fp32 | bf16: gradients as they are kept and sent
    std::string recompute = "none";        ///< none | layers | auto: activations that backward computes again
    std::int64_t activation_bytes = 0;     ///< budget of a rank's pass; 0: none
    std::string offload = "none";          ///< none | optimizer: what is on the host when training on a device
    std::int64_t node_ranks = 0;           ///< ranks that share memory at most; 0: all of a host
    std::vector<std::string> freeze;       ///< patterns of tensors that are not trained
    std::string save_dtype = "bf16";       ///< bf16 | fp32
    std::int64_t checkpoint_every = 0;     ///< optimizer steps; 0: only when stopped
    std::int64_t keep = 2;
    std::string resume = "auto";           ///< auto | never
    std::string stop_file;
    std::int64_t max_steps = 0;            ///< 0: all; otherwise stop (75) with a checkpoint after so many steps of this run

    void describe(OptionVisitor& visitor);
    void validate() const;
};

/// Means over the steps of the run's last epoch unless said otherwise; global over ranks.
struct TrainReport {
    Outcome outcome = Outcome::done;
    std::int64_t rows = 0, steps = 0, resumed_from_step = 0;
    double loss = 0, loss_dpo = 0, loss_optimism = 0;
    double reward_margin = 0, reward_accuracy = 0;
    double first_loss = 0, last_loss = 0;
    std::int64_t tokens = 0;
    double seconds = 0;
};

/// Trains and writes a Hugging Face directory with metrics.jsonl and checkpoints/. Collective over comm.
TrainReport run_train(const TrainOptions& options, Communicator& comm);

} // namespace selm
