#include "common_options.hpp"
#include "program.hpp"
#include "report.hpp"
#include "selm/phases/import.hpp"

int main(int argc, char** argv)
{
    using namespace selm;
    apps::WithCommonOptions<ImportOptions> options;
    const apps::ProgramSpec spec{
        .name = "selm_import",
        .purpose = "read preference rows (.jsonl, .parquet) into prefs.h5",
        .example = "--input train.jsonl --output prefs.h5",
        .describe = [&](OptionVisitor& visitor) { options.describe(visitor); },
        .validate = [&] { options.validate(); },
        .positional = {},
        .one_rank_works = true};
    return apps::run_program(argc, argv, spec, [&](apps::ProgramContext& context) {
        const ImportReport report = run_import(options.own, context.world);
        if (context.world.is_root())
            std::cout << report.text();
        return ExitCode::done;
    });
}
