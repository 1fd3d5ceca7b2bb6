#include "shared_pair_model.hpp"

#include <filesystem>
#include <optional>
#include <utility>

#include "same_numerics.hpp"
#include "selm/base/error.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/model/safetensors.hpp"
#include "selm/phases/shared_model.hpp"

namespace selm {

// Members in the order of dependence: destruction runs from the model back to the node's communicator.
struct SharedPairModel::Impl {
    std::string digest;
    DType dtype = DType::f32;
    DebertaConfig config;
    std::optional<UnigramTokenizer> tokenizer;
    std::unique_ptr<Communicator> node;
    std::unique_ptr<NodeSharedMemory> memory;
    std::unique_ptr<Engine> engine;
    std::unique_ptr<SafetensorsReader> reader;
    std::unique_ptr<PairWeights> weights;
    std::unique_ptr<PairModel> model;
};

SharedPairModel::SharedPairModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SharedPairModel::~SharedPairModel() = default;

std::unique_ptr<SharedPairModel> SharedPairModel::from_directory(const std::string& directory,
                                                                 const CommonOptions& options, const std::string& dtype,
                                                                 Communicator& comm)
{
    auto impl = std::make_unique<Impl>();
    Impl& m = *impl;
    std::int64_t elements = 0;
    agree(comm, "opening the pair ranker", [&] {
        m.dtype = parse_dtype(dtype);
        m.config = DebertaConfig::from_directory(directory);
        SELM_VALIDATE(m.config.has_head, ExitCode::configuration,
                      directory << " is no PairRM: its weights have no head_layer (an encoder alone compares nothing). "
                                   "Pass --ranker pairrm:DIR of a "
                                   "trained one, or make one with selm_train --objective pairrm");
        m.tokenizer.emplace(UnigramTokenizer::from_directory(directory));
        check_vocabulary(directory, m.tokenizer->vocabulary_size(), m.config.vocabulary);
        m.engine = make_engine(engine_options(options, m.dtype));
        m.reader = std::make_unique<SafetensorsReader>(directory);
        elements = PairWeights::memory_elements(m.config, *m.engine, false);
    });
    check_same_numerics(m.engine->numerics(), comm);
    m.digest = root_string(comm, "digest of the pair ranker", [&] { return pair_model_digest(directory); });
    m.node = comm.split_node("ranks that share the pair ranker's weights");
    agree(comm, "memory for the weights", [&] {
        m.memory = std::make_unique<NodeSharedMemory>(*m.node, static_cast<std::size_t>(elements) * sizeof(float),
                                                      "packed weights");
    });
    agree(comm, "loading the weights", [&] {
        const Tensor memory =
            elements > 0 ? borrow_f32(reinterpret_cast<float*>(m.memory->data()), 1, elements) : Tensor{};
        m.weights = std::make_unique<PairWeights>(
            m.config, *m.engine, *m.reader,
            PairWeights::Options{
                .dtype = m.dtype, .with_backward = false, .part = m.node->rank(), .parts = m.node->size()},
            memory);
        m.model = std::make_unique<PairModel>(m.config, *m.engine, *m.weights);
    });
    m.memory->fence();
    SELM_LOG(info, "pair ranker " << directory << " (" << dtype << "), engine " << m.engine->description()
                                  << ", device " << options.device << "; "
                                  << (static_cast<std::int64_t>(m.memory->bytes()) >> 20)
                                  << " MiB of weights per node, " << comm.size() << " rank(s)");
    return std::unique_ptr<SharedPairModel>(new SharedPairModel(std::move(impl)));
}

const DebertaConfig& SharedPairModel::config() const
{
    return impl_->config;
}
Engine& SharedPairModel::engine() const
{
    return *impl_->engine;
}
PairModel& SharedPairModel::model() const
{
    return *impl_->model;
}
const UnigramTokenizer& SharedPairModel::tokenizer() const
{
    return *impl_->tokenizer;
}
const std::string& SharedPairModel::digest() const
{
    return impl_->digest;
}

std::string SharedPairModel::engine_key() const
{
    return cat(impl_->engine->numerics(), " ", impl_->dtype == DType::bf16 ? "bf16" : "fp32");
}

std::string pair_model_digest(const std::string& directory)
{
    Hasher hasher;
    hasher.update(SafetensorsReader(directory).digest());
    for (const char* name : {"config.json", "tokenizer.json", "spm.model", "added_tokens.json"}) {
        const std::string path = cat(directory, "/", name);
        if (std::filesystem::exists(path))
            hasher.update(cat("\n", name, " ", hash_file(path)));
    }
    return hasher.hex();
}

} // namespace selm
