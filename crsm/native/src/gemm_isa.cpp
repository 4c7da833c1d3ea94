#include "gemm.hpp"
#include "vec_tile.hpp"

namespace crsm::CRSM_ISA {
namespace {

constexpr int kWidth = kLanes<float>;
constexpr int kVectors = static_cast<int>(kPanel) / kWidth;  // vectors of a panel row

// Rows of A at once. The accumulators of a tile (rows × vectors) must fit the registers: 32, 16 and 16 of them.
#if defined(CRSM_ISA_avx512)
constexpr int kTileRows = 12;
constexpr int kTileVectors = 2;
#elif defined(CRSM_ISA_avx2)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
#else
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;
#endif
// Rows of K per pass, so that a panel's piece stays in the first-level cache while tiles of A pass by.
constexpr int64_t kBlockK = 256;

template <WeightType type>
struct Element;
template <>
struct Element<WeightType::fp32> {
    using stored = float;
    static inline VecF get(const float* p) { return load(p); }
};
template <>
struct Element<WeightType::bf16> {
    using stored = uint16_t;
    static inline VecF get(const uint16_t* p) { return load_bf16(p); }
};
template <>
struct Element<WeightType::int8> {
    using stored = int8_t;
    static inline VecF get(const int8_t* p) { return load_int8(p); }
};

// A tile of ROWS × (PANELS · VECTORS) vectors over rows [k, k + length) of K. What lies `ahead` elements further on is
// brought into the second-level cache meanwhile; 0: nothing.
template <WeightType type, int ROWS, int PANELS, int VECTORS>
inline void tile(const typename Element<type>::stored* const* b, int64_t length, const float* a, int64_t a_row,
                 int64_t a_column, VecF (&acc)[ROWS][PANELS * VECTORS], int64_t ahead) {
    using E = Element<type>;
    constexpr int row_bytes = static_cast<int>(kPanel * sizeof(typename E::stored));
    for (int64_t k = 0; k < length; ++k) {
        if (ahead != 0) {
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; ++p) {
                const char* line = reinterpret_cast<const char*>(b[p] + k * kPanel + ahead);
                __builtin_prefetch(line, 0, 2);
                if (row_bytes > 64) __builtin_prefetch(line + 64, 0, 2);
            }
        }
        VecF w[PANELS * VECTORS];
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) {
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) w[p * VECTORS + v] = E::get(b[p] + k * kPanel + v * kWidth);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const VecF x = broadcast(a[r * a_row + k * a_column]);
#pragma GCC unroll 8
            for (int i = 0; i < PANELS * VECTORS; ++i) acc[r][i] += x * w[i];
        }
    }
}

struct Problem {
    const PackedMatrix& b;
    const float* a;
    int64_t a_row, a_column;
    float* c;
    int64_t c_row;
    const float* bias;
};

// ROWS rows from m on, panels [panel, panel + PANELS), vectors [first, first + VECTORS) of each, rows [k, k + length).
template <WeightType type, int ROWS, int PANELS, int VECTORS>
inline void block(const Problem& problem, int64_t m, int64_t panel, int first, int64_t k, int64_t length, bool add,
                  int64_t ahead) {
    using Stored = typename Element<type>::stored;
    const PackedMatrix& matrix = problem.b;
    const Stored* b[PANELS];
    for (int p = 0; p < PANELS; ++p) {
        b[p] = static_cast<const Stored*>(matrix.panels) + ((panel + p) * matrix.rows_K + k) * kPanel + first * kWidth;
    }
    const float* a = problem.a + m * problem.a_row + k * problem.a_column;
    const int64_t columns = matrix.columns_N;
    VecF acc[ROWS][PANELS * VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < PANELS * VECTORS; ++i) {
            const int64_t n = (panel + i / VECTORS) * kPanel + (first + i % VECTORS) * kWidth;
            acc[r][i] = VecF{};
            if (!add && problem.bias == nullptr) continue;
            const float* from = add ? problem.c + (m + r) * problem.c_row + n : problem.bias + n;
            if (n + kWidth <= columns) {
                acc[r][i] = load(from);
            } else {
                for (int lane = 0; lane < kWidth && n + lane < columns; ++lane) acc[r][i][lane] = from[lane];
            }
        }
    }
    if constexpr (type == WeightType::int8) {
        const int64_t groups = (matrix.rows_K + kScaleGroup - 1) / kScaleGroup;
        for (int64_t start = 0; start < length; start += kScaleGroup) {
            const int64_t count = length - start < kScaleGroup ? length - start : kScaleGroup;
            VecF part[ROWS][PANELS * VECTORS] = {};
            tile<type, ROWS, PANELS, VECTORS>(b, count, a + start * problem.a_column, problem.a_row, problem.a_column,
                                              part, ahead);
#pragma GCC unroll 8
            for (int i = 0; i < PANELS * VECTORS; ++i) {
                const int64_t group = (panel + i / VECTORS) * groups + (k + start) / kScaleGroup;
                const VecF scale = load(matrix.scales + group * kPanel + (first + i % VECTORS) * kWidth);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) acc[r][i] += scale * part[r][i];
            }
            for (int p = 0; p < PANELS; ++p) b[p] += count * kPanel;
        }
    } else {
        tile<type, ROWS, PANELS, VECTORS>(b, length, a, problem.a_row, problem.a_column, acc, ahead);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int i = 0; i < PANELS * VECTORS; ++i) {
            const int64_t n = (panel + i / VECTORS) * kPanel + (first + i % VECTORS) * kWidth;
            float* to = problem.c + (m + r) * problem.c_row + n;
            if (n + kWidth <= columns) {
                store(to, acc[r][i]);
            } else {
                for (int lane = 0; lane < kWidth && n + lane < columns; ++lane) to[lane] = acc[r][i][lane];
            }
        }
    }
}

// One panel, all vectors of it, ROWS rows.
template <WeightType type, int ROWS>
inline void rows(const Problem& problem, int64_t m, int64_t panel, int64_t k, int64_t length, bool add) {
    constexpr int step = kVectors < kTileVectors ? kVectors : kTileVectors;
    for (int first = 0; first < kVectors; first += step) {
        // The next panel comes from memory while the first rows pass over this one: later rows would find it idle.
        const int64_t ahead = m == 0 && first == 0 ? problem.b.rows_K * kPanel : 0;
        block<type, ROWS, 1, step>(problem, m, panel, first, k, length, add, ahead);
    }
}

template <WeightType type, int ROWS>
inline void tail(const Problem& problem, int64_t left, int64_t m, int64_t panel, int64_t k, int64_t length, bool add) {
    if constexpr (ROWS > 0) {
        if (left == ROWS) {
            rows<type, ROWS>(problem, m, panel, k, length, add);
        } else {
            tail<type, ROWS - 1>(problem, left, m, panel, k, length, add);
        }
    }
}

// One or two rows: several panels at once, so that there are chains enough to hide the latency of an addition.
template <WeightType type, int ROWS>
void few_rows(const Problem& problem, bool accumulate, int64_t panel, int64_t end) {
    constexpr int together = ROWS == 1 ? 4 : 2;
    const int64_t length = problem.b.rows_K;
    // Far enough for the memory's latency at full speed; the processor's own prefetchers stop at every page.
    constexpr int64_t ahead = 4096 / static_cast<int64_t>(sizeof(typename Element<type>::stored));
    if constexpr (kVectors <= 2) {
        for (; panel + together <= end; panel += together) {
            block<type, ROWS, together, kVectors>(problem, 0, panel, 0, 0, length, accumulate, ahead);
        }
        if constexpr (together == 4) {
            if (end - panel == 3) return block<type, ROWS, 3, kVectors>(problem, 0, panel, 0, 0, length, accumulate, ahead);
            if (end - panel == 2) return block<type, ROWS, 2, kVectors>(problem, 0, panel, 0, 0, length, accumulate, ahead);
        }
        for (; panel < end; ++panel) block<type, ROWS, 1, kVectors>(problem, 0, panel, 0, 0, length, accumulate, ahead);
    } else {
        for (; panel < end; ++panel) {
            for (int first = 0; first < kVectors; first += 4) {
                block<type, ROWS, 1, 4>(problem, 0, panel, first, 0, length, accumulate, first == 0 ? ahead : 0);
            }
        }
    }
}

template <WeightType type>
void gemm_of(const Problem& problem, int64_t rows_M, bool accumulate, int64_t panel_begin, int64_t panel_end) {
    if (rows_M == 1) return few_rows<type, 1>(problem, accumulate, panel_begin, panel_end);
    if (rows_M == 2) return few_rows<type, 2>(problem, accumulate, panel_begin, panel_end);
    const int64_t rows_K = problem.b.rows_K;
    // A few rows need no blocking: their piece of A is small, and C need not be written twice.
    const int64_t step = rows_M <= 4 * kTileRows ? (rows_K > 0 ? rows_K : 1) : kBlockK;
    for (int64_t k = 0; k < rows_K; k += step) {
        const int64_t length = rows_K - k < step ? rows_K - k : step;
        const bool add = accumulate || k > 0;
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
            int64_t m = 0;
            for (; m + kTileRows <= rows_M; m += kTileRows) rows<type, kTileRows>(problem, m, panel, k, length, add);
            if (m < rows_M) tail<type, kTileRows - 1>(problem, rows_M - m, m, panel, k, length, add);
        }
    }
}

void gemm(const PackedMatrix& b, int64_t rows_M, const float* a, int64_t a_row, int64_t a_column, float* c,
          int64_t c_row, const float* bias, bool accumulate, int64_t panel_begin, int64_t panel_end) {
    const Problem problem{b, a, a_row, a_column, c, c_row, bias};
    switch (b.type) {
        case WeightType::fp32: return gemm_of<WeightType::fp32>(problem, rows_M, accumulate, panel_begin, panel_end);
        case WeightType::bf16: return gemm_of<WeightType::bf16>(problem, rows_M, accumulate, panel_begin, panel_end);
        case WeightType::int8: return gemm_of<WeightType::int8>(problem, rows_M, accumulate, panel_begin, panel_end);
    }
}

void pack(const float* source, int64_t row, int64_t column, int64_t rows_K, int64_t columns_N, float* panels,
          int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
        float* to = panels + panel * rows_K * kPanel;
        const int64_t n = panel * kPanel;
        const int64_t width = columns_N - n < kPanel ? columns_N - n : kPanel;
        const float* from = source + n * column;
        if (column == 1 && width == kPanel) {
            for (int64_t k = 0; k < rows_K; ++k) {
                for (int i = 0; i < kPanel; i += kWidth) store(to + k * kPanel + i, load(from + k * row + i));
            }
            continue;
        }
        if (row == 1 && width == kPanel) {  // a transposed source: squares of it are turned in registers
            const int64_t whole = rows_K / kWidth * kWidth;
            for (int64_t k = 0; k < whole; k += kWidth) {
                for (int64_t i = 0; i < kPanel; i += kWidth) {
                    VecF square[kWidth];
                    for (int j = 0; j < kWidth; ++j) square[j] = load(from + (i + j) * column + k);
                    transpose_square<float>(square);
                    for (int j = 0; j < kWidth; ++j) store(to + (k + j) * kPanel + i, square[j]);
                }
            }
            for (int64_t k = whole; k < rows_K; ++k) {
                for (int64_t i = 0; i < kPanel; ++i) to[k * kPanel + i] = from[k + i * column];
            }
            continue;
        }
        // Blocks of K, so that the lines of a transposed source are still in the cache when their next element is due.
        for (int64_t start = 0; start < rows_K; start += 16) {
            const int64_t stop = start + 16 < rows_K ? start + 16 : rows_K;
            for (int64_t i = 0; i < kPanel; ++i) {
                if (i < width) {
                    for (int64_t k = start; k < stop; ++k) to[k * kPanel + i] = from[k * row + i * column];
                } else {
                    for (int64_t k = start; k < stop; ++k) to[k * kPanel + i] = 0.0f;
                }
            }
        }
    }
}

}  // namespace

extern const GemmTable gemm_table = {gemm, pack};

}  // namespace crsm::CRSM_ISA
