// The pair model for reference tests. usage: selm_pair_tool REQUEST.json
// The request: {"op": ..., "model": DIR, "engine": "aten", "dtype": "fp32"|"bf16", "output": FILE, ...}; results are
// raw f32 in "output" and one JSON line on stdout.
//   config                                      stdout: the configuration as read
//   positions  "distances": [...]               stdout: {"positions": [...]}
//   hidden     "sequences": [[ids]]             -> last hidden states [sum of lengths, H]
//   logits     "pairs": [{"ids", "source", "left", "right"}], "tokens_per_batch": N -> [pairs]; stdout: {"seconds",
//              "cpu_seconds", "peak_bytes"} of the passes alone
//   gradients  "pairs", "coefficients": [pairs] -> gradients of sum_i c_i logit_i, one tensor after another, each batch
//              of "batch" pairs a pass; stdout: {"tensors": [{"name", "shape"}], "logits": [...]}
//   save       "to": DIR                        -> the weights written anew, in "dtype"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>

#include <nlohmann/json.hpp>

#include "json_tool.hpp"
#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/model/pair_model.hpp"

namespace {

using Json = nlohmann::json;
using Ids = std::vector<std::int32_t>;

selm::DType dtype_of(const Json& request)
{
    return request.value("dtype", "fp32") == "bf16" ? selm::DType::bf16 : selm::DType::f32;
}

void write_output(const Json& request, std::span<const float> values)
{
    std::ofstream stream(request["output"].get<std::string>(), std::ios::binary);
    stream.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size_bytes()));
    stream.close();
    if (!stream)
        throw selm::io_error("the output was not written");
}

struct Model {
    selm::DebertaConfig config;
    std::unique_ptr<selm::Engine> engine;
    std::unique_ptr<selm::PairWeights> weights;
    std::unique_ptr<selm::PairModel> model;

    explicit Model(const Json& request)
        : config(selm::DebertaConfig::from_directory(request["model"])),
          engine(selm::make_engine({.engine = request.value("engine", "aten")}))
    {
        const selm::SafetensorsReader reader(request["model"]);
        weights = std::make_unique<selm::PairWeights>(
            config, *engine, reader, selm::PairWeights::Options{.dtype = dtype_of(request), .with_backward = false},
            selm::Tensor{});
        model = std::make_unique<selm::PairModel>(config, *engine, *weights);
    }
};

std::vector<selm::PairInput> pairs_of(const Json& request)
{
    std::vector<selm::PairInput> pairs;
    for (const Json& pair : request["pairs"])
        pairs.push_back({pair["ids"].get<Ids>(), pair["source"], pair["left"], pair["right"]});
    return pairs;
}

void config(const Json& request)
{
    const auto c = selm::DebertaConfig::from_directory(request["model"]);
    const Json line = {{"vocabulary", c.vocabulary},
                       {"hidden", c.hidden},
                       {"intermediate", c.intermediate},
                       {"layers", c.layers},
                       {"heads", c.heads},
                       {"layer_norm_eps", c.layer_norm_eps},
                       {"position_buckets", c.position_buckets},
                       {"max_relative_positions", c.max_relative_positions},
                       {"padding_token", c.padding_token},
                       {"has_head", c.has_head},
                       {"prefix_ids",
                        {c.source_prefix_id, c.candidate1_prefix_id, c.candidate2_prefix_id, c.candidate_prefix_id}}};
    std::cout << line.dump() << "\n";
}

void positions(const Json& request)
{
    const auto config = selm::DebertaConfig::from_directory(request["model"]);
    Json positions = Json::array();
    for (const std::int64_t distance : request["distances"].get<std::vector<std::int64_t>>())
        positions.push_back(selm::relative_position_index(config, distance));
    std::cout << Json{{"positions", positions}}.dump() << "\n";
}

void hidden(const Json& request)
{
    Model model(request);
    write_output(request, model.model->hidden_states(request["sequences"].get<std::vector<Ids>>()));
}

void logits(const Json& request)
{
    Model model(request);
    const std::vector<selm::PairInput> pairs = pairs_of(request);
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t cpu_start = std::clock();
    const std::vector<float> values = model.model->logits(pairs, request.value("tokens_per_batch", std::int64_t{4096}));
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double cpu_seconds = static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
    write_output(request, values);
    std::cout << Json{{"seconds", seconds}, {"cpu_seconds", cpu_seconds}, {"peak_bytes", model.engine->peak_allocated_bytes()}}.dump() << "\n";
}

/// Flat parameters of a checkpoint, or zeros.
struct Flat {
    std::vector<std::vector<float>> values;
    std::vector<selm::Tensor> tensors;
    explicit Flat(const selm::DebertaConfig& config, const selm::SafetensorsReader* reader)
    {
        for (const selm::ParameterSpec& spec : selm::pair_parameters(config)) {
            auto& buffer = values.emplace_back(static_cast<std::size_t>(spec.elements()));
            if (reader != nullptr)
                selm::read_pair_parameter(*reader, spec, 0, buffer);
            tensors.push_back(selm::borrow_f32(buffer.data(), spec.rows, spec.columns));
        }
    }
};

class Sink final : public selm::GradientSink {
  public:
    explicit Sink(const selm::DebertaConfig& config)
        : gradients(config, nullptr), ready_count(gradients.values.size())
    {
    }
    selm::Tensor gradient(std::int64_t parameter) override
    {
        return gradients.tensors[static_cast<std::size_t>(parameter)];
    }
    void ready(std::int64_t parameter) override { ++ready_count[static_cast<std::size_t>(parameter)]; }
    Flat gradients;
    std::vector<int> ready_count;
};

void gradients(const Json& request)
{
    const auto config = selm::DebertaConfig::from_directory(request["model"]);
    const selm::SafetensorsReader reader(request["model"]);
    const auto engine = selm::make_engine({.engine = request.value("engine", "aten")});
    const Flat flat(config, &reader);
    selm::PairWeights weights(config, *engine, flat.tensors, {.dtype = selm::DType::f32, .with_backward = true});
    selm::PairModel model(config, *engine, weights);
    Sink sink(config);
    const std::vector<selm::PairInput> pairs = pairs_of(request);
    const auto coefficients = request["coefficients"].get<std::vector<float>>();
    const std::size_t batch = request["batch"];
    std::vector<float> values;
    int passes = 0;
    for (std::size_t begin = 0; begin < pairs.size(); begin += batch, ++passes) {
        const std::size_t count = std::min(batch, pairs.size() - begin);
        const auto pass = model.forward_kept(std::span(pairs).subspan(begin, count));
        values.insert(values.end(), pass->logits().begin(), pass->logits().end());
        model.backward(*pass, std::span(coefficients).subspan(begin, count), sink);
    }
    for (const int count : sink.ready_count)
        if (count != passes)
            throw selm::data_error("ready() was not called once per pass and parameter");
    Json tensors = Json::array();
    std::vector<float> all;
    const auto specs = selm::pair_parameters(config);
    for (std::size_t i = 0; i < specs.size(); ++i) {
        tensors.push_back({{"name", specs[i].name}, {"shape", specs[i].parts[0].shape}});
        all.insert(all.end(), sink.gradients.values[i].begin(), sink.gradients.values[i].end());
    }
    write_output(request, all);
    std::cout << Json{{"tensors", tensors}, {"logits", values}}.dump() << "\n";
}

void save(const Json& request)
{
    const auto config = selm::DebertaConfig::from_directory(request["model"]);
    const selm::SafetensorsReader reader(request["model"]);
    const Flat flat(config, &reader);
    const std::string to = request["to"];
    std::filesystem::create_directories(to);
    selm::write_pair_weights(
        to, config,
        [&](std::int64_t parameter, std::int64_t begin, std::span<float> out) {
            std::copy_n(flat.values[static_cast<std::size_t>(parameter)].begin() + begin, out.size(), out.begin());
        },
        dtype_of(request));
}

} // namespace

int main(int argc, char** argv)
{
    const selm::KernelRuntime runtime(1);
    return selm::test::request_main(argc, argv, "selm_pair_tool REQUEST.json",
                                    {{"config", config},
                                     {"positions", positions},
                                     {"hidden", hidden},
                                     {"logits", logits},
                                     {"gradients", gradients},
                                     {"save", save}});
}
