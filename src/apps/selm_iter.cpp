#include "program.hpp"
#include "report.hpp"
#include "selm/phases/iterate.hpp"

int main(int argc, char** argv)
{
    using namespace selm;
    IterateOptions options;
    const apps::ProgramSpec spec{
        .name = "selm_iter",
        .purpose = "all phases of all iterations from one recipe, resuming where the run directory stands",
        .example = "--config recipe.cfg --run DIR",
        .describe = [&](OptionVisitor& visitor) { options.describe(visitor); },
        .validate = [&] { options.validate(); },
        .positional = {},
        .alone = "status",
        .plans = "dry-run"};
    return apps::run_program(argc, argv, spec, [&](apps::ProgramContext& context) {
        options.recipe_text = context.recipe_text;
        const IterateReport report = run_iterate(options, context.world, std::cout);
        if (context.world.is_root())
            std::cout << report.status;
        return apps::exit_code(report.outcome);
    });
}
