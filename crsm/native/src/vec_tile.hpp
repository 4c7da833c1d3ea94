// What kernels on tiles of a few dozen rows share: partial vectors, transposition, small matrix products, and the
// functions that vec.hpp lacks. Only for sources that are compiled per instruction set (isa.hpp).
//
// Tiles live in scratch memory whose rows are padded to kPad elements, so that inner loops know whole vectors only.
#pragma once

#include "vec.hpp"

namespace crsm::CRSM_ISA {

// A multiple of the lanes of every element type in every instruction set.
inline constexpr int64_t kPad = 16;

static inline int64_t padded(int64_t size) { return (size + kPad - 1) / kPad * kPad; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` lanes; zeros beyond.
template <typename T>
static inline Vec<T> load_some(const T* p, int64_t count) {
    if (count >= kLanes<T>) return load(p);
    Vec<T> v{};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
}
template <typename T>
static inline void store_some(T* p, Vec<T> v, int64_t count) {
    if (count >= kLanes<T>) return store(p, v);
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

template <typename V>
static inline V absolute(V x) {
    return x < 0 ? -x : x;
}

// log(1 + u) for u in [0, 1]: 2·artanh(u / (2 + u)), whose argument is at most a third.
static inline VecF log1p_unit(VecF u) {
    const VecF s = u / (2.0f + u), q = s * s;
    VecF p = broadcast(1.0f / 15);
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}
static inline VecD log1p_unit(VecD u) {
    for (int i = 0; i < kLanes<double>; ++i) u[i] = __builtin_log1p(u[i]);
    return u;
}

// log(1 + exp(x))
template <typename V>
static inline V softplus(V x) {
    const V zero{};
    return (x > 0 ? x : zero) + log1p_unit(exp(-absolute(x)));
}

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }

template <typename T>
struct ShuffleIndex;
template <>
struct ShuffleIndex<float> {
    using type = VecI;
};
template <>
struct ShuffleIndex<double> {
    typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};

// A square of lanes × lanes, turned in place by log2(lanes) perfect shuffles.
template <typename T>
static inline void transpose_square(Vec<T> (&v)[kLanes<T>]) {
    constexpr int n = kLanes<T>;
    typename ShuffleIndex<T>::type low, high;
    for (int i = 0; i < n; ++i) {
        low[i] = i / 2 + (i % 2) * n;
        high[i] = i / 2 + (i % 2) * n + n / 2;
    }
    for (int stage = 1; stage < n; stage *= 2) {
        Vec<T> next[n];
#pragma GCC unroll 16
        for (int i = 0; i < n / 2; ++i) {
            next[2 * i] = __builtin_shuffle(v[i], v[i + n / 2], low);
            next[2 * i + 1] = __builtin_shuffle(v[i], v[i + n / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) v[i] = next[i];
    }
}

// out[column][row] = in[row][column]. `fill`: rows of `out` are padded and get zeros up to there.
template <typename T>
static inline void transpose(int64_t rows, int64_t columns, const T* in, int64_t in_row, T* out, int64_t out_row,
                             bool fill) {
    constexpr int64_t n = kLanes<T>;
    const int64_t end = fill ? padded(rows) : rows;
    for (int64_t r = 0; r < end; r += n) {
        for (int64_t c = 0; c < columns; c += n) {
            Vec<T> v[n];
            for (int64_t i = 0; i < n; ++i) {
                v[i] = r + i < rows ? load_some(in + (r + i) * in_row + c, columns - c) : Vec<T>{};
            }
            transpose_square<T>(v);
            const int64_t count = smaller(n, columns - c);
            for (int64_t i = 0; i < count; ++i) store_some(out + (c + i) * out_row + r, v[i], fill ? n : rows - r);
        }
    }
}

// Rows of `columns` elements into padded rows, times `scale` (one per row, or null for 1).
template <typename T>
static inline void copy_rows(int64_t rows, int64_t columns, const T* in, int64_t in_row, const T* scale, T* out) {
    const int64_t width = padded(columns);
    for (int64_t r = 0; r < rows; ++r) {
        const Vec<T> factor = broadcast(scale != nullptr ? scale[r] : T(1));
        for (int64_t c = 0; c < width; c += kLanes<T>) {
            store(out + r * width + c, factor * load_some(in + r * in_row + c, columns - c));
        }
    }
}

template <typename T>
static inline void fill_zero(T* p, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

// Rows of a product's tile: with two vectors a row, the accumulators fill the registers but for a few.
#if defined(CRSM_ISA_avx512)
inline constexpr int kMultiplyRows = 12;
#elif defined(CRSM_ISA_avx2)
inline constexpr int kMultiplyRows = 6;
#else
inline constexpr int kMultiplyRows = 4;
#endif

template <typename T, int ROWS, int VECTORS>
static inline void multiply_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row,
                                 T* c, int64_t c_row, bool add) {
    Vec<T> sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = add ? load(c + r * c_row + v * kLanes<T>) : Vec<T>{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec<T> w[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) w[v] = load(b + k * b_row + v * kLanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Vec<T> x = broadcast(a[r * a_row + k * a_column]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sum[r][v] += x * w[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) store(c + r * c_row + v * kLanes<T>, sum[r][v]);
    }
}

template <typename T, int ROWS>
static inline void multiply_rows(int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_column,
                                 const T* b, int64_t b_row, T* c, int64_t c_row, bool add) {
    constexpr int64_t n = kLanes<T>;
    int64_t j = 0;
    for (; j + 2 * n <= columns; j += 2 * n) {
        multiply_tile<T, ROWS, 2>(depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
    }
    for (; j < columns; j += n) {
        multiply_tile<T, ROWS, 1>(depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
    }
}

// C[rows, columns] (+)= A · B: element (r, k) of A is a[r·a_row + k·a_column]; B and C have contiguous rows; `columns`
// is a multiple of the lanes. Every element is summed in the order of k, whatever rows are around it.
template <typename T>
static void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_column,
                     const T* b, int64_t b_row, T* c, int64_t c_row, bool add) {
    constexpr int R = kMultiplyRows;
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
        multiply_rows<T, R>(columns, depth, a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, add);
    }
    if constexpr (R > 4) {
        for (; r + 4 <= rows; r += 4) {
            multiply_rows<T, 4>(columns, depth, a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, add);
        }
    }
    for (; r < rows; ++r) {
        multiply_rows<T, 1>(columns, depth, a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, add);
    }
}

}  // namespace crsm::CRSM_ISA
