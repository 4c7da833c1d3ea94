// What the forward and the backward pass of the scan share: a chunk's inputs in scratch memory.
// Only for sources that are compiled per instruction set (isa.hpp).
#pragma once

#include "scan.hpp"
#include "vec_tile.hpp"

namespace crsm::CRSM_ISA {

// Added to the logarithm of what must come out as an exact zero.
inline constexpr float kNever = -1e30f;
// Rows of the triangle that are worked on together.
inline constexpr int64_t kTriangleRows = kMultiplyRows;

template <typename T>
static inline T* take(T*& scratch, int64_t count) {
    T* begin = scratch;
    scratch += padded(count);
    return begin;
}

static inline int64_t first_head(int64_t heads, int64_t groups, int64_t group) { return heads * group / groups; }

// One chunk of one sequence: what all heads share. Padded sizes are Np = padded(N), Qp = padded(Q).
template <typename T>
struct Chunk {
    int64_t start, length;
    T* b_QN;
    T* c_QN;
    T* b_NQ;
    T* scores_QQ;       // C·Bᵀ, up to the diagonal's tile
    T* later;           // later[Q + s - t]: 0 where s ≤ t, kNever beyond
    T* begin_Q;         // index in the chunk of the first token of each token's document
    T* entering_Q;      // 1 where the chunk's incoming state belongs to the token's document
    T* leaving_Q;       // 1 where the token's document is that of the chunk's last token
};

// Per head: decays of a chunk.
template <typename T>
struct HeadDecay {
    T* dt_Q;     // step sizes
    T* log_Q;    // logarithm of the decay from before the chunk up to each token
    T* enter_Q;  // its exponential, 0 for tokens of later documents
    T* leave_Q;  // decay from each token to the chunk's end
    T whole;     // decay over the chunk
};

static inline int64_t chunk_scratch(int64_t Qp, int64_t Np, int64_t Q, int64_t N) {
    return 2 * padded(Q * Np) + padded(N * Qp) + padded(Q * Qp) + 2 * Qp + kPad + 3 * Qp + padded(4 * Qp);
}

template <typename T>
static void take_chunk(const Scan<T>& scan, T*& scratch, Chunk<T>& chunk, HeadDecay<T>& decay) {
    const int64_t Q = scan.size_Q, N = scan.size_N, Qp = padded(Q), Np = padded(N);
    chunk.b_QN = take(scratch, Q * Np);
    chunk.c_QN = take(scratch, Q * Np);
    chunk.b_NQ = take(scratch, N * Qp);
    chunk.scores_QQ = take(scratch, Q * Qp);
    chunk.later = take(scratch, 2 * Qp + kPad);
    chunk.begin_Q = take(scratch, Qp);
    chunk.entering_Q = take(scratch, Qp);
    chunk.leaving_Q = take(scratch, Qp);
    for (int64_t i = 0; i < 2 * Qp + kPad; ++i) chunk.later[i] = i <= Qp ? T(0) : T(kNever);
    decay.dt_Q = take(scratch, Qp);
    decay.log_Q = take(scratch, Qp);
    decay.enter_Q = take(scratch, Qp);
    decay.leave_Q = take(scratch, Qp);
}

template <typename T>
static void load_chunk(const Scan<T>& scan, int64_t b, int64_t index, Chunk<T>& chunk) {
    const int64_t N = scan.size_N, Qp = padded(scan.size_Q), Np = padded(N);
    const int64_t start = index * scan.size_Q, length = smaller(scan.size_Q, scan.size_T - start);
    chunk.start = start;
    chunk.length = length;
    copy_rows<T>(length, N, scan.b.data + b * scan.b.batch + start * scan.b.row, scan.b.row, nullptr, chunk.b_QN);
    copy_rows<T>(length, N, scan.c.data + b * scan.c.batch + start * scan.c.row, scan.c.row, nullptr, chunk.c_QN);
    transpose<T>(length, N, chunk.b_QN, Np, chunk.b_NQ, Qp, true);
    for (int64_t t = 0; t < length; t += kTriangleRows) {
        const int64_t rows = smaller(kTriangleRows, length - t);
        multiply<T>(rows, padded(t + rows), N, chunk.c_QN + t * Np, Np, 1, chunk.b_NQ, Qp, chunk.scores_QQ + t * Qp,
                    Qp, false);
    }
    if (scan.segment == nullptr) {
        for (int64_t t = 0; t < length; ++t) {
            chunk.begin_Q[t] = 0;
            chunk.entering_Q[t] = chunk.leaving_Q[t] = 1;
        }
        return;
    }
    const int64_t* segment = scan.segment + b * scan.size_T + start;
    const int64_t carried = start > 0 ? segment[-1] : segment[0];
    int64_t begin = 0;
    for (int64_t t = 0; t < length; ++t) {
        if (t > 0 && segment[t] != segment[t - 1]) begin = t;
        chunk.begin_Q[t] = T(begin);
        chunk.entering_Q[t] = segment[t] == carried ? T(1) : T(0);
        chunk.leaving_Q[t] = segment[t] == segment[length - 1] ? T(1) : T(0);
    }
}

template <typename T>
static void load_decay(const Scan<T>& scan, const Chunk<T>& chunk, int64_t b, int64_t h, HeadDecay<T>& decay) {
    const int64_t length = chunk.length, width = padded(length);
    const T* dt = scan.dt.data + b * scan.dt.batch + chunk.start * scan.dt.row + h;
    for (int64_t t = 0; t < length; ++t) decay.dt_Q[t] = dt[t * scan.dt.row];
    for (int64_t t = length; t < width; ++t) decay.dt_Q[t] = 0;
    if (scan.dt_bias_H != nullptr) {
        for (int64_t t = 0; t < width; t += kLanes<T>) {
            store(decay.dt_Q + t, softplus(load(decay.dt_Q + t) + scan.dt_bias_H[h]));
        }
    }
    T sum = 0;
    for (int64_t t = 0; t < width; ++t) {
        if (t < length) sum += decay.dt_Q[t] * scan.A_H[h];
        decay.log_Q[t] = sum;
    }
    const Vec<T> total = broadcast(sum);
    for (int64_t t = 0; t < width; t += kLanes<T>) {
        const Vec<T> log = load(decay.log_Q + t);
        store(decay.enter_Q + t, exp(log));
        store(decay.leave_Q + t, exp(total - log));
    }
    if (scan.segment != nullptr) {
        for (int64_t t = 0; t < length; ++t) {
            decay.enter_Q[t] *= chunk.entering_Q[t];
            decay.leave_Q[t] *= chunk.leaving_Q[t];
        }
    }
    decay.whole = decay.enter_Q[length - 1];
}

// exp(log[t] - log[s]) for the vector of tokens s… of row t: 0 after t, and in other documents than its own.
template <typename T>
static inline Vec<T> decay_between(const Chunk<T>& chunk, const HeadDecay<T>& decay, int64_t Qp, int64_t t, int64_t s,
                                   bool documents) {
    Vec<T> log = broadcast(decay.log_Q[t]) - load(decay.log_Q + s) + load(chunk.later + Qp + s - t);
    if (documents) {
        const int64_t begin = static_cast<int64_t>(chunk.begin_Q[t]);
        if (s < begin) {
            for (int i = 0; i < kLanes<T> && s + i < begin; ++i) log[i] = T(kNever);
        }
    }
    return exp(log);
}

// A state (P, N) as the scan keeps it, (N, Pp); returns whether any of it is not zero.
template <typename T>
static bool load_state(const T* state_PN, int64_t P, int64_t N, T* state_NP) {
    const int64_t Pp = padded(P);
    if (state_PN == nullptr) {
        fill_zero(state_NP, N * Pp);
        return false;
    }
    transpose<T>(P, N, state_PN, N, state_NP, Pp, true);
    for (int64_t i = 0; i < N * Pp; ++i) {
        if (state_NP[i] != 0) return true;
    }
    return false;
}

}  // namespace crsm::CRSM_ISA
