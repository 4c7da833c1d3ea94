#include "pages.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace crsm {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Pages::Pages(size_t bytes) : size_(round_up(bytes > 0 ? bytes : 1, 64)) {
    mapped_ = size_ >= kLargePage;
    if (mapped_) size_ = round_up(size_, kLargePage);
    data_ = std::aligned_alloc(mapped_ ? kLargePage : 64, size_);
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (mapped_) madvise(data_, size_, MADV_HUGEPAGE);  // a wish: without it the memory is slower, not wrong
#endif
    std::memset(data_, 0, size_);
}

Pages::~Pages() { std::free(data_); }

Pages PagePool::take(size_t bytes) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        size_t best = free_.size();
        for (size_t i = 0; i < free_.size(); ++i) {
            // A piece much larger than asked for waits for a request of its size.
            const bool fits = free_[i].size() >= bytes && free_[i].size() / 2 <= bytes + kLargePage;
            if (fits && (best == free_.size() || free_[i].size() < free_[best].size())) best = i;
        }
        if (best < free_.size()) {
            Pages found = std::move(free_[best]);
            free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
            return found;
        }
    }
    return Pages(bytes);
}

void PagePool::give_back(Pages&& pages) noexcept {
    Pages oldest;  // freed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
        free_.push_back(std::move(pages));
    } catch (const std::bad_alloc&) {
        return;  // the piece is freed instead
    }
    if (free_.size() > kKept) {
        oldest = std::move(free_.front());
        free_.erase(free_.begin());
    }
}

}  // namespace crsm
