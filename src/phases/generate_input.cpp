#include "generate_input.hpp"

#include <filesystem>
#include <variant>

#include <unistd.h>

#include "selm/base/error.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/journal.hpp"
#include "selm/phases/shared_model.hpp"

namespace selm {
namespace {

void check_output_directory(const std::string& output)
{
    const std::filesystem::path parent = std::filesystem::path(output).parent_path();
    const std::string directory = parent.empty() ? "." : parent.string();
    SELM_VALIDATE(
        std::filesystem::is_directory(directory) && ::access(directory.c_str(), W_OK | X_OK) == 0, ExitCode::usage,
        "--output "
            << output << ": " << directory
            << " is no directory that can be written to (answers could not be saved). Make it, or choose another");
}

std::string text_attribute(const h5::Attributes& attributes, const std::string& name)
{
    const auto found = attributes.find(name);
    const auto* text = found == attributes.end() ? nullptr : std::get_if<std::string>(&found->second);
    return text == nullptr ? std::string() : *text;
}

/// Throws unless the iteration file is what this run would make.
void check_same_source(const IterationReader& file, const GenerationSource& source)
{
    const IterationAttributes found = file.attributes();
    const std::string responses = text_attribute(found.file.extra, "responses_digest");
    const auto differs = [&](const std::string& what) {
        throw data_error(cat(file.path(), " is there already and was made ", what,
                             " (it is not replaced: it may be needed). Remove it, or pass another --output"));
    };
    if (found.file.source_digest != source.data_digest)
        differs("from other prompts");
    if (found.policy_digest != source.policy_digest)
        differs("by another policy");
    if (responses != source.responses_digest)
        differs("from other responses");
    if (found.file.config_hash != source.config.recipe_hash)
        differs("with other options (see its attribute config)");
}

} // namespace

GenerationInput open_input(const GenerateOptions& options, Communicator& comm)
{
    GenerationInput input;
    agree(comm, "opening the prompts", [&] {
        input.prefs = std::make_unique<PreferencesReader>(options.data);
        input.range = portion_range(input.prefs->rows(), options.portion, options.portions);
        SELM_VALIDATE(input.rows() > 0, ExitCode::bad_data,
                      options.data << ": portion " << options.portion << " of " << options.portions
                                   << " has no rows (the file has " << input.prefs->rows()
                                   << "). Use fewer portions or more rows");
        if (comm.is_root())
            check_output_directory(options.output);
    });
    input.source.config = config_text(options);
    input.source.data_digest = root_string(comm, "digest of the prompts", [&] { return input.prefs->digest(); });
    if (options.responses.empty())
        input.source.policy_digest =
            root_string(comm, "digest of the policy", [&] { return model_digest(options.policy); });
    else if (options.responses != "none")
        input.source.responses_digest =
            root_string(comm, "digest of the responses", [&] { return hash_file(options.responses); });
    return input;
}

std::optional<GenerateReport> existing_output(const GenerateOptions& options, const GenerationInput& input, Communicator& comm)
{
    struct Found {
        std::int64_t exists = 0, rows = 0, none = 0, stop = 0, length = 0;
    } found;
    agree(comm, "looking at the output", [&] {
        if (!comm.is_root() || !std::filesystem::exists(options.output))
            return;
        const IterationReader file(options.output);
        check_same_source(file, input.source);
        found = {.exists = 1, .rows = file.rows()};
        for (std::int64_t i = 0; i < file.rows(); ++i) {
            const FinishReason reason = file.finish_reason(i);
            found.none += reason == FinishReason::none;
            found.stop += reason == FinishReason::stop;
            found.length += reason == FinishReason::length;
        }
        Journal::remove_leftover(options.output);
    });
    broadcast_value(comm, found, 0, "looking at the output");
    if (found.exists == 0)
        return std::nullopt;
    SELM_LOG(info, options.output << " is complete already: " << found.rows << " rows");
    return GenerateReport{.outcome = Outcome::already_complete,
                          .rows = found.rows,
                          .skipped_rows = options.responses == "none" ? 0 : found.none,
                          .stopped_by_end = found.stop,
                          .stopped_by_length = found.length};
}

} // namespace selm
