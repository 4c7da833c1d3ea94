#include "memory_read.hpp"
#include "vec.hpp"

namespace crsm::CRSM_ISA {
namespace {

// Rows of a matrix at once: independent sums hide the latency of an addition.
constexpr int kRows = 4;

template <typename T>
void forward(const T* memory, const T* query, T* read, int64_t begin, int64_t count, int64_t width_E, int64_t state_N) {
    constexpr int width = kLanes<T>;
    for (int64_t index = begin; index < begin + count; ++index) {
        const T* matrix = memory + index * width_E * state_N;
        const T* q = query + index * state_N;
        T* out = read + index * width_E;
        int64_t e = 0;
        for (; e + kRows <= width_E; e += kRows) {
            Vec<T> sum[kRows] = {};
            int64_t n = 0;
            for (; n + width <= state_N; n += width) {
                const Vec<T> x = load(q + n);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) sum[r] += x * load(matrix + (e + r) * state_N + n);
            }
            sum_lanes4<T>(sum, out + e);
            for (; n < state_N; ++n) {
                for (int r = 0; r < kRows; ++r) out[e + r] += q[n] * matrix[(e + r) * state_N + n];
            }
        }
        for (; e < width_E; ++e) {
            Vec<T> sum{};
            int64_t n = 0;
            for (; n + width <= state_N; n += width) sum += load(q + n) * load(matrix + e * state_N + n);
            out[e] = sum_lanes<T>(sum);
            for (; n < state_N; ++n) out[e] += q[n] * matrix[e * state_N + n];
        }
    }
}

template <typename T>
void backward(const T* memory, const T* dread, T* dquery, int64_t begin, int64_t count, int64_t width_E,
              int64_t state_N) {
    constexpr int width = kLanes<T>;
    for (int64_t index = begin; index < begin + count; ++index) {
        const T* matrix = memory + index * width_E * state_N;
        const T* grad = dread + index * width_E;
        T* out = dquery + index * state_N;
        int64_t n = 0;
        for (; n + 2 * width <= state_N; n += 2 * width) {
            Vec<T> sum[2][2] = {};
            int64_t e = 0;
            for (; e + 2 <= width_E; e += 2) {
                for (int r = 0; r < 2; ++r) {
                    const Vec<T> g = broadcast(grad[e + r]);
                    sum[r][0] += g * load(matrix + (e + r) * state_N + n);
                    sum[r][1] += g * load(matrix + (e + r) * state_N + n + width);
                }
            }
            for (; e < width_E; ++e) {
                const Vec<T> g = broadcast(grad[e]);
                sum[0][0] += g * load(matrix + e * state_N + n);
                sum[0][1] += g * load(matrix + e * state_N + n + width);
            }
            store(out + n, sum[0][0] + sum[1][0]);
            store(out + n + width, sum[0][1] + sum[1][1]);
        }
        for (; n < state_N; ++n) {
            T total = 0;
            for (int64_t e = 0; e < width_E; ++e) total += grad[e] * matrix[e * state_N + n];
            out[n] = total;
        }
    }
}

}  // namespace

extern const MemoryReadTable memory_read_table = {{forward<float>, backward<float>}, {forward<double>, backward<double>}};

}  // namespace crsm::CRSM_ISA
