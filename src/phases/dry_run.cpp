#include "dry_run.hpp"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "dry_run_memory.hpp"
#include "import_source.hpp"
#include "iterate_phases.hpp"
#include "packed_rows.hpp"
#include "selm/algo/schedule.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/data/preferences.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm/rank/ranker.hpp"
#include "selm_objective.hpp"

namespace selm {
namespace {

using nlohmann::ordered_json;

constexpr double gibibyte = 1024.0 * 1024 * 1024;

/// Lines of a source file (rows of an imported one) before a range is taken. Reads the file without parsing rows.
std::int64_t count_rows(const std::string& path)
{
    if (path.ends_with(".h5") || path.ends_with(".hdf5"))
        return PreferencesReader(path).rows();
    const auto source = path.ends_with(".parquet") ? import_detail::open_parquet(path) : import_detail::open_jsonl(path);
    std::int64_t rows = 0;
    while (source->next())
        rows = source->index() + 1;
    return rows;
}

struct Lines {
    std::int64_t begin = 0;
    std::optional<std::int64_t> end;
};

/// A:B as selm_import reads it, whose validate() has been here before.
Lines parse_lines(const std::string& text)
{
    Lines lines;
    const std::size_t colon = text.find(':');
    if (colon == std::string::npos)
        return lines;
    if (colon > 0)
        lines.begin = std::stoll(text.substr(0, colon));
    if (colon + 1 < text.size())
        lines.end = std::stoll(text.substr(colon + 1));
    return lines;
}

/// Rows of a data set. @param total lines of the file where it is not at hand; 0: unknown.
std::int64_t rows_of(const char* key, const std::string& file, const std::string& rows, std::int64_t total)
{
    const Lines lines = parse_lines(rows);
    if (total == 0 && std::filesystem::exists(file))
        total = count_rows(file);
    SELM_VALIDATE(total > 0 || lines.end, ExitCode::bad_data,
                  key << " = " << file << " does not exist (its rows cannot be counted). Correct the path, set " << key
                      << "-rows = A:B" << (std::string(key) == "train" ? ", or pass --rows-total N" : ""));
    const std::int64_t end = lines.end.value_or(total);
    SELM_VALIDATE(total == 0 || end <= total, ExitCode::bad_data,
                  key << "-rows = " << rows << " asks for more than the " << total << " rows of " << file << ". Lower it");
    SELM_VALIDATE(end > lines.begin, ExitCode::bad_data, key << "-rows = " << rows << " holds no row. Correct it");
    return end - lines.begin;
}

bool has_tokenizer(const std::string& directory)
{
    return std::filesystem::exists(directory + "/tokenizer.json") || std::filesystem::exists(directory + "/tokenizer.model");
}

/// The shape of the starting policy, checked against the recipe as far as the directory's files allow.
DecoderConfig check_policy(const IterateOptions& options)
{
    const std::string& directory = options.policy;
    const EncodingOptions& encoding = options.generate.encoding;
    const DecoderConfig config = DecoderConfig::from_directory(directory);
    SELM_VALIDATE(!config.sequence_classifier, ExitCode::configuration,
                  directory << " is a reward model (it has no language-model head). Set policy to a causal language model");
    SELM_VALIDATE(encoding.max_length <= config.max_positions, ExitCode::configuration,
                  "max-length " << encoding.max_length << " is beyond the context of " << directory << " (" << config.context()
                                << "). Lower it");
    if (has_tokenizer(directory))
        RowEncoder(directory, encoding, config);
    else if (!encoding.chat_format.empty())
        ChatFormat::by_name(encoding.chat_format);
    return config;
}

/// A run directory that is there must have been made with this recipe.
void check_run_directory(const IterateOptions& options)
{
    const RunPaths paths(options.run);
    if (options.run.empty() || options.recipe_text.empty() || !std::filesystem::exists(paths.recipe()))
        return;
    const std::string difference = recipe_difference(read_file(paths.recipe()), options.recipe_text);
    SELM_VALIDATE(difference.empty(), ExitCode::configuration,
                  options.run << " was made with another recipe: " << difference << ". Use a new --run, or the recipe of "
                              << paths.recipe());
}

ordered_json input(const std::string& what, const std::string& path, bool present)
{
    return {{"what", what}, {"path", path}, {"present", present}};
}

ordered_json plan_inputs(const IterateOptions& options)
{
    auto inputs = ordered_json::array();
    inputs.push_back(input("train", options.train, std::filesystem::exists(options.train)));
    if (!options.test.empty())
        inputs.push_back(input("test", options.test, std::filesystem::exists(options.test)));
    inputs.push_back(input("policy weights", options.policy, has_weights(options.policy)));
    inputs.push_back(input("policy tokenizer", options.policy, has_tokenizer(options.policy)));
    for (const std::string& word : options.rank.rankers) {
        const RankerSpec spec = RankerSpec::parse(word);
        inputs.push_back(input("ranker " + spec.kind, spec.path, std::filesystem::exists(spec.path)));
    }
    return inputs;
}

ordered_json phase(const char* name, std::int64_t rows, const std::vector<std::string>& writes)
{
    return {{"phase", name}, {"rows", rows}, {"writes", writes}};
}

std::int64_t parameter_count(const DecoderConfig& config)
{
    std::int64_t elements = 0;
    for (const ParameterSpec& parameter : decoder_parameters(config))
        elements += parameter.elements();
    return elements;
}

ordered_json plan_training(const IteratePhases& phases, std::int64_t t, std::int64_t rows)
{
    const TrainOptions train = phases.train(t);
    const std::int64_t steps = steps_per_epoch(rows, train.global_batch) * train.epochs;
    const double peak = by_iteration(train.learning_rate, t);
    const Schedule schedule = parse_schedule(train.schedule);
    auto rates = ordered_json::array();
    for (std::int64_t step = 0; step < steps; ++step)
        rates.push_back(learning_rate(schedule, peak, step, steps, train.warmup_ratio));
    return {{"alpha", by_iteration(train.alpha, t)},
            {"beta", by_iteration(train.beta, t)},
            {"peak_learning_rate", peak},
            {"schedule", train.schedule},
            {"global_batch", std::min(train.global_batch, rows)},
            {"epochs", train.epochs},
            {"steps", steps},
            {"warmup_steps", warmup_steps(steps, train.warmup_ratio)},
            {"rows_unused_per_epoch", rows < train.global_batch ? 0 : rows % train.global_batch},
            {"learning_rates", std::move(rates)}};
}

ordered_json held_out_phases(const IteratePhases& phases, std::int64_t t, std::int64_t test_rows)
{
    auto list = ordered_json::array();
    if (phases.options().test.empty())
        return list;
    const std::string file = phases.paths().test_rows(t);
    list.push_back(phase("test_generate", test_rows, {file}));
    if (!phases.options().rank.rankers.empty())
        list.push_back(phase("test_rank", test_rows, {file + ":/ranking"}));
    return list;
}

ordered_json plan_iteration(const IteratePhases& phases, std::int64_t t, std::int64_t rows, std::int64_t test_rows)
{
    const IterateOptions& options = phases.options();
    const RunPaths& paths = phases.paths();
    const PortionRange portion = portion_range(rows, t, options.iterations);
    const std::int64_t count = portion.end - portion.begin;
    const std::string file = paths.rows(t), policy = paths.policy(t);
    auto list = ordered_json::array();
    list.push_back(phase("generate", count, {file}));
    if (phases.is_offline(t))
        list.back()["answers"] = "none";
    list.push_back(phase("rank", count, {file + ":/ranking", file + ":/pairs"}));
    list.back()["update_rule"] = phases.rank(t).update_rule;
    list.push_back(phase("logprob", count, {file + ":/logprobs/" + options.logprob.name}));
    std::vector<std::string> writes{policy + "/model.safetensors", policy + "/metrics.jsonl"};
    if (options.train_options.checkpoint_every > 0)
        writes.push_back(policy + "/checkpoints/");
    list.push_back(phase("train", count, writes));
    list.back().update(plan_training(phases, t, count));
    for (auto& held_out : held_out_phases(phases, t, test_rows))
        list.push_back(std::move(held_out));
    return {{"iteration", t},
            {"policy", phases.policy_before(t)},
            {"rows", {portion.begin, portion.end}},
            {"phases", std::move(list)}};
}

ordered_json to_json(const PhaseMemory& memory, std::int64_t ranks_per_node)
{
    ordered_json json{{"phase", memory.phase}, {"per_rank", ordered_json::object()}, {"per_node", ordered_json::object()}};
    for (const auto& [name, bytes] : memory.per_rank)
        json["per_rank"][name] = bytes;
    for (const auto& [name, bytes] : memory.per_node)
        json["per_node"][name] = bytes;
    json["rank_bytes"] = memory.rank_bytes();
    json["node_bytes"] = memory.node_bytes(ranks_per_node);
    json["not_counted"] = memory.not_counted;
    return json;
}

std::unique_ptr<Engine> engine_of(const CommonOptions& common)
{
    return make_engine(engine_options(common, parse_dtype(common.dtype)));
}

/// Memory of each phase; refuses a node that is too small.
ordered_json plan_memory(const IteratePhases& phases, const DecoderConfig& policy, const FlatLayout& layout,
                         std::int64_t ranks_per_node)
{
    const IterateOptions& options = phases.options();
    const auto engine = engine_of(options.generate.common);
    const std::int64_t new_tokens = options.generate.max_new_tokens;
    std::vector<PhaseMemory> list;
    list.push_back(generate_memory(options.generate, policy, *engine));
    if (!options.rank.rankers.empty())
        list.push_back(rank_memory(options.rank, new_tokens, *engine));
    list.push_back(logprob_memory(options.logprob, new_tokens, policy, *engine));
    list.push_back(train_memory(options.train_options, new_tokens, policy, *engine, layout));
    auto memory = ordered_json::array();
    for (const PhaseMemory& one : list) {
        const double needed = static_cast<double>(one.node_bytes(ranks_per_node)) / gibibyte;
        SELM_VALIDATE(options.node_memory == 0 || needed <= options.node_memory, ExitCode::configuration,
                      one.phase << " needs " << needed << " GiB on a node of " << ranks_per_node << " rank(s), --node-memory is "
                                << options.node_memory << ". Use fewer ranks per node (or more nodes), fewer slots or smaller microbatches");
        memory.push_back(to_json(one, ranks_per_node));
    }
    return memory;
}

ordered_json plan_shards(const DecoderConfig& policy, const FlatLayout& layout)
{
    const ShardBalance balance = check_shards(layout);
    check_tensor_slices(decoder_parameters(policy), layout);
    return {{"elements", layout.total()},
            {"ranks", layout.ranks()},
            {"units", layout.units()},
            {"smallest", balance.smallest},
            {"largest", balance.largest}};
}

ordered_json plan_model(const IterateOptions& options, const DecoderConfig& policy)
{
    const std::int64_t parameters = parameter_count(policy);
    return {{"directory", options.policy},
            {"type", policy.model_type},
            {"layers", policy.layers},
            {"hidden", policy.hidden},
            {"vocabulary", policy.vocabulary},
            {"context", policy.max_positions},
            {"parameters", parameters},
            {"saved_bytes", parameters * static_cast<std::int64_t>(size_of(parse_dtype(options.train_options.save_dtype)))}};
}

} // namespace

ordered_json plan_run(const IterateOptions& given, int ranks_here)
{
    IterateOptions named = given;
    if (named.run.empty())
        named.run = "RUN";
    const IteratePhases phases(named);
    const IterateOptions& options = phases.options();
    check_run_directory(given);
    const DecoderConfig policy = check_policy(options);
    const std::int64_t rows = rows_of("train", options.train, options.train_rows, options.rows_total);
    const std::int64_t test_rows = options.test.empty() ? 0 : rows_of("test", options.test, options.test_rows, 0);
    SELM_VALIDATE(rows >= options.iterations, ExitCode::bad_data,
                  "train has " << rows << " rows for " << options.iterations
                               << " iterations (a portion would be empty). Use more rows or fewer iterations");
    const std::int64_t ranks = options.ranks > 0 ? options.ranks : ranks_here;
    const std::int64_t ranks_per_node = options.ranks_per_node > 0 ? std::min(options.ranks_per_node, ranks) : ranks;
    const FlatLayout layout(decoder_parameters(policy), static_cast<int>(ranks),
                            {.bucket = static_cast<std::size_t>(options.train_options.bucket_bytes) / sizeof(float),
                             .group_ends = decoder_parameter_groups(policy)});

    ordered_json plan;
    plan["ranks"] = ranks;
    plan["ranks_per_node"] = ranks_per_node;
    plan["nodes"] = (ranks + ranks_per_node - 1) / ranks_per_node;
    plan["model"] = plan_model(options, policy);
    plan["rows"] = rows;
    plan["rows_per_iteration"] = rows / options.iterations;
    plan["rows_unused"] = rows % options.iterations;
    plan["test_rows"] = test_rows;
    plan["first_iteration"] = options.first_iteration;
    plan["inputs"] = plan_inputs(options);
    std::vector<std::string> writes{phases.paths().recipe(), phases.paths().manifest()};
    if (phases.imports_train())
        writes.push_back(phases.train_data());
    if (phases.imports_test())
        writes.push_back(phases.test_data());
    plan["writes"] = writes;
    plan["before_training"] = held_out_phases(phases, 0, test_rows);
    plan["iterations"] = ordered_json::array();
    for (std::int64_t t = 1; t <= options.iterations; ++t)
        plan["iterations"].push_back(plan_iteration(phases, t, rows, test_rows));
    plan["shards"] = plan_shards(policy, layout);
    plan["memory"] = plan_memory(phases, policy, layout, ranks_per_node);
    return plan;
}

std::string dry_run_text(const IterateOptions& options, int ranks_here)
{
    const ordered_json plan = plan_run(options, ranks_here);
    return options.format == "json" ? plan.dump(2) + "\n" : plan_table(plan);
}

} // namespace selm
