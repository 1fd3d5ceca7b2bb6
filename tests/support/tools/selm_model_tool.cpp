// The decoder for reference tests. usage: selm_model_tool REQUEST.json
// The request: {"op": ..., "model": DIR, "engine": "aten", "dtype": "fp32"|"bf16", "output": FILE, ...}; results are raw f32
// in "output" and one JSON line on stdout.
//   logits     "sequences": [[ids]], "last": N    -> logits [sum of min(N, length), V] of the last N positions of each
//   decode     "sequences": [[ids]], "chunk": C, "last": N -> the same through the KV cache: all sequences at once, prompts
//              in chunks of C tokens but for their last N-1 tokens, which go in one by one
//   log_probs  "rows": [{"trunk": [ids], "branches": [{"tokens": [ids], "unscored": U}]}] -> [R]
//   gradients  "rows", "coefficients": [R], -> gradients of sum_i c_i log_prob_i, one tensor after another; stdout:
//              {"tensors": [{"name", "shape"}]}
//   scores     "sequences": [[ids]]               -> reward [sequences] of a sequence classifier
//   save       "to": DIR, "max_shard_bytes": N    -> the model's files and weights written anew, in "dtype"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>

#include <nlohmann/json.hpp>

#include "json_tool.hpp"
#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/model/decoder.hpp"
#include "selm/model/model_files.hpp"

namespace {

using Json = nlohmann::json;
using Ids = std::vector<std::int32_t>;

selm::DType dtype_of(const Json& request)
{
    return request.value("dtype", "fp32") == "bf16" ? selm::DType::bf16 : selm::DType::f32;
}

struct Model {
    std::string directory;
    selm::DecoderConfig config;
    std::unique_ptr<selm::Engine> engine;
    std::unique_ptr<selm::SafetensorsReader> reader;
    std::unique_ptr<selm::ResidentWeights> weights;
    std::unique_ptr<selm::Decoder> decoder;

    explicit Model(const Json& request)
        : directory(request["model"]), config(selm::DecoderConfig::from_directory(directory)),
          engine(selm::make_engine({.engine = request.value("engine", "aten")})),
          reader(std::make_unique<selm::SafetensorsReader>(directory)),
          weights(std::make_unique<selm::ResidentWeights>(
              config, *engine, *reader,
              selm::ResidentWeights::Options{.dtype = dtype_of(request), .with_backward = request["op"] == "gradients"},
              selm::Tensor{})),
          decoder(std::make_unique<selm::Decoder>(config, *engine, *weights))
    {
    }
};

std::vector<float> to_host(selm::Engine& engine, const selm::Tensor& tensor)
{
    std::vector<float> values(static_cast<std::size_t>(tensor.rows * tensor.columns));
    engine.copy_to_host(tensor, values.data());
    return values;
}

class Output {
  public:
    explicit Output(const Json& request) : stream_(request["output"].get<std::string>(), std::ios::binary) {}
    void write(std::span<const float> values)
    {
        stream_.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size_bytes()));
    }
    void finish()
    {
        stream_.close();
        if (!stream_)
            throw selm::io_error("the output was not written");
    }

  private:
    std::ofstream stream_;
};

void logits(const Json& request)
{
    Model model(request);
    Output output(request);
    for (const Ids& ids : request["sequences"].get<std::vector<Ids>>()) {
        selm::PackedBatch batch;
        batch.add_last_token(ids, {});
        const auto length = static_cast<std::int64_t>(ids.size());
        for (std::int64_t i = std::max(std::int64_t{0}, length - request["last"].get<std::int64_t>()); i < length; ++i)
            batch.selected.push_back(i);
        const auto pass = model.decoder->forward(batch, false);
        const auto values = model.engine->allocate(pass->hidden().rows, model.config.vocabulary, selm::DType::f32);
        model.engine->logits(pass->hidden(), model.weights->head(selm::WeightUse::forward), values);
        output.write(to_host(*model.engine, values));
    }
    output.finish();
}

/// One sequence on its way through the cache.
struct Cursor {
    Ids ids;
    std::int64_t next = 0;
    std::int64_t prompt = 0; ///< tokens that go in as prefill chunks
};

void decode(const Json& request)
{
    Model model(request);
    const auto sequences = request["sequences"].get<std::vector<Ids>>();
    const std::int64_t last = request["last"];
    const std::int64_t chunk = request["chunk"];
    std::vector<Cursor> cursors;
    std::int64_t capacity = 0;
    for (const Ids& ids : sequences) {
        const auto length = static_cast<std::int64_t>(ids.size());
        cursors.push_back({ids, 0, std::max(std::int64_t{1}, length - last + 1)});
        capacity = std::max(capacity, length);
    }
    selm::DecodeSession session(*model.decoder, static_cast<std::int64_t>(cursors.size()), capacity);
    std::vector<std::vector<float>> results(cursors.size());
    while (true) {
        std::vector<selm::DecodeWork> work;
        for (std::size_t i = 0; i < cursors.size(); ++i) {
            Cursor& c = cursors[i];
            const auto length = static_cast<std::int64_t>(c.ids.size());
            if (c.next == length)
                continue;
            const bool prefill = c.next < c.prompt;
            const std::int64_t count = prefill ? std::min(chunk, c.prompt - c.next) : 1;
            const std::span<const std::int32_t> tokens(c.ids.data() + c.next, static_cast<std::size_t>(count));
            work.push_back({static_cast<std::int64_t>(i), c.next, tokens, prefill, c.next + count >= c.prompt});
            c.next += count;
        }
        if (work.empty())
            break;
        const auto values = to_host(*model.engine, session.step(work));
        auto at = values.begin();
        for (const selm::DecodeWork& item : work) {
            if (!item.wants_logits)
                continue;
            auto& result = results[static_cast<std::size_t>(item.slot)];
            result.insert(result.end(), at, at + model.config.vocabulary);
            at += model.config.vocabulary;
        }
    }
    Output output(request);
    for (const auto& result : results)
        output.write(result);
    output.finish();
}

selm::PackedBatch batch_of(const Json& request)
{
    selm::PackedBatch batch;
    for (const Json& row : request["rows"]) {
        std::vector<selm::Branch> branches;
        for (const Json& branch : row["branches"])
            branches.push_back({branch["tokens"].get<Ids>(), branch.value("unscored", std::int64_t{0})});
        batch.add_scored(row["trunk"].get<Ids>(), branches);
    }
    return batch;
}

void log_probs(const Json& request)
{
    Model model(request);
    Output output(request);
    output.write(model.decoder->log_probs(batch_of(request)));
    output.finish();
}

class Gradients final : public selm::GradientSink {
  public:
    Gradients(selm::Engine& engine, const std::vector<selm::ParameterSpec>& specs)
    {
        for (const auto& spec : specs) {
            tensors.push_back(engine.allocate(spec.rows, spec.columns, selm::DType::f32));
            engine.fill_zero(tensors.back());
        }
    }
    selm::Tensor gradient(std::int64_t parameter) override { return tensors[static_cast<std::size_t>(parameter)]; }
    void ready(std::int64_t) override {}

    std::vector<selm::Tensor> tensors;
};

void gradients(const Json& request)
{
    Model model(request);
    const auto specs = selm::decoder_parameters(model.config);
    Gradients sink(*model.engine, specs);
    const auto coefficients = request["coefficients"].get<std::vector<float>>();
    const auto pass = model.decoder->forward_scored(batch_of(request));
    model.decoder->backward_scored(*pass, coefficients, sink);
    Output output(request);
    Json tensors = Json::array();
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const auto values = to_host(*model.engine, sink.tensors[i]);
        for (const auto& part : specs[i].parts) {
            output.write(std::span(values).subspan(static_cast<std::size_t>(part.row_begin * specs[i].columns),
                                                   static_cast<std::size_t>(part.rows * specs[i].columns)));
            tensors.push_back({{"name", part.name}, {"shape", part.shape}});
        }
    }
    output.finish();
    std::cout << Json{{"tensors", tensors}} << "\n";
}

void scores(const Json& request)
{
    Model model(request);
    selm::PackedBatch batch;
    const std::vector<selm::Branch> trunk_alone(1);
    for (const Ids& ids : request["sequences"].get<std::vector<Ids>>())
        batch.add_last_token(ids, trunk_alone);
    const auto pass = model.decoder->forward(batch, false);
    const auto values = model.engine->allocate(pass->hidden().rows, 1, selm::DType::f32);
    model.engine->linear(pass->hidden(), model.weights->head(selm::WeightUse::forward), values);
    Output output(request);
    output.write(to_host(*model.engine, values));
    output.finish();
}

void save(const Json& request)
{
    const std::string from = request["model"];
    const std::string to = request["to"];
    const auto config = selm::DecoderConfig::from_directory(from);
    const selm::SafetensorsReader reader(from);
    std::vector<std::vector<float>> values;
    std::vector<selm::Tensor> tensors;
    for (const auto& spec : selm::decoder_parameters(config)) {
        values.emplace_back(static_cast<std::size_t>(spec.elements()));
        selm::read_model_parameter(reader, spec, values.back());
        tensors.push_back(selm::borrow_f32(values.back().data(), spec.rows, spec.columns));
    }
    std::filesystem::create_directories(to);
    selm::copy_model_files(from, to, {.dtype = dtype_of(request)});
    selm::write_model_weights(to, config, tensors, dtype_of(request), request["max_shard_bytes"]);
}

} // namespace

int main(int argc, char** argv)
{
    const selm::KernelRuntime runtime(1);
    return selm::test::request_main(argc, argv, "selm_model_tool REQUEST.json",
                                    {{"logits", logits},
                                     {"decode", decode},
                                     {"log_probs", log_probs},
                                     {"gradients", gradients},
                                     {"scores", scores},
                                     {"save", save}});
}
