#include "selm/comm/device_communicator.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "device_backend.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/base/provenance.hpp"
#include "selm/comm/agree.hpp"

namespace selm {

namespace {

using comm::DeviceBackend;
using Clock = std::chrono::steady_clock;

constexpr DevicePurpose purposes[] = {DevicePurpose::gradients, DevicePurpose::parameters};

DevicePurpose other(DevicePurpose purpose)
{
    return purpose == DevicePurpose::gradients ? DevicePurpose::parameters : DevicePurpose::gradients;
}

std::string_view name_of(DevicePurpose purpose)
{
    return purpose == DevicePurpose::gradients ? "gradients" : "parameters";
}

std::size_t bytes_of(DeviceElement element)
{
    return element == DeviceElement::f32 ? 4 : 2;
}

const std::byte* at(const void* data, std::size_t element_index, DeviceElement element)
{
    return static_cast<const std::byte*>(data) + element_index * bytes_of(element);
}

std::byte* at(void* data, std::size_t element_index, DeviceElement element)
{
    return static_cast<std::byte*>(data) + element_index * bytes_of(element);
}

/// Sleeps a little, and a little longer each time; true once the time-out (0: none) is over. restart() on progress.
class Patience {
  public:
    explicit Patience(double timeout_s) : timeout_s_(timeout_s) {}
    void restart() { start_ = Clock::now(); }
    bool is_over()
    {
        std::this_thread::sleep_for(pause_);
        pause_ = std::min<std::chrono::microseconds>(pause_ * 2, std::chrono::milliseconds(1));
        return timeout_s_ > 0 && std::chrono::duration<double>(Clock::now() - start_).count() > timeout_s_;
    }

  private:
    double timeout_s_;
    Clock::time_point start_ = Clock::now();
    std::chrono::microseconds pause_{5};
};

void check_offsets(std::span<const std::size_t> offsets, int size)
{
    SELM_EXPECT(offsets.size() == static_cast<std::size_t>(size) + 1);
    SELM_EXPECT(std::is_sorted(offsets.begin(), offsets.end()));
}

} // namespace

DeviceCommunicator::DeviceCommunicator(Communicator& ranks, const Options& options, std::unique_ptr<DeviceBackend> backend)
    : options_(options), backend_(std::move(backend)), rank_(ranks.rank()), size_(ranks.size()),
      exceptions_at_start_(std::uncaught_exceptions())
{
    agree(ranks, "device map", [&] {
        SELM_VALIDATE(options_.timeout_s >= 0, ExitCode::usage,
                      "the time-out of collectives is " << options_.timeout_s << " s. Pass 0 (wait for ever) or more");
        SELM_EXPECT(options_.scratch_bytes >= 4 * static_cast<std::size_t>(size_) && options_.scratch_bytes % 4 == 0);
    });
    const auto [index, place] = comm::choose_device(ranks, *backend_);
    device_ = index;
    description_ = cat(backend_->version(), ", device ", device_, " (", place.name, ", ", place.bus, ") of ", place.host);
    const auto ids = prepare(ranks);
    // From here on nothing is agreed on: a rank that is missing must end in this rank's time-out, not in a wait for it.
    try {
        for (const DevicePurpose purpose : purposes)
            connect(purpose, ids[static_cast<std::size_t>(purpose)]);
    } catch (...) {
        for (const DevicePurpose purpose : purposes)
            backend_->abort(purpose);
        release();
        throw;
    }
}

/// Memory, and rank 0's ids on all ranks. Collective.
std::array<std::vector<std::byte>, 2> DeviceCommunicator::prepare(Communicator& ranks)
{
    std::array<std::vector<std::byte>, 2> ids;
    try {
        agree(ranks, "device communicator", [&] {
            compute_event_ = backend_->create_event();
            scratch_ = backend_->allocate(options_.scratch_bytes + sizeof(float)); // and the barrier's word
            if (rank_ == 0)
                for (auto& id : ids)
                    id = backend_->unique_id();
        });
        for (auto& id : ids) {
            std::uint64_t bytes = id.size();
            broadcast_value(ranks, bytes, 0, "device communicator's id");
            id.resize(bytes);
            ranks.broadcast(id, 0, "device communicator's id");
        }
    } catch (...) {
        release();
        throw;
    }
    return ids;
}

void DeviceCommunicator::connect(DevicePurpose purpose, const std::vector<std::byte>& id)
{
    const std::string label = cat("connecting GPUs for ", name_of(purpose));
    try {
        backend_->start_connect(purpose, id, rank_, size_);
    } catch (const Error& error) {
        fail(label, error.what());
    }
    wait_until_ready(purpose, label);
}

DeviceCommunicator::~DeviceCommunicator()
{
    if (!broken_.empty() || std::uncaught_exceptions() > exceptions_at_start_) {
        for (const DevicePurpose purpose : purposes)
            backend_->abort(purpose);
    } else {
        close();
    }
    release();
}

void DeviceCommunicator::close() noexcept
{
    try {
        for (const DevicePurpose purpose : purposes)
            wait(purpose);
        for (const DevicePurpose purpose : purposes) {
            backend_->start_close(purpose);
            wait_until_ready(purpose, "closing the device communicator");
            backend_->finish_close(purpose);
        }
    } catch (const Error& error) {
        SELM_LOG_LOCAL(warning, "the device communicator did not end in order (" << error.what() << ")");
        for (const DevicePurpose purpose : purposes)
            backend_->abort(purpose);
    }
}

void DeviceCommunicator::release() noexcept
{
    for (void* event : events_)
        backend_->destroy_event(event);
    events_.clear();
    if (compute_event_ != nullptr)
        backend_->destroy_event(compute_event_);
    if (scratch_ != nullptr)
        backend_->free(scratch_);
}

void DeviceCommunicator::fail(std::string_view label, const std::string& reason)
{
    for (const DevicePurpose purpose : purposes)
        backend_->abort(purpose);
    broken_ = cat(label, ": ", reason);
    throw internal_error(broken_);
}

void DeviceCommunicator::wait_until_ready(DevicePurpose purpose, std::string_view label)
{
    for (Patience patience(options_.timeout_s);;) {
        const DeviceBackend::State state = backend_->state(purpose);
        if (state.progress == DeviceBackend::Progress::ready)
            return;
        if (state.progress == DeviceBackend::Progress::failed)
            fail(label, cat("rank ", rank_, " of ", size_, " got an error (", state.reason,
                            "). Another rank or the network may have gone: look for the first error in the job's log"));
        if (patience.is_over())
            fail(label, cat("rank ", rank_, " of ", size_, " waited ", options_.timeout_s,
                            " s for the other ranks (one of them has ended, hangs, or cannot be reached). Look for the first "
                            "error in the job's log, or raise --collective-timeout"));
    }
}

void* DeviceCommunicator::take_event()
{
    if (idle_events_.empty()) {
        events_.push_back(backend_->create_event());
        return events_.back();
    }
    void* const event = idle_events_.back();
    idle_events_.pop_back();
    return event;
}

/// @return whether an operation has ended since the last call.
bool DeviceCommunicator::forget_finished(Channel& channel, std::string_view label)
{
    bool progress = false;
    try {
        while (!channel.pending.empty() && backend_->is_done(channel.pending.front().event)) {
            progress = true;
            if (channel.pending.front().event != channel.last_event)
                idle_events_.push_back(channel.pending.front().event);
            channel.pending.pop_front();
        }
    } catch (const Error& error) {
        const std::string which = channel.pending.empty() ? std::string(label) : channel.pending.front().label;
        fail(which, error.what());
    }
    return progress;
}

void DeviceCommunicator::launch(DevicePurpose purpose, std::string_view label, const std::function<void()>& operation)
{
    if (!broken_.empty())
        throw internal_error(cat(broken_, " (so \"", label, "\" cannot start)"));
    Channel& own = channel(purpose);
    forget_finished(own, label);
    try {
        void* const others = channel(other(purpose)).last_event;
        if (!options_.concurrent && others != nullptr)
            backend_->stream_waits(backend_->stream(purpose), others);
        operation();
    } catch (const Error& error) {
        fail(label, cat("rank ", rank_, " of ", size_, ": ", error.what()));
    }
    wait_until_ready(purpose, label); // before that the operation may not be on the stream yet
    try {
        void* const event = take_event();
        backend_->record(event, backend_->stream(purpose));
        // The newest event stays out of the pool while the other purpose may have to wait for it.
        if (own.last_event != nullptr && (own.pending.empty() || own.pending.back().event != own.last_event))
            idle_events_.push_back(own.last_event);
        own.last_event = event;
        own.pending.push_back({std::string(label), event});
    } catch (const Error& error) {
        fail(label, error.what());
    }
}

void* DeviceCommunicator::stream(DevicePurpose purpose) const
{
    return backend_->stream(purpose);
}

void DeviceCommunicator::wait_for_compute(DevicePurpose purpose, void* compute_stream)
{
    backend_->record(compute_event_, compute_stream);
    backend_->stream_waits(backend_->stream(purpose), compute_event_);
}

void DeviceCommunicator::compute_waits_for(void* compute_stream, DevicePurpose purpose)
{
    if (void* const event = channel(purpose).last_event; event != nullptr)
        backend_->stream_waits(compute_stream, event);
}

void DeviceCommunicator::reduce_scatter_sum(DevicePurpose purpose, const void* full, DeviceElement element,
                                            std::span<const std::size_t> offsets, float* shard, const DeviceOrderedSum& sum,
                                            std::string_view label)
{
    check_offsets(offsets, size_);
    SELM_EXPECT(purpose == DevicePurpose::gradients || !options_.concurrent); // there is one scratch memory
    const auto ranks = static_cast<std::size_t>(size_), own_rank = static_cast<std::size_t>(rank_);
    const std::size_t own_length = offsets[own_rank + 1] - offsets[own_rank];
    if (size_ == 1) {
        launch(purpose, label, [&] {
            sum(at(full, offsets[0], element), element, 1, static_cast<std::int64_t>(own_length), shard, backend_->stream(purpose));
        });
        return;
    }
    std::size_t longest = 0;
    for (std::size_t r = 0; r < ranks; ++r)
        longest = std::max(longest, offsets[r + 1] - offsets[r]);
    std::size_t round = options_.scratch_bytes / bytes_of(element) / ranks;
    if (round > 64)
        round -= round % 64; // parts of whole rounds are aligned
    for (std::size_t done = 0; done < longest; done += round) {
        const auto piece_length = [&](std::size_t length) { return length > done ? std::min(round, length - done) : 0; };
        const std::size_t count = piece_length(own_length);
        launch(purpose, label, [&] {
            backend_->group(purpose, [&] {
                for (std::size_t r = 0; r < ranks; ++r) {
                    const std::size_t theirs = piece_length(offsets[r + 1] - offsets[r]);
                    if (r != own_rank && theirs > 0)
                        backend_->send(purpose, at(full, offsets[r] + done, element), theirs * bytes_of(element),
                                       static_cast<int>(r));
                    if (r != own_rank && count > 0)
                        backend_->receive(purpose, at(scratch_, r * count, element), count * bytes_of(element),
                                          static_cast<int>(r));
                }
            });
        });
        if (count == 0)
            continue;
        // The exchange is on the stream by now (launch saw to that), so the sum comes after it.
        launch(purpose, label, [&] {
            backend_->copy(purpose, at(scratch_, own_rank * count, element), at(full, offsets[own_rank] + done, element),
                           count * bytes_of(element));
            sum(scratch_, element, size_, static_cast<std::int64_t>(count), shard + done, backend_->stream(purpose));
        });
    }
}

void DeviceCommunicator::reduce_scatter_sum_unordered(DevicePurpose purpose, const void* full, void* shard, std::size_t count,
                                                      DeviceElement element, std::string_view label)
{
    launch(purpose, label, [&] { backend_->reduce_scatter(purpose, full, shard, count, element); });
}

void DeviceCommunicator::all_reduce_sum_unordered(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element,
                                                  std::string_view label)
{
    launch(purpose, label, [&] { backend_->all_reduce(purpose, data, count, element); });
}

void DeviceCommunicator::all_gather_shards(DevicePurpose purpose, const void* shard, std::span<const std::size_t> offsets,
                                           void* full, DeviceElement element, std::string_view label)
{
    check_offsets(offsets, size_);
    const auto own = static_cast<std::size_t>(rank_);
    const std::size_t length = offsets[1] - offsets[0];
    bool equal = true;
    for (std::size_t r = 0; r + 1 < offsets.size(); ++r)
        equal = equal && offsets[r + 1] - offsets[r] == length;
    launch(purpose, label, [&] {
        if (equal) {
            backend_->all_gather(purpose, shard, at(full, offsets[0], element), length, element);
            return;
        }
        void* const own_part = at(full, offsets[own], element);
        const std::size_t own_length = offsets[own + 1] - offsets[own];
        if (own_part != shard && own_length > 0)
            backend_->copy(purpose, own_part, shard, own_length * bytes_of(element));
        backend_->group(purpose, [&] {
            for (std::size_t r = 0; r + 1 < offsets.size(); ++r)
                if (const std::size_t count = offsets[r + 1] - offsets[r]; count > 0)
                    backend_->broadcast(purpose, at(full, offsets[r], element), count, element, static_cast<int>(r));
        });
    });
}

void DeviceCommunicator::broadcast(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element, int root,
                                   std::string_view label)
{
    SELM_EXPECT(root >= 0 && root < size_);
    launch(purpose, label, [&] { backend_->broadcast(purpose, data, count, element, root); });
}

void DeviceCommunicator::exchange(DevicePurpose purpose, std::span<const Outgoing> outgoing, std::span<const Incoming> incoming,
                                  std::string_view label)
{
    const auto is_partner = [&](const auto& message) {
        return message.rank >= 0 && message.rank < size_ && message.rank != rank_;
    };
    SELM_EXPECT(std::all_of(outgoing.begin(), outgoing.end(), is_partner));
    SELM_EXPECT(std::all_of(incoming.begin(), incoming.end(), is_partner));
    launch(purpose, label, [&] {
        backend_->group(purpose, [&] {
            for (const Outgoing& message : outgoing)
                backend_->send(purpose, message.data, message.bytes, message.rank);
            for (const Incoming& message : incoming)
                backend_->receive(purpose, message.data, message.bytes, message.rank);
        });
    });
}

void DeviceCommunicator::barrier(DevicePurpose purpose, std::string_view label)
{
    void* const word = static_cast<std::byte*>(scratch_) + options_.scratch_bytes; // whatever it holds
    launch(purpose, label, [&] { backend_->all_reduce(purpose, word, 1, DeviceElement::f32); });
    wait(purpose);
}

void DeviceCommunicator::wait(DevicePurpose purpose)
{
    if (!broken_.empty())
        throw internal_error(broken_);
    Channel& own = channel(purpose);
    for (Patience patience(options_.timeout_s);;) {
        if (forget_finished(own, name_of(purpose)))
            patience.restart();
        if (own.pending.empty())
            return;
        const std::string& label = own.pending.front().label;
        const DeviceBackend::State state = backend_->state(purpose);
        if (state.progress == DeviceBackend::Progress::failed)
            fail(label, cat("rank ", rank_, " of ", size_, " got an error (", state.reason,
                            "). Another rank or the network may have gone: look for the first error in the job's log"));
        if (patience.is_over())
            fail(label, cat("not done after ", options_.timeout_s, " s on rank ", rank_, " of ", size_,
                            " (a rank has not come to it, has ended, or cannot be reached). Look for the first error in the "
                            "job's log, or raise --collective-timeout"));
    }
}

std::unique_ptr<DeviceCommunicator> make_device_communicator(Communicator& ranks, const DeviceCommunicator::Options& options)
{
#ifdef SELM_ENABLE_CUDA
    return std::make_unique<DeviceCommunicator>(ranks, options, comm::make_nccl_backend());
#else
    static_cast<void>(options);
    agree(ranks, "device communicator", [] {
        throw config_error("this build has no NCCL (SELM_ENABLE_CUDA is off). Build the preset \"cuda\", or pass --device cpu");
    });
    return nullptr; // not reached: agree has thrown
#endif
}

} // namespace selm
