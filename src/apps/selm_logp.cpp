#include "program.hpp"
#include "report.hpp"
#include "selm/phases/logprob.hpp"

namespace {

void print(const selm::LogProbOptions& options, const selm::LogProbReport& report)
{
    using namespace selm::apps;
    std::cout << outcome_text(report.outcome, options.iter + " with /logprobs/" + options.name) << "\n"
              << "rows " << report.rows << ", from the journal " << report.resumed_rows << ", scored tokens " << report.scored_tokens
              << "\n"
              << fixed(report.seconds, 2) << " s, " << per_second(static_cast<double>(report.tokens), report.seconds) << " tokens/s\n";
}

} // namespace

int main(int argc, char** argv)
{
    using namespace selm;
    LogProbOptions options;
    const apps::ProgramSpec spec{
        .name = "selm_logp",
        .purpose = "sum the log-probabilities of the answers under a model (the reference)",
        .example = "--iter iter.h5 --model DIR",
        .describe = [&](OptionVisitor& visitor) { options.describe(visitor); },
        .validate = [&] { options.validate(); },
        .positional = {}};
    return apps::run_program(argc, argv, spec, [&](apps::ProgramContext& context) {
        const LogProbReport report = run_logprob(options, context.world);
        if (context.world.is_root())
            print(options, report);
        return apps::exit_code(report.outcome);
    });
}
