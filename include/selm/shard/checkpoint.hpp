#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/shard/flat_layout.hpp"
#include "selm/shard/optimizer.hpp"

namespace selm {

/// Where training stands: what is needed besides the weights and moments to go on as if nothing had happened (the order
/// of rows is a function of seed, iteration and epoch, so the cursor is all there is to keep of the data).
struct CheckpointState {
    std::int64_t step = 0;       ///< optimizer steps done
    std::int64_t epoch = 0;      ///< 0-based epoch of the next step
    std::int64_t epoch_step = 0; ///< data cursor: global batches of this epoch already used
    std::string numerics = {};   ///< Engine::numerics() of the steps so far; empty: not known
};

/// What a checkpoint belongs to, as (name in words, value): another value of any of them means another training run.
using CheckpointBinding = std::vector<std::pair<std::string, std::string>>;

/**
 * @brief Checkpoints of one training run: "DIRECTORY/step-NNNNNN.h5" holds whole parameters by their Hugging Face names
 * (/parameters/NAME/{fp32,exp_avg,exp_avg_sq}, float32, row-major, with the attribute `shape`), "step-NNNNNN.json" the
 * manifest: state, binding, size and checksums of every byte. The state file is on the disk under its name before the
 * manifest is: a checkpoint without a manifest does not exist.
 *
 * Any number of ranks (and any ZeRO stage) reads what any other wrote. Checksums of tensors are sums over elements, so that
 * ranks make and check them for what they hold.
 */
class CheckpointStore {
  public:
    /// @param parameters, layout, comm borrowed. @param keep newest checkpoints that stay (>= 1). Not collective.
    CheckpointStore(std::string directory, std::int64_t keep, std::span<const ParameterSpec> parameters,
                    const FlatLayout& layout, Communicator& comm);

    /// Writes a checkpoint, then removes those beyond `keep` (damaged ones that load_latest() passed over do not count and
    /// go too). Collective. @throws Error io on every rank; older checkpoints are then still there.
    void save(const CheckpointState& state, const CheckpointBinding& binding, const ShardedAdamW& optimizer);

    /**
     * @brief Loads the newest checkpoint that is whole into the optimizer (master, moments, step count); a torn or
     * corrupt one is passed over with a warning that says why. The caller publishes the weights. Collective.
     * @return nothing when there is none (the state is then zero). @throws Error bad_data: there are some, but all are
     * damaged (starting anew is the user's decision), or the checkpoint belongs to another run (says what differs).
     */
    std::optional<CheckpointState> load_latest(const CheckpointBinding& binding, ShardedAdamW& optimizer);

    /// Path of the newest manifest, or empty. Looks at the disk; not collective.
    std::string newest() const;

  private:
    std::string stem(std::int64_t step) const;
    std::vector<std::int64_t> steps_on_disk() const; ///< with a manifest, newest first
    void remove_old();
    void remove_leftovers() const; ///< of saves that were killed
    void write_state(const std::string& path, const CheckpointState& state, const ShardedAdamW& optimizer) const;
    std::map<std::string, std::string> checksums(const ShardedAdamW& optimizer) const; ///< by kind, over all ranks
    /// Nothing, and `why`, when the checkpoint is damaged; the same on every rank.
    std::optional<CheckpointState> load(std::int64_t step, const CheckpointBinding& binding, ShardedAdamW& optimizer,
                                        std::string& why);

    std::string directory_;
    std::int64_t keep_;
    std::vector<std::int64_t> damaged_; ///< passed over by load_latest()
    std::span<const ParameterSpec> parameters_;
    const FlatLayout& layout_;
    Communicator& comm_;
};

} // namespace selm
