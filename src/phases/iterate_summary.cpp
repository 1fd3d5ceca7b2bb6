#include <cstdio>
#include <string>

#include <nlohmann/json.hpp>

#include "run_directory.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

using nlohmann::json;

std::string fixed(double value, int digits)
{
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", digits, value);
    return text;
}

std::string scientific(double value)
{
    char text[64];
    std::snprintf(text, sizeof text, "%.3e", value);
    return text;
}

double number(const json& object, const char* key)
{
    const auto found = object.find(key);
    return found != object.end() && found->is_number() ? found->get<double>() : 0.0;
}

std::int64_t count(const json& object, const char* key)
{
    return static_cast<std::int64_t>(number(object, key));
}

std::string rate(const json& phase)
{
    const double seconds = number(phase, "seconds");
    if (seconds <= 0)
        return "-";
    return fixed(number(phase, "tokens") / seconds, 0) + " tokens/s, " + fixed(seconds, 1) + " s";
}

const json* find(const json& iteration, const char* phase)
{
    const auto found = iteration.find(phase);
    return found == iteration.end() ? nullptr : &*found;
}

std::string answers_block(const json& rank)
{
    if (count(rank, "generated_best") + count(rank, "generated_middle") + count(rank, "generated_worst") == 0)
        return cat("  rows                    ", count(rank, "rows"), " (the given pairs, no new answers)\n");
    const auto& mean = rank.at("mean_score");
    return cat("  rows                    ", count(rank, "rows"), "\n  new answer was          best ", count(rank, "generated_best"),
               ", middle ", count(rank, "generated_middle"), ", worst ", count(rank, "generated_worst"), " (ties best = worst: ",
               count(rank, "ties"), ")\n  mean ranker score       new ", fixed(mean.at(0).get<double>(), 4), ", chosen ",
               fixed(mean.at(1).get<double>(), 4), ", rejected ", fixed(mean.at(2).get<double>(), 4), '\n');
}

std::string train_block(const json& train)
{
    return cat("  loss                    ", fixed(number(train, "loss"), 6), " = DPO ", fixed(number(train, "loss_dpo"), 6), " + optimism ",
               scientific(number(train, "loss_optimism")), "\n  reward                  margin ", scientific(number(train, "reward_margin")),
               ", accuracy ", fixed(number(train, "reward_accuracy"), 3), " (", count(train, "steps"), " optimizer steps)\n");
}

std::string speed_block(const json& iteration)
{
    std::string text;
    for (const auto& [key, label] : {std::pair{"generate", "generate"}, {"rank", "rank    "}, {"logprob", "log-prob"}, {"train", "train   "},
                                     {"test_generate", "held-out generate"}, {"test_rank", "held-out rank"}})
        if (const json* phase = find(iteration, key))
            text += cat("    ", label, std::string(20 - std::string(label).size(), ' '), rate(*phase), '\n');
    return text.empty() ? text : "  speed per phase\n" + text;
}

std::string held_out(const json& manifest, std::int64_t t)
{
    auto mean = [&](std::int64_t i) -> const json* {
        const auto entry = manifest.find("iter" + std::to_string(i));
        return entry == manifest.end() ? nullptr : find(*entry, "test_rank");
    };
    const json* before = mean(t - 1);
    const json* after = mean(t);
    if (!before || !after)
        return {};
    const double was = before->at("mean_score").at(0).get<double>();
    const double is = after->at("mean_score").at(0).get<double>();
    return cat("  held-out answers        mean ranker score ", fixed(was, 4), " before, ", fixed(is, 4), " after (",
               is - was < 0 ? "" : "+", fixed(is - was, 4), ", ", count(*after, "rows"), " prompts)\n");
}

} // namespace

std::string block_text(const nlohmann::json& manifest, std::int64_t t)
{
    const json& iteration = manifest.at("iter" + std::to_string(t));
    std::string text = cat("iteration ", t, '\n');
    if (const json* rank = find(iteration, "rank"))
        text += answers_block(*rank);
    if (const json* train = find(iteration, "train"))
        text += train_block(*train);
    return text + held_out(manifest, t) + speed_block(iteration);
}

} // namespace selm
