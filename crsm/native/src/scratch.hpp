// Memory that a thread works in, kept from call to call.
#pragma once

#include "arrays.hpp"

namespace crsm {

// At least `count` elements, aligned to 64 bytes; what an earlier call got on this thread is no longer valid.
template <typename T>
T* thread_scratch(int64_t count) {
    thread_local Buffer<T> buffer;
    if (buffer.size() < count) buffer = Buffer<T>(count);
    return buffer.data();
}

}  // namespace crsm
