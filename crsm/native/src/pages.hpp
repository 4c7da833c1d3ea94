// Memory for what is read or written whole at every token: large pages, so that neither page faults nor address
// translation cost what the memory's speed could give.
#pragma once

#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

namespace crsm {

// A piece of memory, aligned to 64 bytes at least, zero at first; from 2 MB on in large pages where the system has them.
class Pages {
public:
    Pages() = default;
    explicit Pages(size_t bytes);  // throws std::bad_alloc
    Pages(Pages&& other) noexcept { swap(other); }
    Pages& operator=(Pages&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Pages();

    void* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void swap(Pages& other) {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(mapped_, other.mapped_);
    }

    void* data_ = nullptr;
    size_t size_ = 0;
    bool mapped_ = false;
};

// Pieces that come back and are given out again: a state of many megabytes a token would else be mapped anew each time.
class PagePool {
public:
    // At least `bytes`; contents undefined. Throws std::bad_alloc.
    Pages take(size_t bytes);
    // Keeps the last few pieces that came back, frees older ones.
    void give_back(Pages&& pages) noexcept;

private:
    static constexpr size_t kKept = 4;

    std::mutex mutex_;
    std::vector<Pages> free_;
};

}  // namespace crsm
