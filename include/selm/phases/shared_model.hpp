#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/model/decoder.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/weights.hpp"

namespace selm {

/**
 * @brief A model that only reads its weights (generation, ranking, log-probs): an engine per rank and one copy of the
 * packed weights per node, in shared memory that the node's ranks fill together.
 *
 * Construction and destruction are collective over the communicator it was made with.
 */
class SharedModel {
  public:
    /// Reads a Hugging Face directory; logs the engine and its description once. Collective over comm: when one rank
    /// fails, all throw its Error (configuration: no model there, an unsupported one, or an engine that cannot run
    /// here; bad_data: malformed weights; io: no room for shared memory).
    /// @param known_digest model_digest(directory) where the caller has it already; the same on every rank.
    static std::unique_ptr<SharedModel> from_directory(const std::string& directory, const CommonOptions& options,
                                                       Communicator& comm, const std::string& known_digest = {});
    ~SharedModel();
    SharedModel(const SharedModel&) = delete;
    SharedModel& operator=(const SharedModel&) = delete;

    const std::string& directory() const;
    const DecoderConfig& config() const;
    Engine& engine() const;
    Decoder& decoder() const;
    WeightStore& weights() const;
    /// `work` is called before every layer of the decoder's passes from now on (none: empty), so that messages of others do
    /// not wait for a whole pass. It may not use the decoder.
    void set_between_layers(std::function<void()> work);
    /// model_digest(directory()), computed on rank 0.
    const std::string& digest() const;
    /// "NUMERICS DTYPE" (Engine::numerics): what a journal or a result is bound to besides the weights.
    std::string engine_key() const;

  private:
    struct Impl;
    explicit SharedModel(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

/// Digest of what a model directory computes: weights (however sharded), config.json, generation_config.json,
/// the tokenizer's files and the chat template.
/// Reads everything; not collective. @throws Error configuration or bad_data naming the file.
std::string model_digest(const std::string& directory);

/// Do a directory's tokenizer (ids 0..tokenizer_size-1) and model belong together? A model may have a few unused rows;
/// a much smaller tokenizer is warned about. @throws Error configuration naming both sizes when the model lacks ids.
void check_vocabulary(const std::string& directory, std::int64_t tokenizer_size, std::int64_t model_vocabulary);

/// "bf16" or "fp32". @throws Error usage.
DType parse_dtype(const std::string& word);

/// The engine that the options name; weights, activations on CUDA devices, operands of products on CPUs are of `dtype`.
EngineOptions engine_options(const CommonOptions& options, DType dtype);

} // namespace selm
