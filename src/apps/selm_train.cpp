#include "program.hpp"
#include "report.hpp"
#include "selm/phases/train.hpp"

namespace {

void print(const selm::TrainOptions& options, const selm::TrainReport& report)
{
    using namespace selm::apps;
    std::cout << outcome_text(report.outcome, options.output) << "\n"
              << "rows " << report.rows << ", optimizer steps " << report.steps;
    if (report.resumed_from_step > 0)
        std::cout << " (resumed after step " << report.resumed_from_step << ")";
    std::cout << "\nloss " << fixed(report.loss, 6);
    if (options.objective == "selm")
        std::cout << " = dpo " << fixed(report.loss_dpo, 6) << " + optimism " << fixed(report.loss_optimism, 6);
    std::cout << " (first step " << fixed(report.first_loss, 6) << ", last " << fixed(report.last_loss, 6) << ")\n"
              << "reward margin " << fixed(report.reward_margin, 6) << ", accuracy " << fixed(report.reward_accuracy, 4) << "\n"
              << fixed(report.seconds, 2) << " s, " << per_second(static_cast<double>(report.tokens), report.seconds) << " tokens/s\n";
}

} // namespace

int main(int argc, char** argv)
{
    using namespace selm;
    TrainOptions options;
    const apps::ProgramSpec spec{
        .name = "selm_train",
        .purpose = "train a policy (SELM, DPO) or a reward model (Bradley-Terry)",
        .example = "--iter iter.h5 --policy DIR --output DIR",
        .describe = [&](OptionVisitor& visitor) { options.describe(visitor); },
        .validate = [&] { options.validate(); },
        .positional = {}};
    return apps::run_program(argc, argv, spec, [&](apps::ProgramContext& context) {
        const TrainReport report = run_train(options, context.world);
        if (context.world.is_root())
            print(options, report);
        return apps::exit_code(report.outcome);
    });
}
