#include "common_options.hpp"
#include "program.hpp"
#include "selm/phases/inspect.hpp"

int main(int argc, char** argv)
{
    using namespace selm;
    apps::WithCommonOptions<InspectOptions> options;
    const apps::ProgramSpec spec{
        .name = "selm_inspect",
        .purpose = "show, check, digest or encode a file that SELM wrote",
        .example = "FILE.h5 [--row I | --verify | --digest | --encode MODEL_DIR [--rows A:B] [--encoding chat|recipe]]",
        .describe = [&](OptionVisitor& visitor) { options.describe(visitor); },
        .validate = [&] { options.validate(); },
        .positional = "file"};
    return apps::run_program(argc, argv, spec, [&](apps::ProgramContext& context) {
        run_inspect(options.own, context.world, std::cout);
        return ExitCode::done;
    });
}
