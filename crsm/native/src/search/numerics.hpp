// crsm/search/numerics.py and consensus.py to the last bit: float32, every operation in a fixed order, none fused.
// To be compiled with -ffp-contract=off.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace crsm::search {

// exp(x) for x ≤ 0; exactly 0 below -87. Cephes' expf, without a branch, so that loops over it become vectors.
inline float exp_nonpositive(float x) {
    constexpr float kUnderflow = -87.0f, kLog2E = static_cast<float>(1.44269504088896341);
    constexpr float kLn2High = static_cast<float>(0.693359375), kLn2Low = static_cast<float>(-2.12194440e-4);
    const float clamped = x > kUnderflow ? x : kUnderflow;
    const float scaled = clamped * kLog2E + 0.5f;
    const float truncated = static_cast<float>(static_cast<int32_t>(scaled));
    const float k = truncated - (truncated > scaled ? 1.0f : 0.0f);
    float r = clamped - k * kLn2High;
    r = r - k * kLn2Low;
    float polynomial = static_cast<float>(1.9875691500e-4) * r + static_cast<float>(1.3981999507e-3);
    polynomial = polynomial * r + static_cast<float>(8.3334519073e-3);
    polynomial = polynomial * r + static_cast<float>(4.1665795894e-2);
    polynomial = polynomial * r + static_cast<float>(1.6666665459e-1);
    polynomial = polynomial * r + static_cast<float>(5.0000001201e-1);
    const float mantissa = (polynomial * (r * r) + r) + 1.0f;
    const float power = std::bit_cast<float>((static_cast<int32_t>(k) + 127) << 23);
    return x < kUnderflow ? 0.0f : mantissa * power;
}

// From the first to the last.
inline float sum(const float* x, int64_t count) {
    float total = x[0];
    for (int64_t i = 1; i < count; ++i) total = total + x[i];
    return total;
}

// In lanes: the highest of all does not depend on the order.
inline float highest(const float* x, int64_t count) {
    constexpr int64_t kLanes = 4;
    float best = x[0];
    int64_t i = 0;
    if (count >= 2 * kLanes) {
        float lanes[kLanes] = {x[0], x[1], x[2], x[3]};
        for (i = kLanes; i + kLanes <= count; i += kLanes) {
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
            }
        }
        for (const float lane : lanes) best = lane > best ? lane : best;
    }
    for (; i < count; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

// `out` may be `logits`.
inline void softmax(const float* logits, int64_t count, float* out) {
    const float most = highest(logits, count);
    for (int64_t i = 0; i < count; ++i) out[i] = exp_nonpositive(logits[i] - most);
    const float total = sum(out, count);
    for (int64_t i = 0; i < count; ++i) out[i] = out[i] / total;
}

// Σ k·v − λ·std(v) over the layers.
inline float consensus(const float* values, const float* weights, int64_t layers, float penalty) {
    float weighted = weights[0] * values[0], total = values[0];
    for (int64_t i = 1; i < layers; ++i) {
        weighted = weighted + weights[i] * values[i];
        total = total + values[i];
    }
    const float count = static_cast<float>(layers);
    const float mean = total / count;
    float deviation = values[0] - mean;
    float squares = deviation * deviation;
    for (int64_t i = 1; i < layers; ++i) {
        deviation = values[i] - mean;
        squares = squares + deviation * deviation;
    }
    return weighted - penalty * std::sqrt(squares / count);
}

}  // namespace crsm::search
