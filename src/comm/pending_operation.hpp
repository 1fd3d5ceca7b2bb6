#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>

#include <mpi.h>

#include "own_tags.hpp"
#include "reduce_plan.hpp"
#include "selm/comm/communicator.hpp"
#include "watch.hpp"

namespace selm::comm {

/// Communication under way: owns its requests and temporary buffers, not the user's buffers.
class Operation {
  public:
    virtual ~Operation() = default;
    /// Tests, does the local work that became possible, posts what comes next; true when everything is done.
    virtual bool advance() = 0;
};

/*
 * Why operations of one communicator never take each other's messages:
 * - What fits into one MPI call is one non-blocking collective of MPI, started at once. MPI matches them in the order of
 *   starting, which is the same on all ranks by contract. Which way an operation takes depends only on values that all
 *   ranks share (offsets, the message limit).
 * - Larger transfers are point-to-point messages. Exchange (also used for gathers) posts all its pieces at the start;
 *   MPI does not let messages of one sender, receiver and tag overtake each other, and both ends post them in one order.
 * - A reduce-scatter in rounds posts all its sends at the start, but each round's receives only when the round before was
 *   added up (its buffer is used again). So receives of two reduce-scatters interleave differently on different ranks:
 *   each has a tag of its own, and a tag is used again only after its former user is finished on this rank.
 * - Such a late receive is posted inside test() or wait() of *any* pending object (advance_all_in_flight), and inside any
 *   blocking collective of this module, so ranks that wait for two objects in opposite order cannot block each other.
 */

/// The label is used in errors. All factories post their first communication before they return.
/// @p tag is used where plan.in_rounds.
std::unique_ptr<Operation> start_reduce_scatter(MPI_Comm comm, std::span<const float> full, std::span<const std::size_t> offsets,
                                                std::span<float> shard, ReducePlan plan, int tag, std::string_view label);
std::unique_ptr<Operation> start_reduce_scatter(MPI_Comm comm, std::span<const std::uint16_t> full,
                                                std::span<const std::size_t> offsets, std::span<float> shard, ReducePlan plan,
                                                int tag, std::string_view label);
/// The same with any reduction; minimum and maximum of NaN and a number are NaN.
std::unique_ptr<Operation> start_reduce_scatter(MPI_Comm comm, std::span<const double> full, std::span<const std::size_t> offsets,
                                                std::span<double> shard, ReduceOp op, ReducePlan plan, int tag,
                                                std::string_view label);
std::unique_ptr<Operation> start_gather(MPI_Comm comm, std::span<const float> shard, std::span<const std::size_t> offsets,
                                        std::span<float> full, std::string_view label);
std::unique_ptr<Operation> start_gather(MPI_Comm comm, std::span<const double> shard, std::span<const std::size_t> offsets,
                                        std::span<double> full, std::string_view label);
std::unique_ptr<Operation> start_exchange(MPI_Comm comm, std::span<const Communicator::Outgoing> outgoing,
                                          std::span<const Communicator::Incoming> incoming, int tag, std::string_view label);
std::unique_ptr<Operation> start_barrier(MPI_Comm comm, std::string_view label);
/// A barrier of messages: ranks that are here never meet ranks that are in another collective, as they would in a
/// collective of MPI. So a rank may come here alone, with an error.
std::unique_ptr<Operation> start_message_barrier(MPI_Comm comm, std::string_view label);

double combine(double a, double b, ReduceOp op);

/// An operation as the user holds it; in the list of those in flight until it is done. Used by one thread, as MPI is.
class MpiPending final : public PendingCollective {
  public:
    /// Keeps a copy of the call's label.
    MpiPending(std::unique_ptr<Operation> operation, const Call& call, int tag);
    ~MpiPending() override;
    MpiPending(const MpiPending&) = delete;
    MpiPending& operator=(const MpiPending&) = delete;
    bool test() override;
    void wait() override;

    bool uses_tag(MPI_Comm comm, int tag) const { return call_.comm == comm && tag_ == tag; }
    /// One step; leaves the list when done.
    void advance();

  private:
    std::unique_ptr<Operation> operation_; ///< null when done
    std::string label_;
    Call call_;
    int tag_; ///< -1: none of its own
    int exceptions_at_start_;
};

/// Moves every operation in flight on, on all communicators.
void advance_all_in_flight();
/// The operation in flight that uses the tag on the communicator, or nullptr.
MpiPending* in_flight_with_tag(MPI_Comm comm, int tag);

} // namespace selm::comm
