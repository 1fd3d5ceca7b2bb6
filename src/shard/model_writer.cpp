#include "selm/shard/model_writer.hpp"

#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"

namespace selm {

void write_model_collectively(SafetensorsWriter& writer, Communicator& comm, const std::function<void()>& write_own)
{
    try {
        agree(comm, "making the weight files", [&] {
            if (comm.is_root())
                writer.create();
        });
        agree(comm, "writing the weights", [&] {
            write_own();
            writer.finish();
        });
        const std::int64_t written =
            all_reduce_value(comm, writer.elements_written(), ReduceOp::sum, "written elements");
        SELM_EXPECT(written == writer.elements());
        agree(comm, "naming the weight files", [&] {
            if (comm.is_root())
                writer.publish();
        });
    } catch (...) {
        if (comm.is_root())
            writer.discard();
        throw;
    }
}

} // namespace selm
