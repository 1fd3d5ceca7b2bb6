#pragma once

#include <memory>
#include <string>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/model/pair_model.hpp"
#include "selm/text/unigram_tokenizer.hpp"

namespace selm {

/**
 * @brief A pair ranker that only reads its weights: an engine per rank, one copy of the packed weights per node in
 * shared memory that the node's ranks fill together, and the tokenizer.
 *
 * Construction and destruction are collective over the communicator it was made with.
 */
class SharedPairModel {
  public:
    /// Reads a directory in the layout of llm-blender/PairRM or PairRM-hf. Collective over comm: when one rank fails,
    /// all throw its Error (configuration: no pair ranker there, tokenizer and weights that do not belong together, an
    /// engine that cannot run here; bad_data: malformed weights; io: no room for shared memory).
    /// @param dtype of the weights: "fp32" or "bf16"; options.dtype is not read.
    static std::unique_ptr<SharedPairModel> from_directory(const std::string& directory, const CommonOptions& options,
                                                           const std::string& dtype, Communicator& comm);
    ~SharedPairModel();
    SharedPairModel(const SharedPairModel&) = delete;
    SharedPairModel& operator=(const SharedPairModel&) = delete;

    const DebertaConfig& config() const;
    Engine& engine() const;
    PairModel& model() const;
    const UnigramTokenizer& tokenizer() const;
    const std::string& digest() const; ///< pair_model_digest(), computed on rank 0
    std::string engine_key() const;    ///< as SharedModel's

  private:
    struct Impl;
    explicit SharedPairModel(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

/// Digest of what a pair ranker's directory computes: weights (however sharded), config.json and the tokenizer's files.
/// Reads everything; not collective. @throws Error configuration or bad_data naming the file.
std::string pair_model_digest(const std::string& directory);

} // namespace selm
