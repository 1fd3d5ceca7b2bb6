// A program on run_program (src/apps) whose body ends as --end says, for tests of how all ranks end.
//   normally | stopped       everyone returns
//   agreed                   the last rank has an Error, shared by agree()
//   agreed-in-window         the same while the ranks of the node share memory
//   alone                    the last rank throws an Error that the others do not know of; they wait in a barrier
//   exception                the last rank throws something that is no Error; the others wait in a barrier
//   late                     the last rank sleeps for a minute while the others wait in a barrier
//   late-pending             the same while they wait for a gather that they started
//   frozen                   the last rank stops (SIGSTOP)
//   elsewhere                the last rank waits in a barrier of another group of ranks
//   slow                     the last rank comes half a second late
//   working                  the others sleep in a barrier while the last rank works and takes messages for three seconds
//   full                     standard output cannot be written (the test redirects it to /dev/full)

#include <chrono>
#include <csignal>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

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

void keep_others_waiting(const std::string& how, Communicator& world)
{
    using namespace std::chrono_literals;
    const bool last = world.rank() == world.size() - 1;
    const auto copy = world.duplicate("copy");
    if (how == "elsewhere" && last)
        copy->barrier("another barrier");
    if ((how == "late" || how == "late-pending") && last)
        std::this_thread::sleep_for(60s);
    if (how == "frozen" && last)
        std::raise(SIGSTOP);
    if (how == "slow" && last)
        std::this_thread::sleep_for(500ms);
    for (int i = 0; i < 300 && how == "working" && last; ++i) {
        std::this_thread::sleep_for(10ms);
        world.try_receive(1);
    }
    if (how == "working")
        world.sleeping_barrier("rest", {});
    if (how == "late" || how == "frozen" || how == "slow" || how == "elsewhere")
        world.barrier("meeting point");
    if (how == "late-pending") {
        std::vector<std::size_t> offsets(static_cast<std::size_t>(world.size()) + 1);
        std::iota(offsets.begin(), offsets.end(), std::size_t{0});
        std::vector<float> full(offsets.back());
        const std::vector<float> own(1, 1.0F);
        world.start_all_gather_shards(own, offsets, full, "parameters of layer 3")->wait();
    }
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
    keep_others_waiting(options.end, world);
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
