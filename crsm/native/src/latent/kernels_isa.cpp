#include "kernels.hpp"

#include "../vec.hpp"

namespace crsm::CRSM_ISA {
namespace {

using latent::Candidate;
using latent::HeadWeights;
using latent::SliceSum;

constexpr int kWidth = kLanes<float>;
// Logits that are compared with the worst of the best at once.
constexpr int64_t kBlock = 4 * kWidth;

static inline VecF load_some(const float* p, int64_t count, float other = 0.0f) {
    VecF v = broadcast(other);
    for (int i = 0; i < count; ++i) v[i] = p[i];
    return v;
}
static inline void store_some(float* p, int64_t count, VecF v) {
    for (int i = 0; i < count; ++i) p[i] = v[i];
}
static inline bool any(VecI mask) {
    int32_t found = 0;
    for (int i = 0; i < kWidth; ++i) found |= mask[i];
    return found != 0;
}
static inline VecF larger(VecF a, VecF b) { return a > b ? a : b; }

// 1 − 2 / (1 + exp(2x)): absolute error of some 1e-7, and exactly ±1 far out.
static inline VecF tanh(VecF x) { return 1.0f - 2.0f / (1.0f + exp(2.0f * x)); }

template <typename F>
static inline void in_place(float* x, int64_t count, F function) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(x + i, function(load(x + i)));
    if (i < count) store_some(x + i, count - i, function(load_some(x + i, count - i)));
}

int64_t first_non_finite(const float* x, int64_t count) {
    constexpr int64_t step = 64 * kWidth;
    for (int64_t start = 0; start < count; start += step) {
        const int64_t stop = start + step < count ? start + step : count;
        // 0·x is 0, or NaN where x is not finite.
        VecF sum = {};
        int64_t i = start;
        for (; i + kWidth <= stop; i += kWidth) sum += load(x + i) * 0.0f;
        if (i < stop) sum += load_some(x + i, stop - i) * 0.0f;
        if (sum_lanes<float>(sum) == 0.0f) continue;
        for (i = start; i < stop; ++i) {
            if (!(x[i] - x[i] == 0.0f)) return i;
        }
    }
    return count;
}

void tanh_rows(float* x, int64_t count) {
    in_place(x, count, [](VecF v) { return tanh(v); });
}

void silu_rows(float* x, int64_t count) {
    in_place(x, count, [](VecF v) { return silu(v); });
}

// Sums of neighbouring lanes: those of a, then those of b.
static inline VecF pair_sums(VecF a, VecF b) {
#if defined(CRSM_ISA_avx512)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(CRSM_ISA_avx2)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Lane i of the result is the sum of vector i's lanes.
static inline VecF lane_sums(VecF (&v)[kWidth]) {
#pragma GCC unroll 4
    for (int count = kWidth / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) v[i] = pair_sums(v[2 * i], v[2 * i + 1]);
    }
    return v[0];
}

// Dot products of the query with the kWidth rows that `row` gives.
template <typename F>
static inline VecF read_rows(F row, const float* query_N, int64_t columns_N) {
    const int64_t whole = columns_N / kWidth * kWidth, left = columns_N - whole;
    VecF sums[kWidth] = {};
    for (int64_t n = 0; n < whole; n += kWidth) {
        const VecF query = load(query_N + n);
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) sums[r] += load(row(r) + n) * query;
    }
    if (left > 0) {
        const VecF query = load_some(query_N + whole, left);
        for (int r = 0; r < kWidth; ++r) sums[r] += load_some(row(r) + whole, left) * query;
    }
    return lane_sums(sums);
}

// The memory lies in the order in which it is read, so that it streams from the cache.
void read(const float* memory_EN, const float* query_N, float* out_E, int64_t rows_E, int64_t columns_N) {
    if (rows_E < kWidth) {
        const auto row = [&](int r) { return memory_EN + (r < rows_E ? r : 0) * columns_N; };
        return store_some(out_E, rows_E, read_rows(row, query_N, columns_N));
    }
    for (int64_t e = 0; e < rows_E; e += kWidth) {
        // The last rows may overlap the ones before; a row's sum does not depend on its place.
        const int64_t first = e + kWidth <= rows_E ? e : rows_E - kWidth;
        const float* memory = memory_EN + first * columns_N;
        const auto row = [&](int r) { return memory + r * columns_N; };
        store(out_E + first, read_rows(row, query_N, columns_N));
    }
}

void rms_norm(float* x, int64_t count, float eps) {
    VecF sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const VecF v = load(x + i + part * kWidth);
            sums[part] += v * v;
        }
    }
    for (; i < count; i += kWidth) {
        const VecF v = i + kWidth <= count ? load(x + i) : load_some(x + i, count - i);
        sums[0] += v * v;
    }
    const float mean = sum_lanes<float>((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(count);
    const VecF scale = broadcast(1.0f / __builtin_sqrtf(mean + eps));
    in_place(x, count, [&](VecF v) { return v * scale; });
}

static inline VecF gru_cell(VecF input_r, VecF input_z, VecF input_n, VecF hidden_r, VecF hidden_z, VecF hidden_n,
                            VecF latent) {
    const VecF r = sigmoid(input_r + hidden_r);
    const VecF z = sigmoid(input_z + hidden_z);
    const VecF n = tanh(input_n + r * hidden_n);
    return n + z * (latent - n);
}

void gru(const float* input_3G, const float* hidden_3G, const float* latent_G, float* out_G, int64_t width_G) {
    const float *input_z = input_3G + width_G, *input_n = input_z + width_G;
    const float *hidden_z = hidden_3G + width_G, *hidden_n = hidden_z + width_G;
    int64_t i = 0;
    for (; i + kWidth <= width_G; i += kWidth) {
        store(out_G + i, gru_cell(load(input_3G + i), load(input_z + i), load(input_n + i), load(hidden_3G + i),
                                  load(hidden_z + i), load(hidden_n + i), load(latent_G + i)));
    }
    if (i < width_G) {
        const int64_t left = width_G - i;
        store_some(out_G + i, left,
                   gru_cell(load_some(input_3G + i, left), load_some(input_z + i, left), load_some(input_n + i, left),
                            load_some(hidden_3G + i, left), load_some(hidden_z + i, left),
                            load_some(hidden_n + i, left), load_some(latent_G + i, left)));
    }
}

void heads(const HeadWeights& weights, const float* hidden_LD, float* values_L, float* normed_D) {
    const int64_t width = weights.d_model_D, layers = weights.num_layers_L;
    for (int64_t layer = 0; layer < layers; ++layer) {
        const float* x = hidden_LD + layer * width;
        const float* critic = weights.critic_LD + layer * width;
        const VecF share = broadcast(weights.fusion_L[layer]);
        VecF squares = {}, dots = {};
        int64_t i = 0;
        for (; i + kWidth <= width; i += kWidth) {
            const VecF v = load(x + i);
            squares += v * v;
            dots += v * load(critic + i);
            store(normed_D + i, layer == 0 ? share * v : load(normed_D + i) + share * v);
        }
        if (i < width) {
            const int64_t left = width - i;
            const VecF v = load_some(x + i, left);
            squares += v * v;
            dots += v * load_some(critic + i, left);
            store_some(normed_D + i, left, layer == 0 ? share * v : load_some(normed_D + i, left) + share * v);
        }
        if (values_L == nullptr) continue;
        const float mean = sum_lanes<float>(squares) / static_cast<float>(width);
        const float logit =
            sum_lanes<float>(dots) / __builtin_sqrtf(mean + weights.critic_eps) + weights.critic_bias_L[layer];
        values_L[layer] = 1.0f / (1.0f + exp(-logit));
    }
    rms_norm(normed_D, width, weights.norm_eps);
    for (int64_t i = 0; i < width; ++i) normed_D[i] *= weights.norm_D[i];
}

static inline bool worse(Candidate a, Candidate b) {
    return a.logit < b.logit || (a.logit == b.logit && a.token > b.token);
}

// Lets heap[root] sink: the worst is on top.
static inline void sink(Candidate* heap, int64_t count, int64_t root) {
    const Candidate moved = heap[root];
    for (;;) {
        int64_t child = 2 * root + 1;
        if (child >= count) break;
        if (child + 1 < count && worse(heap[child + 1], heap[child])) ++child;
        if (!worse(heap[child], moved)) break;
        heap[root] = heap[child];
        root = child;
    }
    heap[root] = moved;
}

static inline void make_heap(Candidate* heap, int64_t count) {
    for (int64_t root = count / 2; root-- > 0;) sink(heap, count, root);
}

// Turns the heap into a list, the best first.
static inline void sort_heap(Candidate* heap, int64_t count) {
    while (count > 1) {
        --count;
        const Candidate worst = heap[0];
        heap[0] = heap[count];
        heap[count] = worst;
        sink(heap, count, 0);
    }
}

SliceSum select(const float* logits, int64_t count, int64_t first_token, int64_t keep, Candidate* kept) {
    VecF max = broadcast(-__builtin_inff());
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) max = larger(load(logits + i), max);
    if (i < count) max = larger(load_some(logits + i, count - i, -__builtin_inff()), max);
    SliceSum slice = {max[0], 0.0f};
    for (int lane = 1; lane < kWidth; ++lane) slice.max = max[lane] > slice.max ? max[lane] : slice.max;
    VecF sum = {};
    for (i = 0; i + kWidth <= count; i += kWidth) sum += exp(load(logits + i) - slice.max);
    if (i < count) sum += exp(load_some(logits + i, count - i, -__builtin_inff()) - slice.max);
    slice.sum = sum_lanes<float>(sum);

    for (i = 0; i < keep; ++i) kept[i] = {logits[i], first_token + i};
    make_heap(kept, keep);
    while (i < count) {
        if (i + kBlock <= count) {
            const VecF worst = broadcast(kept[0].logit);
            VecI found = load(logits + i) > worst;
#pragma GCC unroll 4
            for (int part = 1; part < 4; ++part) found |= load(logits + i + part * kWidth) > worst;
            if (!any(found)) {
                i += kBlock;
                continue;
            }
        }
        const int64_t stop = i + kBlock < count ? i + kBlock : count;
        for (; i < stop; ++i) {
            if (logits[i] > kept[0].logit) {  // an equal one has a higher token than all before it
                kept[0] = {logits[i], first_token + i};
                sink(kept, keep, 0);
            }
        }
    }
    sort_heap(kept, keep);
    return slice;
}

void best(Candidate* candidates, int64_t count, int64_t keep) {
    make_heap(candidates, keep);
    for (int64_t i = keep; i < count; ++i) {
        if (worse(candidates[0], candidates[i])) {
            candidates[0] = candidates[i];
            sink(candidates, keep, 0);
        }
    }
    sort_heap(candidates, keep);
}

void log_sum(const SliceSum* slices, int64_t count, float* max, float* log_sum) {
    *max = slices[0].max;
    for (int64_t i = 1; i < count; ++i) *max = slices[i].max > *max ? slices[i].max : *max;
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += slices[i].sum * exp(slices[i].max - *max);
    *log_sum = __builtin_logf(sum);
}

}  // namespace

extern const LatentKernels latent_kernels = {first_non_finite, tanh_rows, silu_rows, read, rms_norm, gru,
                                             heads,            select,    best,      log_sum};

}  // namespace crsm::CRSM_ISA
