#include "program.hpp"
#include "report.hpp"
#include "selm/phases/generate.hpp"

namespace {

void print(const selm::GenerateOptions& options, const selm::GenerateReport& report)
{
    using namespace selm::apps;
    std::cout << outcome_text(report.outcome, options.output) << "\n"
              << "rows " << report.rows << ", generated now " << report.generated_rows << ", from the journal " << report.resumed_rows
              << ", skipped " << report.skipped_rows << "\n"
              << "prompt tokens " << report.prompt_tokens << " (" << report.copied_tokens << " shared with other prompts), new tokens "
              << report.new_tokens << " (" << report.stopped_by_end << " answers ended by themselves, " << report.stopped_by_length << " by length)\n"
              << fixed(report.seconds, 2) << " s, " << per_second(static_cast<double>(report.new_tokens), report.seconds)
              << " new tokens/s, ranks idle " << fixed(100 * report.idle_fraction, 1) << " %";
    if (report.first_token_s > 0)
        std::cout << ", first token " << fixed(report.first_token_s, 2) << " s after the start";
    std::cout << "\n";
}

} // namespace

int main(int argc, char** argv)
{
    using namespace selm;
    GenerateOptions options;
    const apps::ProgramSpec spec{
        .name = "selm_gen",
        .purpose = "answer the prompts of a portion with the current policy",
        .example = "--data prefs.h5 --portion 1 --portions 3 --policy DIR --output iter.h5",
        .describe = [&](OptionVisitor& visitor) { options.describe(visitor); },
        .validate = [&] { options.validate(); },
        .positional = {}};
    return apps::run_program(argc, argv, spec, [&](apps::ProgramContext& context) {
        const GenerateReport report = run_generate(options, context.world);
        if (context.world.is_root())
            print(options, report);
        return apps::exit_code(report.outcome);
    });
}
