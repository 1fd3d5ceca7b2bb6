#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>

#include "device_runtime.hpp"
#include "engine_test_support.hpp"
#include "selm/kernels/offload.hpp"

// OffloadPipeline on streams that are threads: copies really run beside the host's work, late and in any order between
// streams, so that a missing event shows as wrong numbers.
namespace selm {
namespace {

using Floats = std::vector<float>;

/// Done once; any number of threads may wait for it.
class Ticket {
  public:
    void set()
    {
        const std::lock_guard lock(mutex_);
        is_set_ = true;
        changed_.notify_all();
    }
    void wait()
    {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return is_set_; });
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool is_set_ = false;
};

class ThreadStream {
  public:
    ~ThreadStream()
    {
        put([this] { ends_ = true; });
        thread_.join();
    }
    void put(std::function<void()> work)
    {
        const std::lock_guard lock(mutex_);
        work_.push_back(std::move(work));
        changed_.notify_one();
    }

  private:
    void run()
    {
        while (!ends_) {
            std::function<void()> work;
            {
                std::unique_lock lock(mutex_);
                changed_.wait(lock, [&] { return !work_.empty(); });
                work = std::move(work_.front());
                work_.pop_front();
            }
            work();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> work_;
    bool ends_ = false; ///< read and written by the thread alone
    std::thread thread_{[this] { run(); }};
};

struct ThreadEvent {
    std::shared_ptr<Ticket> last; ///< null: never recorded
};

class ThreadRuntime final : public DeviceRuntime {
  public:
    std::string problem() const override { return {}; }
    void* allocate(std::size_t bytes) override { return ::operator new(bytes); }
    void free(void* memory) noexcept override { ::operator delete(memory); }
    void* allocate_pinned(std::size_t bytes) override { return ::operator new(bytes); }
    void free_pinned(void* memory) noexcept override { ::operator delete(memory); }
    void* create_stream() override { return new ThreadStream; }
    void destroy_stream(void* stream) noexcept override { delete static_cast<ThreadStream*>(stream); }
    void* create_event() override { return new ThreadEvent; }
    void destroy_event(void* event) noexcept override { delete static_cast<ThreadEvent*>(event); }
    void record(void* event, void* stream) override
    {
        const auto ticket = std::make_shared<Ticket>();
        static_cast<ThreadEvent*>(event)->last = ticket;
        put(stream, [ticket] { ticket->set(); });
    }
    void wait_on_device(void* stream, void* event) override
    {
        if (const auto ticket = static_cast<ThreadEvent*>(event)->last)
            put(stream, [ticket] { ticket->wait(); });
    }
    void wait_on_host(void* event) override
    {
        if (const auto ticket = static_cast<ThreadEvent*>(event)->last)
            ticket->wait();
    }
    void finish(void* stream) override
    {
        ThreadEvent event;
        record(&event, stream);
        event.last->wait();
    }
    void copy_to_host(void* host, const void* device, std::size_t bytes, void* stream) override
    {
        copy(host, device, bytes, stream, down_delay);
    }
    void copy_to_device(void* device, const void* host, std::size_t bytes, void* stream) override
    {
        copy(device, host, bytes, stream, up_delay);
    }

    static void put(void* stream, std::function<void()> work) { static_cast<ThreadStream*>(stream)->put(std::move(work)); }

    std::chrono::microseconds down_delay{0}, up_delay{0};

  private:
    static void copy(void* to, const void* from, std::size_t bytes, void* stream, std::chrono::microseconds delay)
    {
        put(stream, [=] {
            std::this_thread::sleep_for(delay);
            std::memcpy(to, from, bytes);
        });
    }
};

class OffloadAsync : public ::testing::TestWithParam<std::pair<int, int>> {
  protected:
    void SetUp() override
    {
        runtime_.down_delay = std::chrono::microseconds(GetParam().first);
        runtime_.up_delay = std::chrono::microseconds(GetParam().second);
        compute_ = runtime_.create_stream();
    }
    void TearDown() override { runtime_.destroy_stream(compute_); }

    ThreadRuntime runtime_;
    void* compute_ = nullptr;
};

TEST_P(OffloadAsync, every_chunk_sees_its_gradient_and_stores_its_weights)
{
    constexpr std::size_t size = 20 * 64 + 5;
    OffloadPipeline pipeline(runtime_, Device::cpu, 64);
    Floats gradient(size), weights(size, -1), seen_before(size), seen_after(size);
    std::iota(gradient.begin(), gradient.end(), 1.0f);
    for (int round = 1; round <= 3; ++round) {
        // On the compute stream: a late pass that reads the old weights and writes the gradient; after run(), a reader.
        const float old = weights[0];
        ThreadRuntime::put(compute_, [&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(3));
            seen_before = weights;
            for (float& g : gradient)
                g += 1;
        });
        pipeline.run(gradient.data(), weights.data(), DType::f32, size, compute_,
                     [&](std::int64_t begin, std::span<const float> part, std::span<std::byte> out) {
                         for (std::size_t i = 0; i < part.size(); ++i)
                             reinterpret_cast<float*>(out.data())[i] = part[i] * 10 + static_cast<float>(begin);
                     });
        ThreadRuntime::put(compute_, [&] { seen_after = weights; });
        runtime_.finish(compute_);
        EXPECT_EQ(seen_before[0], old) << "weights were overwritten while a pass could still read them";
        for (std::size_t i = 0; i < size; ++i)
            ASSERT_EQ(seen_after[i], static_cast<float>((static_cast<int>(i) + 1 + round) * 10 + static_cast<int>(i / 64 * 64)))
                << "element " << i << " in round " << round;
    }
}

TEST_P(OffloadAsync, uploads_and_downloads_are_whole)
{
    OffloadPipeline pipeline(runtime_, Device::cpu, 16); // pieces of 64 bytes
    std::vector<std::byte> from(1003), device(1003), to(1003);
    for (std::size_t i = 0; i < from.size(); ++i)
        from[i] = static_cast<std::byte>(i * 7);
    ThreadRuntime::put(compute_, [&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
        std::fill(device.begin(), device.end(), std::byte{9}); // must not come after the upload
    });
    pipeline.upload(from.data(), device.data(), from.size(), compute_);
    EXPECT_EQ(device, from);
    ThreadRuntime::put(compute_, [&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
        device[1000] = std::byte{1};
    });
    pipeline.download(device.data(), to.data(), to.size(), compute_);
    from[1000] = std::byte{1};
    EXPECT_EQ(to, from);
}

INSTANTIATE_TEST_SUITE_P(Delays, OffloadAsync,
                         ::testing::Values(std::pair(0, 0), std::pair(300, 0), std::pair(0, 300), std::pair(200, 200)));

} // namespace
} // namespace selm
