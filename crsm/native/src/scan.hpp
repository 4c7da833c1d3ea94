// The chunked scan of Mamba-2 (state-space duality, arXiv 2405.21060) and its gradients; the definition is
// crsm/kernels/reference.py, chunk_scan_combined.
//
// Letters: B batch, T time, H heads, P head dimension, N d_state, Q tokens of a chunk, S chunks, G groups of heads.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace crsm {

// (B, T, width) whose rows are contiguous: element (b, t, i) is data[b·batch + t·row + i].
template <typename T>
struct Rows {
    T* data = nullptr;
    int64_t batch = 0;
    int64_t row = 0;
};

// One call. What depends on the sizes only (chunks, groups) never depends on the number of threads: a group of heads is
// one task, and sums over groups and batch are taken in their order afterwards.
template <typename T>
struct Scan {
    int64_t size_B = 0, size_T = 0, size_H = 0, size_P = 0, size_N = 0;
    int64_t size_Q = 0, chunks_S = 0, groups_G = 0;
    Rows<const T> x, dt, b, c;   // widths H·P, H, N, N
    const T* A_H = nullptr;
    const T* D_H = nullptr;        // null: no skip
    const T* dt_bias_H = nullptr;  // null: dt is the step size itself; else softplus(dt + dt_bias)
    const T* state = nullptr;      // (B, H, P, N); null: zeros
    const int64_t* segment = nullptr;  // (B, T), ascending; null: one document
    // Forward.
    Rows<T> y;             // width H·P
    T* last = nullptr;     // (B, H, P, N)
    T* kept = nullptr;     // (B, H, S, N, P): the state before each chunk, for the backward pass; may be null
    // Backward. `kept` is read where there are several chunks.
    Rows<const T> dy;
    const T* dlast = nullptr;  // null: zeros
    Rows<T> dx, ddt;
    Rows<T> db, dc;               // per group, `group_stride` apart
    int64_t group_stride = 0;
    T* dstate = nullptr;          // may be null
    T *dA_BH = nullptr, *dD_BH = nullptr, *dbias_BH = nullptr;
};

template <typename T>
struct ScanFunctions {
    // Elements of scratch memory, aligned to 64 bytes, that a task needs.
    int64_t (*forward_scratch)(const Scan<T>&);
    int64_t (*backward_scratch)(const Scan<T>&);
    // All chunks of one sequence and one group of heads.
    void (*forward)(const Scan<T>&, int64_t b, int64_t group, T* scratch);
    void (*backward)(const Scan<T>&, int64_t b, int64_t group, T* scratch);
};

struct ScanTable {
    ScanFunctions<float> fp32;
    ScanFunctions<double> fp64;
};
CRSM_DECLARE_TABLE(ScanTable, scan_table)

}  // namespace crsm
