// A program on run_program (src/apps) whose body ends as --end says, for tests of how all ranks end.
//   normally | stopped       everyone returns
//   agreed                   the last rank has an Error, shared by agree()
//   agreed-in-window         the same while the ranks of the node share memory
//   alone                    the last rank throws an Error that the others do not know of; they wait in a barrier
//   exception                the last rank throws something that is no Error; the others wait in a barrier
//   full                     standard output cannot be written (the test redirects it to /dev/full)

#include <stdexcept>

#include "program.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/communicator.hpp"

namespace {

using namespace selm;

struct Options {
    CommonOptions common;
    std::string end;

    void describe(OptionVisitor& visitor)
    {
        common.describe(visitor);
        visitor.option("inspect", "file", end, "how to end", OptionRole::operational); // a key that configuration files know
    }
};

void agreed_error(Communicator& world)
{
    agree(world, "work", [&] {
        if (world.rank() == world.size() - 1)
            throw data_error("row 7 of x.h5 is bad. Import it again");
    });
}

ExitCode body(const Options& options, apps::ProgramContext& context)
{
    Communicator& world = context.world;
    const bool last = world.rank() == world.size() - 1;
    if (options.end == "stopped")
        return ExitCode::stopped;
    if (options.end == "agreed")
        agreed_error(world);
    if (options.end == "agreed-in-window") {
        const auto node = world.split_node("node");
        const NodeSharedMemory memory(*node, 100000, "shared");
        agreed_error(world);
    }
    if (options.end == "alone" && last)
        throw data_error("only this rank knows");
    if (options.end == "exception" && last)
        throw std::out_of_range("index 9");
    if (options.end == "alone" || options.end == "exception")
        world.barrier("wait for the last rank");
    if (world.is_root())
        std::cout << "recipe " << context.recipe_hash << "\n";
    return ExitCode::done;
}

} // namespace

int main(int argc, char** argv)
{
    Options options;
    const apps::ProgramSpec spec{.name = "selm_program_tool",
                                 .purpose = "ends in the way that is asked for",
                                 .example = "HOW",
                                 .describe = [&](OptionVisitor& visitor) { options.describe(visitor); },
                                 .validate = [&] { options.common.validate(); },
                                 .positional = "file"};
    return apps::run_program(argc, argv, spec, [&](apps::ProgramContext& context) { return body(options, context); });
}
