// Reads of a state-space memory with a query, and the query's gradient:
//   read[b, m, e] = Σ_n memory[b, m, e, n] · query[b, m, n]        e over all heads' channels (H·P)
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace crsm {

template <typename T>
struct MemoryRead {
    // `count` matrices [width_E, state_N] with one query each, from index `begin`.
    void (*forward)(const T* memory, const T* query, T* read, int64_t begin, int64_t count, int64_t width_E,
                    int64_t state_N);
    // dquery[n] = Σ_e dread[e] · memory[e, n]
    void (*backward)(const T* memory, const T* dread, T* dquery, int64_t begin, int64_t count, int64_t width_E,
                     int64_t state_N);
};

struct MemoryReadTable {
    MemoryRead<float> f32;
    MemoryRead<double> f64;
};
CRSM_DECLARE_TABLE(MemoryReadTable, memory_read_table)

}  // namespace crsm
