// Packing with rounding: weights as bfloat16 or int8. The same bits on every processor.
#include <cmath>
#include <cstring>

#include "gemm.hpp"
#include "threads.hpp"

namespace crsm {
namespace {

// To nearest, ties to even.
uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// To the nearest integer, ties to even, for |x| < 2^22: there 1.5·2^23 leaves no room for a fraction.
float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

struct Source {
    const float* data;
    int64_t row, column, rows_K, columns_N;
    float operator()(int64_t k, int64_t n) const { return n < columns_N ? data[k * row + n * column] : 0.0f; }
};

void pack_bf16(const Source& source, int64_t panel, uint16_t* to) {
    for (int64_t i = 0; i < kPanel; ++i) {
        for (int64_t k = 0; k < source.rows_K; ++k) to[k * kPanel + i] = to_bf16(source(k, panel * kPanel + i));
    }
}

void pack_int8(const Source& source, int64_t panel, int8_t* to, float* scales) {
    for (int64_t i = 0; i < kPanel; ++i) {
        const int64_t n = panel * kPanel + i;
        for (int64_t start = 0; start < source.rows_K; start += kScaleGroup) {
            const int64_t stop = start + kScaleGroup < source.rows_K ? start + kScaleGroup : source.rows_K;
            float largest = 0.0f;
            for (int64_t k = start; k < stop; ++k) {
                const float size = std::fabs(source(k, n));
                if (size > largest) largest = size;
            }
            // A scale that is not a normal number could not be divided by; such weights are as good as 0.
            const float scale = largest / 127.0f >= 1.17549435e-38f ? largest / 127.0f : 0.0f;
            scales[start / kScaleGroup * kPanel + i] = scale;
            for (int64_t k = start; k < stop; ++k) {
                // At most 127 in size, as the largest over its scale rounds to 127.
                to[k * kPanel + i] = static_cast<int8_t>(scale > 0.0f ? round_even(source(k, n) / scale) : 0.0f);
            }
        }
    }
}

}  // namespace

PackedMatrix pack_as(WeightType type, const float* source, int64_t row, int64_t column, int64_t rows_K,
                     int64_t columns_N, void* panels, float* scales, int threads) {
    if (type == WeightType::fp32) {
        return pack(source, row, column, rows_K, columns_N, static_cast<float*>(panels), threads);
    }
    PackedMatrix packed{rows_K, columns_N, type, panels, type == WeightType::int8 ? scales : nullptr};
    const Source from{source, row, column, rows_K, columns_N};
    const int64_t size = rows_K * kPanel;
    parallel_for(packed.num_panels(), rows_K * columns_N < 200'000 ? 1 : threads, [&](int64_t panel) {
        if (type == WeightType::bf16) {
            pack_bf16(from, panel, static_cast<uint16_t*>(panels) + panel * size);
        } else {
            pack_int8(from, panel, static_cast<int8_t*>(panels) + panel * size, scales + panel * scale_rows(rows_K) * kPanel);
        }
    });
    return packed;
}

}  // namespace crsm
