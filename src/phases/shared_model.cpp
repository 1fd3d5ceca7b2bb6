#include "selm/model/model_files.hpp"
#include "selm/phases/shared_model.hpp"

#include <filesystem>
#include <utility>

#include "same_numerics.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/model/safetensors.hpp"

namespace selm {
namespace {

constexpr std::int64_t unused_rows_warned = 1024;

/// Resident weights that let something else happen before each layer.
class InterleavedWeights final : public WeightStore {
  public:
    explicit InterleavedWeights(WeightStore& weights) : weights_(weights) {}

    const LayerWeights& layer(std::int64_t index, WeightUse use) override
    {
        if (between_layers)
            between_layers();
        return weights_.layer(index, use);
    }
    void release(std::int64_t index) override { weights_.release(index); }
    const Tensor& embedding() override { return weights_.embedding(); }
    void release_embedding() override { weights_.release_embedding(); }
    const Tensor& final_norm() override { return weights_.final_norm(); }
    const PackedWeight& head(WeightUse use) override { return weights_.head(use); }
    void release_head() override { weights_.release_head(); }

    std::function<void()> between_layers;

  private:
    WeightStore& weights_;
};

} // namespace

// Members in the order of dependence: destruction runs from the decoder back to the node's communicator.
struct SharedModel::Impl {
    std::string directory;
    std::string digest;
    DType dtype = DType::bf16;
    DecoderConfig config;
    std::unique_ptr<Communicator> node;
    std::unique_ptr<NodeSharedMemory> memory;
    std::unique_ptr<Engine> engine;
    std::unique_ptr<SafetensorsReader> reader;
    std::unique_ptr<ResidentWeights> weights;
    std::unique_ptr<InterleavedWeights> interleaved;
    std::unique_ptr<Decoder> decoder;
};

SharedModel::SharedModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SharedModel::~SharedModel() = default;

std::unique_ptr<SharedModel> SharedModel::from_directory(const std::string& directory, const CommonOptions& options,
                                                         Communicator& comm, const std::string& known_digest)
{
    auto impl = std::make_unique<Impl>();
    Impl& m = *impl;
    m.directory = directory;
    m.digest = known_digest.empty() ? root_string(comm, "digest of the model", [&] { return model_digest(directory); })
                                    : known_digest;

    std::int64_t elements = 0;
    agree(comm, "opening the model", [&] {
        m.dtype = parse_dtype(options.dtype);
        m.config = DecoderConfig::from_directory(directory);
        m.engine = make_engine(engine_options(options, m.dtype));
        m.reader = std::make_unique<SafetensorsReader>(directory);
        check_model_tensors(*m.reader, m.config, directory);
        elements = ResidentWeights::memory_elements(m.config, *m.engine, false, m.dtype);
    });

    check_same_numerics(m.engine->numerics(), comm);

    // NodeSharedMemory fails alike on all ranks of a node; agree() is for the other nodes. Its collectives run over the
    // node's communicator, not over comm.
    m.node = comm.split_node("ranks that share the weights");
    agree(comm, "memory for the weights", [&] {
        m.memory = std::make_unique<NodeSharedMemory>(*m.node, static_cast<std::size_t>(elements) * sizeof(float),
                                                      "packed weights");
    });
    agree(comm, "loading the weights", [&] {
        const Tensor memory = borrow_f32(reinterpret_cast<float*>(m.memory->data()), 1, elements);
        const ResidentWeights::Options weights{
            .dtype = m.dtype, .with_backward = false, .part = m.node->rank(), .parts = m.node->size()};
        m.weights = std::make_unique<ResidentWeights>(m.config, *m.engine, *m.reader, weights, memory);
        m.interleaved = std::make_unique<InterleavedWeights>(*m.weights);
        m.decoder = std::make_unique<Decoder>(m.config, *m.engine, *m.interleaved);
    });
    m.memory->fence();

    const auto nodes =
        all_reduce_value(comm, std::int64_t{m.node->is_root() ? 1 : 0}, ReduceOp::sum, "number of nodes");
    SELM_LOG(info, "model " << directory << " (" << options.dtype << "), engine " << m.engine->description()
                            << ", device " << options.device << "; "
                            << (static_cast<std::int64_t>(m.memory->bytes()) >> 20) << " MiB of weights per node, "
                            << comm.size() << " rank(s) on " << nodes << " node(s)");
    return std::unique_ptr<SharedModel>(new SharedModel(std::move(impl)));
}

const std::string& SharedModel::directory() const
{
    return impl_->directory;
}
const DecoderConfig& SharedModel::config() const
{
    return impl_->config;
}
Engine& SharedModel::engine() const
{
    return *impl_->engine;
}
Decoder& SharedModel::decoder() const
{
    return *impl_->decoder;
}
WeightStore& SharedModel::weights() const
{
    return *impl_->weights;
}
void SharedModel::set_between_layers(std::function<void()> work)
{
    impl_->interleaved->between_layers = std::move(work);
}
const std::string& SharedModel::digest() const
{
    return impl_->digest;
}

std::string SharedModel::engine_key() const
{
    return cat(impl_->engine->numerics(), " ", impl_->dtype == DType::bf16 ? "bf16" : "fp32");
}

std::string model_digest(const std::string& directory)
{
    Hasher hasher;
    hasher.update(SafetensorsReader(directory).digest());
    for (const char* name :
         {"config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
          "chat_template.jinja", "generation_config.json"}) {
        const std::string path = cat(directory, "/", name);
        if (std::filesystem::exists(path))
            hasher.update(cat("\n", name, " ", hash_file(path)));
    }
    return hasher.hex();
}

void check_vocabulary(const std::string& directory, std::int64_t tokenizer_size, std::int64_t model_vocabulary)
{
    if (tokenizer_size > model_vocabulary)
        throw config_error(cat(directory, ": the tokenizer has ", tokenizer_size,
                               " ids but the model's embedding only ", model_vocabulary,
                               " rows (they do not belong together). Use the tokenizer.json that came "
                               "with these weights"));
    if (model_vocabulary - tokenizer_size >= unused_rows_warned)
        SELM_LOG(warning, directory << ": the tokenizer has " << tokenizer_size << " ids, the model's embedding "
                                    << model_vocabulary << " rows; check that they belong together");
}

EngineOptions engine_options(const CommonOptions& options, DType dtype)
{
    return {.engine = options.engine,
            .device = options.device == "cuda" ? Device::cuda : Device::cpu,
            .threads = static_cast<int>(options.threads),
            .activation = dtype,
            .products = dtype};
}

DType parse_dtype(const std::string& word)
{
    if (word == "bf16")
        return DType::bf16;
    if (word == "fp32")
        return DType::f32;
    throw usage_error(cat("dtype is \"", word, "\". Pass --dtype bf16 or fp32"));
}

} // namespace selm
