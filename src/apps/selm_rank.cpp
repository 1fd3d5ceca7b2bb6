#include "program.hpp"
#include "report.hpp"
#include "selm/phases/rank.hpp"

namespace {

void print(const selm::RankOptions& options, const selm::RankReport& report)
{
    using namespace selm::apps;
    const auto rows = static_cast<double>(report.rows);
    std::cout << outcome_text(report.outcome, options.iter + " with /ranking" + (options.generated_only ? "" : " and /pairs")) << "\n"
              << "rows " << report.rows;
    if (!options.generated_only && !options.rankers.empty())
        std::cout << "; the generated answer was best " << percent(static_cast<double>(report.generated_best), rows) << ", middle "
                  << percent(static_cast<double>(report.generated_middle), rows) << ", worst "
                  << percent(static_cast<double>(report.generated_worst), rows) << "; best = worst in " << report.ties << " rows";
    if (!options.rankers.empty()) {
        std::cout << "\nmean score: generated " << fixed(report.mean_score[0], 4);
        if (!options.generated_only)
            std::cout << ", chosen " << fixed(report.mean_score[1], 4) << ", rejected " << fixed(report.mean_score[2], 4);
    }
    std::cout << "\n"
              << fixed(report.seconds, 2) << " s, " << per_second(static_cast<double>(report.tokens), report.seconds) << " tokens/s\n";
}

} // namespace

int main(int argc, char** argv)
{
    using namespace selm;
    RankOptions options;
    const apps::ProgramSpec spec{
        .name = "selm_rank",
        .purpose = "score generated, chosen and rejected answers and choose the pair to learn from",
        .example = "--iter iter.h5 --ranker reward:DIR",
        .describe = [&](OptionVisitor& visitor) { options.describe(visitor); },
        .validate = [&] { options.validate(); },
        .positional = {}};
    return apps::run_program(argc, argv, spec, [&](apps::ProgramContext& context) {
        const RankReport report = run_rank(options, context.world);
        if (context.world.is_root())
            print(options, report);
        return apps::exit_code(report.outcome);
    });
}
