// Matrix products with one packed operand: C[M, N] = A[M, K] · B[K, N], B in panels of kPanel columns.
//
// Every output element is one accumulator that takes its K products in order, whatever M is, whichever tile it falls in
// and whichever thread computes it: a row's result does not depend on the batch around it.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace crsm {

// Columns of a panel: two vectors of AVX-512.
inline constexpr int64_t kPanel = 32;
// Rows of K that share a scale in an int8 matrix, per column.
inline constexpr int64_t kScaleGroup = 64;

enum class WeightType { fp32 = 0, bf16 = 1, int8 = 2 };

// B as panels [ceil(N / kPanel)][K][kPanel], zero beyond N.
struct PackedMatrix {
    int64_t rows_K = 0;
    int64_t columns_N = 0;
    WeightType type = WeightType::fp32;
    const void* panels = nullptr;  // float, uint16_t (bfloat16) or int8_t; aligned to 64 bytes
    const float* scales = nullptr;  // int8: [panels][ceil(K / kScaleGroup)][kPanel]

    int64_t num_panels() const { return (columns_N + kPanel - 1) / kPanel; }
};

struct GemmTable {
    // C[m, n] for rows [0, M) and the panels [panel_begin, panel_end); element (m, k) of A is a[m·a_row + k·a_column].
    // accumulate: added to what C holds; bias: one per column, or null, then without accumulate only.
    void (*gemm)(const PackedMatrix& b, int64_t rows_M, const float* a, int64_t a_row, int64_t a_column, float* c,
                 int64_t c_row, const float* bias, bool accumulate, int64_t panel_begin, int64_t panel_end);
    // Packs B[k, n] = source[k·row + n·column] into panels [begin, end) of `panels` (fp32).
    void (*pack)(const float* source, int64_t row, int64_t column, int64_t rows_K, int64_t columns_N, float* panels,
                 int64_t begin, int64_t end);
};
CRSM_DECLARE_TABLE(GemmTable, gemm_table)

// The whole product on up to `threads` threads (0: the setting).
void gemm(const PackedMatrix& b, int64_t rows_M, const float* a, int64_t a_row, int64_t a_column, float* c, int64_t c_row,
          const float* bias, bool accumulate, int threads);

// Packs all panels on up to `threads` threads into memory of packed_floats(K, N) floats, aligned to 64 bytes.
PackedMatrix pack(const float* source, int64_t row, int64_t column, int64_t rows_K, int64_t columns_N, float* panels,
                  int threads);
inline int64_t packed_floats(int64_t rows_K, int64_t columns_N) {
    return (columns_N + kPanel - 1) / kPanel * kPanel * rows_K;
}

// Packs B[k, n] = source[k·row + n·column] rounded to a type:
//   bf16: to nearest, ties to even;
//   int8: per column and kScaleGroup rows of K, scale = max|B| / 127 and round(B / scale), ties to even.
// `panels`: packed_floats(K, N) elements of the type, aligned to 64 bytes; `scales`: scale_floats(K, N), for int8 alone.
PackedMatrix pack_as(WeightType type, const float* source, int64_t row, int64_t column, int64_t rows_K,
                     int64_t columns_N, void* panels, float* scales, int threads);
inline int64_t scale_rows(int64_t rows_K) { return (rows_K + kScaleGroup - 1) / kScaleGroup; }
inline int64_t scale_floats(int64_t rows_K, int64_t columns_N) {
    return (columns_N + kPanel - 1) / kPanel * kPanel * scale_rows(rows_K);
}
inline int64_t bytes_of(WeightType type) { return type == WeightType::fp32 ? 4 : type == WeightType::bf16 ? 2 : 1; }

}  // namespace crsm
