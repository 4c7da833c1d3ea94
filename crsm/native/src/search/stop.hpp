// When a search ends before its budget is spent.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>

namespace crsm::search {

// Set from any thread; a search looks at it before every simulation of every tree.
struct CancelToken {
    std::atomic<bool> flag{false};
};

class StopRule {
public:
    using Clock = std::chrono::steady_clock;

    const CancelToken* cancel = nullptr;
    Clock::time_point deadline = Clock::time_point::max();
    // Asked from `next` on, at most once in an interval (0: before every simulation); it may throw.
    std::function<bool()> ask;
    Clock::duration interval{0};
    Clock::time_point next{};

    bool cancelled() const { return cancel != nullptr && cancel->flag.load(std::memory_order_relaxed); }

    // Whether to begin no further simulation.
    bool operator()() {
        if (cancelled()) return true;
        const bool timed = deadline != Clock::time_point::max();
        if (!timed && !ask) return false;
        if (ask && interval.count() == 0) {
            if (ask()) return true;
            return timed && Clock::now() >= deadline;
        }
        const Clock::time_point now = Clock::now();
        if (timed && now >= deadline) return true;
        if (!ask || now < next) return false;
        next = now + interval;
        return ask();
    }
};

}  // namespace crsm::search
