#include "steer.hpp"

#include "injection.hpp"
#include "vec.hpp"

namespace crsm::CRSM_ISA {
namespace {

constexpr int kWidth = kLanes<float>;

// Norm of what value(i, tag) gives for every place i of `count`, with a tag of the vector's or the scalar's type. Sums of
// a few squares each, so that rounding stays well below the hair's breadth that clipping leaves.
template <typename F>
inline float norm_of(int64_t count, F value) {
    VecF sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const VecF x = value(i + k * kWidth, VecF{});
            sums[k] += x * x;
        }
    }
    for (; i + kWidth <= count; i += kWidth) {
        const VecF x = value(i, VecF{});
        sums[0] += x * x;
    }
    float rest = 0;
    for (; i < count; ++i) {
        const float x = value(i, 0.0f);
        rest += x * x;
    }
    return __builtin_sqrtf(sum_lanes<float>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest);
}

// Calls body(i, tag) for every place.
template <typename F>
inline void each(int64_t count, F body) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) body(i, VecF{});
    for (; i < count; ++i) body(i, 0.0f);
}

inline VecF get(const float* p, VecF) { return load(p); }
inline float get(const float* p, float) { return *p; }
inline void put(float* p, VecF x) { store(p, x); }
inline void put(float* p, float x) { *p = x; }

// What brings a head inside of its limit; exactly 1 where it is there already.
inline float clip(float norm, float limit) {
    if (!(norm > limit)) return 1.0f;
    return limit * static_cast<float>(kInside) / (norm > 1e-30f ? norm : 1e-30f);
}

// h ← clip(h − d); `d` is worked in.
inline void withdraw(float* h, float* d, int64_t count) {
    const float limit = norm_of(count, [&](int64_t i, auto tag) { return get(h + i, tag); });
    const float scale = clip(norm_of(count, [&](int64_t i, auto tag) {
        const auto x = get(h + i, tag) - get(d + i, tag);
        put(d + i, x);
        return x;
    }), limit);
    each(count, [&](int64_t i, auto tag) { put(h + i, scale * get(d + i, tag)); });
}

// An entry of a write within ± largest; what is no number counts as the largest one.
template <typename V>
inline V cut(V x, float largest) {
    const V high = V{} + largest, low = -high;
    x = x < high ? x : high;
    return x > low ? x : low;
}

// sum ← h + cut(u ⊗ b · carried) for one head; RANK factors, or as many as there are if that is 0.
template <int RANK>
inline void add_write_of(const LayerSteering& s, int64_t head, const float* h, float* sum) {
    const int64_t P = s.width_P, E = s.heads_H * P, N = s.state_N, rank = RANK > 0 ? RANK : s.rank_R;
    const float largest = s.largest, carried = s.carried_H[head];
    const float *u = s.u_RE + head * P, *b_RN = s.b_RN;
    each(N, [&](int64_t n, auto tag) __attribute__((always_inline)) {
        decltype(tag) b[RANK > 0 ? RANK : 1];
        for (int r = 0; r < RANK; ++r) b[r] = carried * get(b_RN + r * N + n, tag);
        for (int64_t p = 0; p < P; ++p) {
            auto write = tag;
            for (int64_t r = 0; r < rank; ++r) {
                write += u[r * E + p] * (RANK > 0 ? b[RANK > 0 ? r : 0] : carried * get(b_RN + r * N + n, tag));
            }
            put(sum + p * N + n, get(h + p * N + n, tag) + cut(write, largest));
        }
    });
}

inline void add_write(const LayerSteering& s, int64_t head, const float* h, float* sum) {
    switch (s.rank_R) {
        case 1: return add_write_of<1>(s, head, h, sum);
        case 2: return add_write_of<2>(s, head, h, sum);
        case 4: return add_write_of<4>(s, head, h, sum);
        default: return add_write_of<0>(s, head, h, sum);
    }
}

// h ← clip(h + α·(clip(h + write) − h)); d ← the difference.
inline void write(const LayerSteering& s, int64_t head, float* h, float* d, int64_t count) {
    const float limit = norm_of(count, [&](int64_t i, auto tag) { return get(h + i, tag); });
    add_write(s, head, h, d);
    const float target = clip(norm_of(count, [&](int64_t i, auto tag) { return get(d + i, tag); }), limit);
    const float scale = clip(norm_of(count, [&](int64_t i, auto tag) {
        const auto state = get(h + i, tag);
        const auto x = state + s.alpha * (target * get(d + i, tag) - state);
        put(d + i, x);
        return x;
    }), limit);
    each(count, [&](int64_t i, auto tag) {
        const auto x = scale * get(d + i, tag);
        put(d + i, x - get(h + i, tag));
        put(h + i, x);
    });
}

void layer(const LayerSteering& s) {
    const int64_t count = s.width_P * s.state_N;
    for (int64_t head = 0; head < s.heads_H; ++head) {
        float *h = s.ssm_HPN + head * count, *d = s.delta_HPN + head * count;
        if (s.withdraw) withdraw(h, d, count);
        if (s.alpha > 0) write(s, head, h, d, count);
    }
}

}  // namespace

extern const SteerTable steer_table = {layer};

}  // namespace crsm::CRSM_ISA
