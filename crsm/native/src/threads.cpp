#include "threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace crsm {
namespace {

// A worker looks for new work this often before it goes to sleep: about 20 µs, the distance of two calls in a decode step.
constexpr int kSpins = 2000;

inline void pause_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int default_threads() {
    if (const char* text = std::getenv("OMP_NUM_THREADS")) {
        const int count = std::atoi(text);
        if (count > 0) return count;
    }
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count > 0 ? static_cast<int>(count) : 1;
}

std::atomic<int> thread_setting{0};

class Pool {
public:
    ~Pool() {
        stopping_.store(true);
        generation_.fetch_add(1);
        generation_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    void run(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
        const int helpers = static_cast<int>(threads - 1 < tasks - 1 ? threads - 1 : tasks - 1);
        std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
        if (helpers < 1 || !lock.owns_lock()) {
            for (int64_t index = 0; index < tasks; ++index) task(context, index);
            return;
        }
        run_with(helpers, tasks, task, context);
    }

    void run_team(int threads, void (*body)(void*, int, int), void* context) {
        std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
        if (threads < 2 || !lock.owns_lock()) return body(context, 0, 1);
        struct Team {
            void (*body)(void*, int, int);
            void* context;
            int members;
        } team{body, context, threads};
        // As many tasks as threads: whoever has one is in it until all have begun, if they wait for each other at all.
        run_with(
            threads - 1, threads,
            [](void* given, int64_t member) {
                const Team& team = *static_cast<const Team*>(given);
                team.body(team.context, static_cast<int>(member), team.members);
            },
            &team);
    }

private:
    // The caller holds busy_.
    void run_with(int helpers, int64_t tasks, void (*task)(void*, int64_t), void* context) {
        while (static_cast<int>(workers_.size()) < helpers) {
            workers_.emplace_back([this, id = static_cast<int>(workers_.size())] { work(id); });
        }
        task_ = task;
        context_ = context;
        tasks_ = tasks;
        helpers_ = helpers;
        next_.store(0, std::memory_order_relaxed);
        gate_.store(kOpen, std::memory_order_release);
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        drain();
        // Who has not come by now has nothing to do here. Waiting for it could take as long as the system likes.
        gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
        for (int spins = 0;; ++spins) {
            const uint32_t inside = gate_.load(std::memory_order_acquire);
            if (inside == 0) return;
            if (spins < kSpins) {
                pause_cpu();
            } else {
                gate_.wait(inside, std::memory_order_acquire);
            }
        }
    }

    void drain() {
        for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) task_(context_, index);
    }

    // What the caller has laid out may be read between this and the worker's leave.
    bool enter() {
        uint32_t inside = gate_.load(std::memory_order_relaxed);
        while (inside & kOpen) {
            if (gate_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) return true;
        }
        return false;
    }

    void work(int id) {
        uint32_t seen = 0;
        for (;;) {
            uint32_t now = generation_.load(std::memory_order_acquire);
            for (int spins = 0; now == seen; ++spins) {
                if (spins < kSpins) {
                    pause_cpu();
                } else {
                    generation_.wait(seen, std::memory_order_acquire);
                }
                now = generation_.load(std::memory_order_acquire);
            }
            if (stopping_.load()) return;
            seen = now;
            if (!enter()) continue;
            if (id < helpers_) drain();
            if (gate_.fetch_sub(1, std::memory_order_acq_rel) == 1) gate_.notify_one();
        }
    }

    std::mutex busy_;
    std::vector<std::thread> workers_;
    std::atomic<uint32_t> generation_{0};
    std::atomic<int64_t> next_{0};
    // Workers inside, and whether more may come in.
    static constexpr uint32_t kOpen = 1u << 31;
    std::atomic<uint32_t> gate_{0};
    std::atomic<bool> stopping_{false};
    void (*task_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t tasks_ = 0;
    int helpers_ = 0;
};

// Never destroyed: a thread of the embedding program may still be in a call when the process exits.
Pool*& pool() {
    static Pool* instance = [] {
        // A forked child has none of the parent's threads; it starts with a pool of its own.
        pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
        return new Pool;
    }();
    return instance;
}

}  // namespace

int num_threads() {
    const int set = thread_setting.load(std::memory_order_relaxed);
    if (set > 0) return set;
    static const int start = default_threads();
    return start;
}

void set_num_threads(int count) {
    if (count < 1) throw std::invalid_argument("threads = " + std::to_string(count) + "; allowed: at least 1");
    thread_setting.store(count, std::memory_order_relaxed);
}

void parallel_for(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
    if (tasks < 1) return;
    pool()->run(tasks, threads > 0 ? threads : num_threads(), task, context);
}

void parallel_team(int threads, void (*body)(void*, int, int), void* context) {
    pool()->run_team(threads > 0 ? threads : num_threads(), body, context);
}

void Barrier::wait() {
    if (members_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
        waiting_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        round_.notify_all();
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
        if (spins < kSpins) {
            pause_cpu();
        } else {
            round_.wait(round, std::memory_order_acquire);
        }
    }
}

}  // namespace crsm
