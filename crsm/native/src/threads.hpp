// The module's threads: one pool, used by one caller at a time; whoever finds it busy does its work alone, so that no
// call ever waits for another one.
#pragma once

#include <atomic>
#include <cstdint>

namespace crsm {

// Threads that a call may use, its own included. At first: OMP_NUM_THREADS if that is a positive number, else the
// processors that this process may run on.
int num_threads();

// Raises std::invalid_argument unless count ≥ 1.
void set_num_threads(int count);

// Runs task(context, index) for index 0 … tasks-1 on at most `threads` threads (0: num_threads()) and returns when all
// are done. Tasks are handed out in order and must not throw. Which thread runs a task must not change its result.
void parallel_for(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context);

// The same for a callable.
template <typename F>
void parallel_for(int64_t tasks, int threads, F&& body) {
    parallel_for(
        tasks, threads, [](void* context, int64_t index) { (*static_cast<F*>(context))(index); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Runs body(context, member, members) for member 0 … members-1, all at the same time, so that they may wait for each
// other at a Barrier; members ≤ threads (0: num_threads()) is 1 if the pool is busy.
void parallel_team(int threads, void (*body)(void*, int, int), void* context);

template <typename F>
void parallel_team(int threads, F&& body) {
    parallel_team(
        threads, [](void* context, int member, int members) { (*static_cast<F*>(context))(member, members); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Where the members of a team wait for each other, any number of times. What a member wrote before is seen by all after.
class Barrier {
public:
    explicit Barrier(int members) : members_(members) {}
    void wait();

private:
    const int members_;
    alignas(64) std::atomic<int> waiting_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace crsm
