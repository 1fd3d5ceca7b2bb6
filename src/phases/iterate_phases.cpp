#include "iterate_phases.hpp"

namespace selm {
namespace {

bool is_hdf5(const std::string& path)
{
    return path.ends_with(".h5") || path.ends_with(".hdf5");
}

IterateOptions with_shared_options(IterateOptions o)
{
    for (CommonOptions* common : {&o.rank.common, &o.logprob.common, &o.train_options.common})
        *common = o.generate.common;
    for (EncodingOptions* encoding : {&o.rank.encoding, &o.logprob.encoding, &o.train_options.encoding})
        *encoding = o.generate.encoding;
    return o;
}

} // namespace

IteratePhases::IteratePhases(const IterateOptions& options) : options_(with_shared_options(options)), paths_(options.run) {}

bool IteratePhases::imports_train() const
{
    return !is_hdf5(options_.train);
}

bool IteratePhases::imports_test() const
{
    return !options_.test.empty() && !is_hdf5(options_.test);
}

std::string IteratePhases::train_data() const
{
    return imports_train() ? paths_.train_data() : options_.train;
}

std::string IteratePhases::test_data() const
{
    return imports_test() ? paths_.test_data() : options_.test;
}

ImportOptions IteratePhases::import_of(const std::string& input, const std::string& rows, const std::string& output) const
{
    ImportOptions import = options_.import;
    import.input = input;
    import.rows = rows;
    import.output = output;
    return import;
}

ImportOptions IteratePhases::import_train() const
{
    return import_of(options_.train, options_.train_rows, paths_.train_data());
}

ImportOptions IteratePhases::import_test() const
{
    return import_of(options_.test, options_.test_rows, paths_.test_data());
}

GenerateOptions IteratePhases::generate(std::int64_t t) const
{
    GenerateOptions generate = options_.generate;
    generate.policy = policy_before(t);
    generate.iteration = t;
    generate.data = train_data();
    generate.output = paths_.rows(t);
    generate.portion = t;
    generate.portions = options_.iterations;
    generate.stop_file = paths_.stop_file();
    if (is_offline(t))
        generate.responses = "none";
    return generate;
}

RankOptions IteratePhases::rank(std::int64_t t) const
{
    RankOptions rank = options_.rank;
    rank.iter = paths_.rows(t);
    rank.stop_file = paths_.stop_file();
    if (is_offline(t)) { // the given pairs are taken as they are: scores would decide nothing
        rank.update_rule = "offline";
        rank.rankers.clear();
        rank.rank_mode = "per-row";
    }
    return rank;
}

LogProbOptions IteratePhases::logprob(std::int64_t t) const
{
    LogProbOptions logprob = options_.logprob;
    logprob.iter = paths_.rows(t);
    logprob.model = policy_before(t);
    logprob.stop_file = paths_.stop_file();
    return logprob;
}

TrainOptions IteratePhases::train(std::int64_t t) const
{
    TrainOptions train = options_.train_options;
    train.iter = paths_.rows(t);
    train.policy = policy_before(t);
    train.output = paths_.policy(t);
    train.stop_file = paths_.stop_file();
    if (is_offline(t))
        train.alpha = {0.0};
    return train;
}

GenerateOptions IteratePhases::held_out_generate(std::int64_t t) const
{
    GenerateOptions generate = options_.generate;
    generate.policy = t == 0 ? options_.policy : paths_.policy(t);
    generate.iteration = t;
    generate.data = test_data();
    generate.output = paths_.test_rows(t);
    generate.responses.clear();
    generate.stop_file = paths_.stop_file();
    return generate;
}

RankOptions IteratePhases::held_out_rank(std::int64_t t) const
{
    RankOptions rank = options_.rank;
    rank.iter = paths_.test_rows(t);
    rank.generated_only = true;
    rank.stop_file = paths_.stop_file();
    return rank;
}

} // namespace selm
