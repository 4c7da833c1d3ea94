#include "injection.hpp"
#include "vec.hpp"

namespace crsm::CRSM_ISA {
namespace {

// One head: its state, its part of the write's factors, and the lengths that clipping needs.
template <typename T>
struct Head {
    const T* h;
    const T* u;  // [R], `u_stride` apart
    const T* b;  // [R, N]
    int64_t u_stride, width_P, state_N, rank_R;
    T alpha, largest;
    T target_scale = 1, target_norm = 0;    // clip of h + write
    T blended_scale = 1, blended_norm = 0;  // clip of the blend
    bool target_clipped = false, blended_clipped = false;

    // Entry (p, n) of the write before it is cut.
    template <typename V>
    inline V write(int64_t p, int64_t n) const {
        V total{};
        for (int64_t r = 0; r < rank_R; ++r) total += u[r * u_stride + p] * get<V>(b + r * state_N + n);
        return total;
    }
    template <typename V>
    static inline V get(const T* p) {
        if constexpr (sizeof(V) == sizeof(T)) {
            return *p;
        } else {
            return load(p);
        }
    }
    template <typename V>
    inline V cut(V x) const {
        const V high = V{} + largest, low = -high;
        x = x > high ? high : x;
        return x < low ? low : x;
    }
    template <typename V>
    inline V sum(int64_t p, int64_t n) const {  // h + write
        return get<V>(h + p * state_N + n) + cut(write<V>(p, n));
    }
    template <typename V>
    inline V blended(int64_t p, int64_t n) const {
        const V state = get<V>(h + p * state_N + n);
        return state + alpha * (target_scale * sum<V>(p, n) - state);
    }

    // Calls body(p, n, tag) for every place of the head, with a tag of the vector's or the scalar's type.
    template <typename F>
    inline void each(F body) const {
        for (int64_t p = 0; p < width_P; ++p) {
            int64_t n = 0;
            for (; n + kLanes<T> <= state_N; n += kLanes<T>) body(p, n, Vec<T>{});
            for (; n < state_N; ++n) body(p, n, T{});
        }
    }

    inline void measure() {
        Vec<T> before{}, after{};
        T before_rest = 0, after_rest = 0;
        each([&](int64_t p, int64_t n, auto tag) {
            using V = decltype(tag);
            const V x = get<V>(h + p * state_N + n), y = sum<V>(p, n);
            if constexpr (sizeof(V) == sizeof(T)) {
                before_rest += x * x;
                after_rest += y * y;
            } else {
                before += x * x;
                after += y * y;
            }
        });
        const T limit = root(sum_lanes<T>(before) + before_rest);
        target_norm = root(sum_lanes<T>(after) + after_rest);
        target_clipped = target_norm > limit;
        target_scale = target_clipped ? scale(limit, target_norm) : T(1);
        Vec<T> both{};
        T both_rest = 0;
        each([&](int64_t p, int64_t n, auto tag) {
            using V = decltype(tag);
            const V x = blended<V>(p, n);
            if constexpr (sizeof(V) == sizeof(T)) {
                both_rest += x * x;
            } else {
                both += x * x;
            }
        });
        blended_norm = root(sum_lanes<T>(both) + both_rest);
        blended_clipped = blended_norm > limit;
        blended_scale = blended_clipped ? scale(limit, blended_norm) : T(1);
    }
    static inline T scale(T limit, T norm) { return limit * T(kInside) / (norm > T(1e-30) ? norm : T(1e-30)); }
    static inline float root(float x) { return __builtin_sqrtf(x); }
    static inline double root(double x) { return __builtin_sqrt(x); }
};

template <typename T>
inline Head<T> head_of(const InjectionArrays<T>& a, int64_t row, int64_t head) {
    Head<T> result;
    result.h = a.ssm_BHPN + (row * a.heads_H + head) * a.width_P * a.state_N;
    result.u = a.u_BRE + row * a.rank_R * a.heads_H * a.width_P + head * a.width_P;
    result.b = a.b_BRN + row * a.rank_R * a.state_N;
    result.u_stride = a.heads_H * a.width_P;
    result.width_P = a.width_P;
    result.state_N = a.state_N;
    result.rank_R = a.rank_R;
    result.alpha = a.alpha_B[row];
    result.largest = a.largest;
    return result;
}

template <typename T>
void forward(const InjectionArrays<T>& a, int64_t row, T* out_BHPN) {
    const int64_t size = a.width_P * a.state_N;
    for (int64_t index = 0; index < a.heads_H; ++index) {
        Head<T> head = head_of(a, row, index);
        T* out = out_BHPN + (row * a.heads_H + index) * size;
        if (!(head.alpha > 0)) {
            for (int64_t i = 0; i < size; ++i) out[i] = head.h[i];
            continue;
        }
        head.measure();
        head.each([&](int64_t p, int64_t n, auto tag) {
            using V = decltype(tag);
            const V x = head.blended_scale * head.template blended<V>(p, n);
            if constexpr (sizeof(V) == sizeof(T)) {
                out[p * a.state_N + n] = x;
            } else {
                store(out + p * a.state_N + n, x);
            }
        });
    }
}

// With D the gradient of the output, s and t the two scales, and x/‖x‖ the direction in which a clip takes nothing:
//   dblend = t·D − t·blend·(blend·D)/‖blend‖²      dsum = α·s·(dblend − sum·(sum·dblend)/‖sum‖²)
// (the second terms only where the clip acts), du = dsum·b, db = uᵀ·dsum.
template <typename T>
void backward(const InjectionArrays<T>& a, int64_t row, const T* dout_BHPN, T* du_BRE, T* db_BRN) {
    const int64_t size = a.width_P * a.state_N, inner = a.heads_H * a.width_P;
    T* db = db_BRN + row * a.rank_R * a.state_N;
    T* du_row = du_BRE + row * a.rank_R * inner;
    for (int64_t i = 0; i < a.rank_R * a.state_N; ++i) db[i] = 0;
    for (int64_t i = 0; i < a.rank_R * inner; ++i) du_row[i] = 0;
    for (int64_t index = 0; index < a.heads_H; ++index) {
        Head<T> head = head_of(a, row, index);
        if (!(head.alpha > 0)) continue;
        head.measure();
        const T* dout = dout_BHPN + (row * a.heads_H + index) * size;
        Vec<T> blend_d{}, sum_d{}, sum_blend{};
        T blend_d_rest = 0, sum_d_rest = 0, sum_blend_rest = 0;
        head.each([&](int64_t p, int64_t n, auto tag) {
            using V = decltype(tag);
            const V d = Head<T>::template get<V>(dout + p * a.state_N + n);
            const V blend = head.template blended<V>(p, n), sum = head.template sum<V>(p, n);
            if constexpr (sizeof(V) == sizeof(T)) {
                blend_d_rest += blend * d;
                sum_d_rest += sum * d;
                sum_blend_rest += sum * blend;
            } else {
                blend_d += blend * d;
                sum_d += sum * d;
                sum_blend += sum * blend;
            }
        });
        const T square2 = head.blended_norm * head.blended_norm, square1 = head.target_norm * head.target_norm;
        const T along2 = head.blended_clipped ? (sum_lanes<T>(blend_d) + blend_d_rest) / square2 : T(0);
        const T sum_dot_dblend =
            head.blended_scale * ((sum_lanes<T>(sum_d) + sum_d_rest) - along2 * (sum_lanes<T>(sum_blend) + sum_blend_rest));
        const T along1 = head.target_clipped ? sum_dot_dblend / square1 : T(0);
        const T gain = head.alpha * head.target_scale;
        T* du = du_row + index * a.width_P;
        head.each([&](int64_t p, int64_t n, auto tag) {
            using V = decltype(tag);
            const V d = Head<T>::template get<V>(dout + p * a.state_N + n);
            const V blend = head.template blended<V>(p, n);
            const V raw = head.template write<V>(p, n);
            const V sum = Head<T>::template get<V>(head.h + p * a.state_N + n) + head.cut(raw);
            V dsum = gain * (head.blended_scale * (d - along2 * blend) - along1 * sum);
            const V high = V{} + head.largest;
            dsum = raw > high ? V{} : dsum;
            dsum = raw < -high ? V{} : dsum;
            for (int64_t r = 0; r < a.rank_R; ++r) {
                const T factor = head.u[r * head.u_stride + p];
                T* to = db + r * a.state_N + n;
                const V product = dsum * Head<T>::template get<V>(head.b + r * a.state_N + n);
                if constexpr (sizeof(V) == sizeof(T)) {
                    *to += factor * dsum;
                    du[r * inner + p] += product;
                } else {
                    store(to, load(to) + factor * dsum);
                    du[r * inner + p] += sum_lanes<T>(product);
                }
            }
        });
    }
}

}  // namespace

extern const InjectionTable injection_table = {{forward<float>, backward<float>}, {forward<double>, backward<double>}};

}  // namespace crsm::CRSM_ISA
