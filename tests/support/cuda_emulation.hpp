#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

// Runs CUDA kernels on the CPU, a block of threads at a time: every thread is a context of its own that runs until it meets
// others, in __syncthreads or in a shuffle. Include it before a header of kernels. What it shows: the arithmetic, which threads
// meet where, and (running the warps in both orders) shared memory that is read before all threads wrote it. What it cannot
// show: anything about speed, and memory that other devices order differently.
namespace selm::emulation {

struct Dimensions {
    unsigned x = 1, y = 1, z = 1;
};

inline Dimensions thread_index, block_index, block_dimensions, grid_dimensions;

inline constexpr unsigned warp_size = 32;

class Block {
  public:
    Block(unsigned threads, std::function<void()> body) : body_(std::move(body)), threads_(threads)
    {
        for (Thread& thread : threads_)
            thread.stack.resize(stack_bytes);
    }

    /// @param backwards warps run from the last to the first.
    void run(bool backwards)
    {
        for (unsigned i = 0; i < threads_.size(); ++i)
            start(i);
        const unsigned warps = (static_cast<unsigned>(threads_.size()) + warp_size - 1) / warp_size;
        while (true) {
            for (unsigned i = 0; i < warps; ++i)
                run_warp(backwards ? warps - 1 - i : i);
            if (all(0, threads_.size(), State::ended))
                return;
            if (!all(0, threads_.size(), State::at_barrier))
                throw std::logic_error("some threads of a block have ended, others wait in __syncthreads");
            for (Thread& thread : threads_)
                thread.state = State::ready;
        }
    }

    /// From the running thread: until all threads of the block are here.
    void barrier() { leave(State::at_barrier); }

    /// From the running thread: until all threads of its warp are here. @return the other thread's value.
    float exchange(float value, int distance)
    {
        Thread& self = threads_[current_];
        self.value = value;
        self.distance = distance;
        leave(State::at_exchange);
        return threads_[current_].received;
    }

    static Block*& running()
    {
        static Block* block = nullptr;
        return block;
    }

  private:
    static constexpr std::size_t stack_bytes = 128 * 1024;
    enum class State { ready, at_exchange, at_barrier, ended };
    struct Thread {
        ucontext_t context;
        std::vector<char> stack;
        State state = State::ready;
        float value = 0, received = 0;
        int distance = 0;
    };

    static void enter() // of a thread
    {
        Block& block = *running();
        block.body_();
        block.leave(State::ended);
    }

    void start(unsigned i)
    {
        Thread& thread = threads_[i];
        thread.state = State::ready;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, &Block::enter, 0);
    }

    /// To the next thread of the warp that can run, or back to the scheduler.
    void leave(State state)
    {
        Thread& thread = threads_[current_];
        thread.state = state;
        const std::size_t end = std::min((current_ / warp_size + 1) * warp_size, threads_.size());
        std::size_t next = current_ + 1;
        while (next < end && threads_[next].state != State::ready)
            ++next;
        if (next < end)
            choose(next);
        swapcontext(&thread.context, next < end ? &threads_[next].context : &scheduler_);
    }

    void choose(std::size_t i)
    {
        current_ = i;
        thread_index = {static_cast<unsigned>(i)};
    }

    bool all(std::size_t begin, std::size_t end, State state) const
    {
        for (std::size_t i = begin; i < end; ++i)
            if (threads_[i].state != state)
                return false;
        return true;
    }

    void run_warp(unsigned warp)
    {
        const std::size_t begin = std::size_t{warp} * warp_size, end = std::min(begin + warp_size, threads_.size());
        while (true) {
            for (std::size_t i = begin; i < end; ++i) {
                if (threads_[i].state != State::ready)
                    continue;
                choose(i);
                swapcontext(&scheduler_, &threads_[i].context);
            }
            if (all(begin, end, State::at_barrier) || all(begin, end, State::ended))
                return;
            if (!all(begin, end, State::at_exchange))
                throw std::logic_error("threads of a warp wait in different places");
            for (std::size_t i = begin; i < end; ++i) {
                Thread& thread = threads_[i];
                const std::size_t other = begin + ((i - begin) ^ static_cast<std::size_t>(thread.distance));
                if (thread.distance != threads_[begin].distance || other >= end)
                    throw std::logic_error("threads of a warp exchange values at different distances");
                thread.received = threads_[other].value;
                thread.state = State::ready;
            }
        }
    }

    std::function<void()> body_;
    std::vector<Thread> threads_;
    ucontext_t scheduler_{};
    std::size_t current_ = 0;
};

template<typename Arguments>
void launch(void (*kernel)(Arguments), Dimensions grid, unsigned threads, const Arguments& arguments, bool backwards = false)
{
    grid_dimensions = grid;
    block_dimensions = {threads};
    Block block(threads, [&] { kernel(arguments); });
    Block::running() = &block;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = {x, y, z};
                block.run(backwards);
            }
    Block::running() = nullptr;
}

} // namespace selm::emulation

#define __global__
#define __device__
#define __shared__ static
#define threadIdx ::selm::emulation::thread_index
#define blockIdx ::selm::emulation::block_index
#define blockDim ::selm::emulation::block_dimensions
#define gridDim ::selm::emulation::grid_dimensions
#define __syncthreads() ::selm::emulation::Block::running()->barrier()
#define __shfl_xor_sync(mask, value, distance) ::selm::emulation::Block::running()->exchange(value, distance)
