#include <algorithm>

#include "selm/base/error.hpp"
#include "selm/phases/generate.hpp"

namespace selm {
namespace {

constexpr double lowest_temperature = 0.01; // below, float weights of all but the largest logits vanish: use greedy

void at_least(const char* name, std::int64_t value, std::int64_t lowest)
{
    SELM_VALIDATE(value >= lowest, ExitCode::usage,
                  "--" << name << " " << value << " is too small. Use " << lowest << " or more");
}

} // namespace

void GenerateOptions::describe(OptionVisitor& visitor)
{
    common.describe(visitor);
    encoding.describe(visitor);
    visitor.option("gen", "data", data, "prefs.h5 with the prompts", OptionRole::operational);
    visitor.option("gen", "policy", policy, "Hugging Face model directory that answers", OptionRole::operational);
    visitor.option("gen", "output", output, "iter.h5 to write", OptionRole::operational);
    visitor.option("gen", "iteration", iteration, "number of the iteration (0: that of the portion)",
                   OptionRole::recipe);
    visitor.option("gen", "portion", portion, "which portion of the rows, from 1", OptionRole::recipe);
    visitor.option("gen", "portions", portions, "portions that the rows are cut into", OptionRole::recipe);
    visitor.option("gen", "max-new-tokens", max_new_tokens, "tokens of an answer at most", OptionRole::recipe);
    visitor.option("gen", "temperature", temperature, "0: greedy", OptionRole::recipe);
    visitor.option("gen", "top-p", top_p, "sample from the most probable tokens with this mass (1: off)",
                   OptionRole::recipe);
    visitor.option("gen", "top-k", top_k, "sample from this many most probable tokens (0: off)", OptionRole::recipe);
    visitor.option("gen", "slots", slots, "sequences decoded together per rank", OptionRole::operational);
    visitor.option("gen", "prefill-tokens", prefill_tokens, "tokens of prompts read per step", OptionRole::operational);
    visitor.option("gen", "share-prefixes", share_prefixes, "on|off: what prompts begin with alike is read once", OptionRole::operational);
    visitor.option("gen", "cuda-graphs", cuda_graphs, "on|off: with --device cuda, decoding steps are repeated as CUDA graphs",
                   OptionRole::operational);
    visitor.option("gen", "on-long-prompt", on_long_prompt, "a prompt that fills the model's context: stop|skip",
                   OptionRole::recipe);
    visitor.option("gen", "responses", responses, "FILE.jsonl with answers made elsewhere, or none; empty: generate",
                   OptionRole::recipe);
    visitor.option("gen", "stop-file", stop_file, "stop, with everything saved, when this file appears",
                   OptionRole::operational);
}

void GenerateOptions::validate() const
{
    common.validate();
    encoding.validate();
    SELM_VALIDATE(!data.empty(), ExitCode::usage, "--data is missing (there are no prompts). Pass --data prefs.h5");
    SELM_VALIDATE(!output.empty(), ExitCode::usage, "--output is missing (answers need a file). Pass --output iter.h5");
    SELM_VALIDATE(!policy.empty() || !responses.empty(), ExitCode::usage,
                  "--policy is missing (there is no model to answer). Pass --policy DIR, or --responses FILE|none");
    at_least("iteration", iteration, 0);
    at_least("portions", portions, 1);
    SELM_VALIDATE(portion >= 1 && portion <= portions, ExitCode::usage,
                  "--portion " << portion << " does not exist (the rows are cut into " << portions
                               << "). Pass --portion 1.." << portions);
    at_least("max-new-tokens", max_new_tokens, 1);
    at_least("top-k", top_k, 0);
    at_least("slots", slots, 1);
    at_least("prefill-tokens", prefill_tokens, 1);
    SELM_VALIDATE(temperature == 0 || (temperature >= lowest_temperature && temperature <= 100), ExitCode::usage,
                  "--temperature " << temperature << " is out of range. Use 0 (greedy) or " << lowest_temperature
                                   << " to 100");
    SELM_VALIDATE(top_p > 0 && top_p <= 1, ExitCode::usage,
                  "--top-p " << top_p << " is out of range. Use more than 0 and at most 1");
    SELM_VALIDATE(on_long_prompt == "stop" || on_long_prompt == "skip", ExitCode::usage,
                  "--on-long-prompt " << on_long_prompt << " is not known. Use one of stop|skip");
}

} // namespace selm
