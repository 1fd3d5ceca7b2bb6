#include "selm/base/options.hpp"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string_view>

#include "selm/base/error.hpp"

namespace selm {

namespace {

void validate_word(const char* name, const std::string& value, std::initializer_list<std::string_view> words)
{
    if (std::find(words.begin(), words.end(), value) != words.end())
        return;
    std::string list;
    for (const std::string_view word : words)
        list.append(list.empty() ? "" : "|").append(word);
    throw usage_error(cat("--", name, " ", value, " is not known. Use one of ", list));
}

void validate_range(const char* name, std::int64_t value, std::int64_t lowest)
{
    SELM_VALIDATE(value >= lowest, ExitCode::usage, "--" << name << " " << value << " is too small. Use " << lowest << " or more");
}

} // namespace

void CommonOptions::describe(OptionVisitor& visitor)
{
    visitor.option("run", "seed", seed, "seed of all random streams", OptionRole::recipe);
    visitor.option("run", "threads", threads, "threads per rank", OptionRole::operational);
    visitor.option("run", "device", device, "cpu|cuda", OptionRole::operational);
    visitor.option("run", "dtype", dtype, "type of computation: bf16|fp32", OptionRole::recipe);
    visitor.option("run", "engine", engine, "matrix kernels: auto|xsmm|aten", OptionRole::operational);
    visitor.option("run", "progress", progress, "progress lines: auto|on|off (auto: rewritten in place on a terminal)",
                   OptionRole::operational);
    visitor.option("run", "collective-timeout", collective_timeout,
                   "seconds that a rank waits in one collective before the late rank is named and all end (0: for ever)",
                   OptionRole::operational);
    visitor.option("run", "walltime-margin", walltime_margin,
                   "stop, with everything saved, this many seconds before the end of the batch job (0: not)", OptionRole::operational);
}

void CommonOptions::validate() const
{
    validate_range("seed", seed, 0);
    validate_range("threads", threads, 1);
    validate_word("device", device, {"cpu", "cuda"});
#ifndef SELM_ENABLE_CUDA
    if (device == "cuda")
        throw config_error("--device cuda is not in this build (it has no CUDA code). Build with scripts/build cuda, or use --device cpu");
#endif
    validate_word("dtype", dtype, {"bf16", "fp32"});
    validate_word("engine", engine, {"auto", "xsmm", "aten"});
    validate_word("progress", progress, {"auto", "on", "off"});
    SELM_VALIDATE(std::isfinite(collective_timeout) && collective_timeout >= 0, ExitCode::usage,
                  "--collective-timeout " << collective_timeout << " is no number of seconds. Use 0 (wait for ever) or more");
    SELM_VALIDATE(std::isfinite(walltime_margin) && walltime_margin >= 0, ExitCode::usage,
                  "--walltime-margin " << walltime_margin << " is no number of seconds. Use 0 or more");
}

void EncodingOptions::describe(OptionVisitor& visitor)
{
    describe_tokens(visitor);
    visitor.option("run", "on-long-row", on_long_row,
                   "recipe: a row whose middle-ranked answer goes beyond the model's context: stop|cap",
                   OptionRole::operational); // a run that stopped goes on with cap; what exists depends on neither
}

void EncodingOptions::describe_tokens(OptionVisitor& visitor)
{
    visitor.option("run", "encoding", encoding,
                   "how prompt and response become tokens: chat, or recipe (to the token as the paper's authors)", OptionRole::recipe);
    visitor.option("run", "chat-format", chat_format, "name of the chat format (empty: recognised from the model directory)",
                   OptionRole::recipe);
    visitor.option("run", "bos-token", bos_token, "recipe: id or text of the token before prompts, or none (empty: the tokenizer's)",
                   OptionRole::recipe);
    visitor.option("run", "eos-token", eos_token, "recipe: id or text of the token after answers (empty: the tokenizer's)",
                   OptionRole::recipe);
    visitor.option("run", "max-length", max_length, "tokens of prompt and response together", OptionRole::recipe);
    visitor.option("run", "max-prompt-length", max_prompt_length, "tokens of the prompt", OptionRole::recipe);
}

void EncodingOptions::validate() const
{
    validate_word("encoding", encoding, {"chat", "recipe"});
    validate_word("on-long-row", on_long_row, {"stop", "cap"});
    SELM_VALIDATE(encoding == "recipe" || (bos_token.empty() && eos_token.empty()), ExitCode::usage,
                  "--" << (bos_token.empty() ? "eos" : "bos")
                       << "-token is for --encoding recipe (chat adds no tokens but the format's). Leave it out");
    validate_range("max-prompt-length", max_prompt_length, 1);
    SELM_VALIDATE(max_length > max_prompt_length, ExitCode::usage,
                  "--max-length " << max_length << " leaves no room for a response after --max-prompt-length "
                                  << max_prompt_length << ". Raise the one or lower the other");
}

} // namespace selm
