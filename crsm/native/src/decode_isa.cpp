// The phases of a decode step. Scratch and orchestration: decode.cpp.
#include "decode.hpp"
#include "gemm.hpp"
#include "latent/kernels.hpp"
#include "vec_tile.hpp"

namespace crsm::CRSM_ISA {
namespace {

constexpr int kWidth = kLanes<float>;
static_assert(kPanel % kWidth == 0);

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Sum of the lanes, halves onto halves.
inline float fold(VecF v) {
#if defined(__clang__)
    return sum_lanes<float>(v);
#else
    VecI lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    for (int half = kWidth / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane ^ half);
    return v[0];
#endif
}

// Past the caches, for what is not read again before the caches have turned over; `p` is aligned to the vector.
inline void store_past_caches(float* p, VecF v) {
#if defined(CRSM_ISA_avx512)
    __builtin_ia32_movntps512(p, v);
#elif defined(CRSM_ISA_avx2)
    __builtin_ia32_movntps256(p, v);
#else
    store(p, v);
#endif
}
inline void order_stores() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}

// scaled = x · weight for `count` columns; returns Σ x². The same sum whoever calls, for the same count.
inline float scale_piece(const float* x, const float* weight, float* scaled, int64_t count) {
    VecF squares{};
    int64_t n = 0;
    for (; n + kWidth <= count; n += kWidth) {
        const VecF v = load(x + n);
        store(scaled + n, v * load(weight + n));
        squares += v * v;
    }
    float total = fold(squares);
    for (; n < count; ++n) {
        scaled[n] = x[n] * weight[n];
        total += x[n] * x[n];
    }
    return total;
}

inline void mix_piece(const float* x, float share, bool first, float* mixed, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
        const float before = first ? 0.0f : mixed[n];
        mixed[n] = before + share * x[n];
    }
}

inline float inverse_rms(const float* squares, int64_t count, int64_t width, float eps) {
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += squares[i];
    return 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + eps);
}

inline const float* residual(const DecodeModel& model, const DecodeStep& step, int64_t layer, int64_t row) {
    const int64_t D = model.sizes.d_model;
    if (layer == 0) return model.embedding_VD + step.token_B[row] * D;
    return step.hidden_BLD + step.place(row) * step.hidden_stride + (layer - 1) * D;
}

void embed(const DecodeModel& model, const DecodeStep& step, const float* norm_D) {
    const int64_t D = model.sizes.d_model, J = model.sizes.pieces();
    for (int64_t row = 0; row < step.batch; ++row) {
        const float* x_D = residual(model, step, 0, row);
        for (int64_t j = 0; j < J; ++j) {
            const int64_t n = j * kPanel;
            step.square_BJ[row * J + j] =
                scale_piece(x_D + n, norm_D + n, step.scaled_BD + row * D + n, smaller(kPanel, D - n));
        }
    }
}

// Calls body(n, count) for pieces of [begin, end) of one vector each; `count` is a constant but for the last one.
template <typename F>
inline void by_vectors(int64_t begin, int64_t end, F body) {
    for (; begin + kWidth <= end; begin += kWidth) body(begin, kWidth);
    if (begin < end) body(begin, end - begin);
}

// values ← silu(values · scale)
inline void scale_silu(float* values, int64_t count, float scale) {
    by_vectors(0, count, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
        store_some(values + n, silu(load_some(values + n, some) * scale), some);
    });
}

// Channels [begin, end) of one row: the window moves on by values · scale; values ← silu(convolution).
template <bool TAPS_FIRST>
inline void convolve(const DecodeSizes& sizes, const DecodeLayer& layer, float* values_C, const float* window,
                     float* new_window, int64_t begin, int64_t end, float scale) {
    const int64_t C = sizes.conv_channels(), taps = sizes.d_conv - 1;
    by_vectors(begin, end, [&](int64_t c, int64_t some) __attribute__((always_inline)) {
        const VecF newest = load_some(values_C + c, some) * scale;
        VecF sum{};
        for (int64_t k = 0; k < taps; ++k) {
            VecF tap{};
            if (TAPS_FIRST) {
                tap = load_some(window + k * C + c, some);
                // Ascending, so that the window may be moved in place.
                if (k > 0) store_some(new_window + (k - 1) * C + c, tap, some);
            } else {
                for (int64_t i = 0; i < some; ++i) tap[i] = window[(c + i) * taps + k];
            }
            sum += load_some(layer.conv_weight_KC + k * C + c, some) * tap;
        }
        if (TAPS_FIRST) {
            store_some(new_window + (taps - 1) * C + c, newest, some);
        } else {
            for (int64_t i = 0; i < some; ++i) {
                const float* from = window + (c + i) * taps;
                float* to = new_window + (c + i) * taps;
                for (int64_t k = 0; k + 1 < taps; ++k) to[k] = from[k + 1];
                to[taps - 1] = newest[i];
            }
        }
        sum += load_some(layer.conv_weight_KC + taps * C + c, some) * newest;
        store_some(values_C + c, silu(sum + load_some(layer.conv_bias_C + c, some)), some);
    });
}

void project_in(const DecodeModel& model, const DecodeLayer& weights, const DecodeStep& step, int64_t layer,
                int64_t begin, int64_t end) {
    const DecodeSizes& sizes = model.sizes;
    const int64_t D = sizes.d_model, E = sizes.d_inner(), C = sizes.conv_channels(), M = sizes.projected();
    const int64_t J = sizes.pieces();
    gemm_table.gemm(weights.in_proj, step.batch, step.scaled_BD, D, 1, step.projected_BM, M, nullptr, false, begin, end);
    const int64_t first = begin * kPanel, last = smaller(end * kPanel, M);
    for (int64_t row = 0; row < step.batch; ++row) {
        const float scale = inverse_rms(step.square_BJ + row * J, J, D, sizes.norm_eps);
        float* values_M = step.projected_BM + row * M;
        if (first < E) scale_silu(values_M + first, smaller(last, E) - first, scale);
        const int64_t from = larger(first, E) - E, to = smaller(last, E + C) - E;
        if (from < to) {
            const auto convolved = step.taps_first ? convolve<true> : convolve<false>;
            convolved(sizes, weights, values_M + E, step.conv_in[layer] + step.window(row) * step.conv_stride,
                      step.conv_out[layer] + step.place(row) * step.conv_stride, from, to, scale);
        }
        for (int64_t n = larger(first, E + C); n < last; ++n) values_M[n] *= scale;
    }
}

// The sums of the lanes of as many vectors as a vector has lanes, each as `fold` makes it, in half the shuffles of two.
inline VecF fold_all(VecF (&v)[kWidth]) {
    VecI low, high;
    for (int i = 0; i < kWidth; ++i) {
        low[i] = i / 2 + (i % 2) * kWidth;
        high[i] = low[i] + kWidth / 2;
    }
#pragma GCC unroll 4
    for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < half; ++i) {
            v[i] = __builtin_shuffle(v[i], v[i + half], low) + __builtin_shuffle(v[i], v[i + half], high);
        }
    }
    return v[0];
}

// h ← decay·h + input ⊗ B and y = h·C for the P rows of one head. VECTORS · kWidth = N.
template <int VECTORS, bool PAST_CACHES>
inline void move_head(const float* h, float* to, int64_t ahead, int64_t P, float decay, const float* input_P,
                      const float* B_N, const float* C_N, float* y_P) {
    VecF b[VECTORS], c[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        b[v] = load(B_N + v * kWidth);
        c[v] = load(C_N + v * kWidth);
    }
    const VecF a = broadcast(decay);
    const auto move_row = [&](int64_t p) __attribute__((always_inline)) {
        const VecF x = broadcast(input_P[p]);
        const float* from = h + p * VECTORS * kWidth;
        float* moved_to = to + p * VECTORS * kWidth;
        VecF sum{};
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            __builtin_prefetch(from + ahead + v * kWidth, 1, 3);
            const VecF added = x * b[v];
            const VecF moved = a * load(from + v * kWidth) + added;
            if (PAST_CACHES) {
                store_past_caches(moved_to + v * kWidth, moved);
            } else {
                store(moved_to + v * kWidth, moved);
            }
            sum += moved * c[v];
        }
        return sum;
    };
    int64_t p = 0;
    for (; p + kWidth <= P; p += kWidth) {
        VecF sums[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) sums[i] = move_row(p + i);
        store(y_P + p, fold_all(sums));
    }
    for (; p < P; ++p) y_P[p] = fold(move_row(p));
}

inline void move_head_any(const float* h, float* to, int64_t P, int64_t N, float decay, const float* input_P,
                          const float* B_N, const float* C_N, float* y_P) {
    const VecF a = broadcast(decay);
    for (int64_t p = 0; p < P; ++p, h += N, to += N) {
        const VecF x = broadcast(input_P[p]);
        VecF sum{};
        int64_t n = 0;
        for (; n + kWidth <= N; n += kWidth) {
            const VecF added = x * load(B_N + n);
            const VecF moved = a * load(h + n) + added;
            store(to + n, moved);
            sum += moved * load(C_N + n);
        }
        float y = fold(sum);
        for (; n < N; ++n) {
            const float added = input_P[p] * B_N[n];
            const float moved = decay * h[n] + added;
            to[n] = moved;
            y += moved * C_N[n];
        }
        y_P[p] = y;
    }
}

template <int VECTORS>
inline bool move_head_if(const float* h, float* to, bool past_caches, int64_t ahead, int64_t P, int64_t N, float decay,
                         const float* input_P, const float* B_N, const float* C_N, float* y_P) {
    if (N != VECTORS * kWidth) return false;
    if (past_caches) {
        move_head<VECTORS, true>(h, to, ahead, P, decay, input_P, B_N, C_N, y_P);
    } else {
        move_head<VECTORS, false>(h, to, ahead, P, decay, input_P, B_N, C_N, y_P);
    }
    return true;
}

// Step sizes and decays of `count` ≤ kWidth heads from `head` on.
inline void discretize(const DecodeLayer& weights, const float* raw_H, int64_t head, int64_t count, float* dt,
                       float* decay) {
    const VecF sizes = softplus(load_some(raw_H + head, count) + load_some(weights.dt_bias_H + head, count));
    store_some(dt, sizes, count);
    store_some(decay, exp(sizes * load_some(weights.A_H + head, count)), count);
}

// The gate of `count` ≤ kPanel outputs of a head, their part of the norm's weight, and their squares; `y` is used up.
inline float gate(float* y, float skip, const float* x, const float* silu_z, const float* norm, float* gated,
                  int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = (y[i] + skip * x[i]) * silu_z[i];
    return scale_piece(y, norm, gated, count);
}

// So many heads further on, the state is brought near.
constexpr int64_t kAhead = 2;

void update_state(const DecodeModel& model, const DecodeLayer& weights, const DecodeStep& step, int64_t layer,
                  int64_t begin, int64_t end) {
    const DecodeSizes& sizes = model.sizes;
    const int64_t H = sizes.n_heads, P = sizes.headdim, N = sizes.d_state, E = sizes.d_inner();
    const int64_t C = sizes.conv_channels(), M = sizes.projected();
    const float* ssm_in = step.ssm_in[layer];
    float* ssm_out = step.ssm_out[layer];
    const bool past_caches = step.past_caches && reinterpret_cast<uintptr_t>(ssm_out) % kVectorBytes == 0;
    float dt_H[kWidth] = {};
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit / H, head = unit % H;
        const float* projected_M = step.projected_BM + row * M;
        const float *silu_z_P = projected_M + head * P, *x_P = projected_M + E + head * P;
        const float *B_N = projected_M + 2 * E, *C_N = B_N + N;
        float* decay_H = step.decay_LBH + layer * step.decay_stride + row * H;
        if (unit == begin || head % kWidth == 0) {
            // For the heads from here on: a vector of them at once, as far as they are this call's.
            const int64_t first = head / kWidth * kWidth, skipped = head - first;
            const int64_t count = smaller(smaller(kWidth, H - first) - skipped, end - unit);
            discretize(weights, projected_M + E + C, head, count, dt_H + skipped, decay_H + head);
        }
        const float dt = dt_H[head % kWidth], decay = decay_H[head];
        const int64_t place = step.place(row) * step.ssm_stride + head * P * N;
        const float *h = ssm_in + place, *norm_P = weights.gated_norm_E + head * P;
        float *to = ssm_out + place, *gated_P = step.gated_BE + row * E + head * P;
        const int64_t later = smaller(unit + kAhead, end - 1);
        const int64_t ahead = step.place(later / H) * step.ssm_stride + later % H * P * N - place;
        float squares = 0;
        for (int64_t p = 0; p < P; p += kPanel) {
            const int64_t count = smaller(kPanel, P - p);
            float input[kPanel], y[kPanel];
            for (int64_t i = 0; i < count; ++i) input[i] = dt * x_P[p + i];
            const float* from = h + p * N;
            float* moved = to + p * N;
            if (!move_head_if<1>(from, moved, past_caches, ahead, count, N, decay, input, B_N, C_N, y) &&
                !move_head_if<2>(from, moved, past_caches, ahead, count, N, decay, input, B_N, C_N, y) &&
                !move_head_if<4>(from, moved, past_caches, ahead, count, N, decay, input, B_N, C_N, y) &&
                !move_head_if<8>(from, moved, past_caches, ahead, count, N, decay, input, B_N, C_N, y)) {
                move_head_any(from, moved, count, N, decay, input, B_N, C_N, y);
            }
            squares += gate(y, weights.D_H[head], x_P + p, silu_z_P + p, norm_P + p, gated_P + p, count);
        }
        step.square_BH[row * H + head] = squares;
        if (step.carried_BL == nullptr) continue;
        if (float* carried = step.carried_BL[row * sizes.n_layer + layer]) {
            float* part = carried + head * P * N;
            for (int64_t i = 0; i < P * N; ++i) part[i] *= decay;
        }
    }
    if (past_caches) order_stores();
}

inline float dot(const float* a, const float* b, int64_t count) {
    VecF sums{};
    by_vectors(0, count, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
        sums += load_some(a + n, some) * load_some(b + n, some);
    });
    return fold(sums);
}

// y[h, p] += factor[h] · score · input[h, p]; then factor[h] ← factor[h] · decay[h].
inline void add_token(const float* decay_H, const float* input_E, float score, int64_t H, int64_t P, float* factor_H,
                      float* y_E) {
    for (int64_t head = 0; head < H; ++head) {
        const VecF share = broadcast(factor_H[head] * score);
        by_vectors(head * P, (head + 1) * P, [&](int64_t e, int64_t some) __attribute__((always_inline)) {
            store_some(y_E + e, load_some(y_E + e, some) + share * load_some(input_E + e, some), some);
        });
        factor_H[head] *= decay_H[head];
    }
}

void read_branches(const DecodeModel& model, const DecodeLayer& weights, const DecodeStep& step, int64_t layer,
                   int64_t begin, int64_t end) {
    const DecodeSizes& sizes = model.sizes;
    const int64_t H = sizes.n_heads, P = sizes.headdim, N = sizes.d_state, E = sizes.d_inner();
    const int64_t C = sizes.conv_channels(), M = sizes.projected();
    for (int64_t row = begin; row < end; ++row) {
        const float* projected_M = step.projected_BM + row * M;
        const float *x_E = projected_M + E, *B_N = x_E + E, *C_N = B_N + N;
        float* own = step.records[layer] + step.place(row) * step.record_stride;
        float *decay_H = own, *input_E = decay_H + H, *kept_N = input_E + E;
        for (int64_t first = 0; first < H; first += kWidth) {
            const int64_t count = smaller(kWidth, H - first);
            float dt[kWidth];
            discretize(weights, projected_M + E + C, first, count, dt, decay_H + first);
            for (int64_t e = first * P; e < (first + count) * P; ++e) input_E[e] = dt[e / P - first] * x_E[e];
        }
        for (int64_t n = 0; n < N; ++n) kept_N[n] = B_N[n];

        // Until the gates are there, outputs lie where they will be gated, and factors where the squares will be.
        float *y_E = step.gated_BE + row * E, *factor_H = step.square_BH + row * H;
        for (int64_t e = 0; e < E; ++e) y_E[e] = 0;
        for (int64_t head = 0; head < H; ++head) factor_H[head] = 1;
        add_token(decay_H, input_E, dot(B_N, C_N, N), H, P, factor_H, y_E);
        for (int64_t i = step.branch_B[row]; i < step.branch_B[row + 1]; ++i) {
            const float* token = step.records[layer] + step.branch[i] * step.record_stride;
            add_token(token, token + H, dot(token + H + E, C_N, N), H, P, factor_H, y_E);
        }
        const float* state = step.ssm_in[layer] + step.state_B[row] * step.ssm_stride;
        for (int64_t head = 0; head < H; ++head) {
            float squares = 0;
            for (int64_t p = head * P; p < (head + 1) * P; p += kPanel) {
                const int64_t count = smaller(kPanel, (head + 1) * P - p);
                float y[kPanel];
                latent_kernels.read(state + p * N, C_N, y, count, N);
                for (int64_t i = 0; i < count; ++i) y[i] = y_E[p + i] + factor_H[head] * y[i];
                squares += gate(y, weights.D_H[head], x_E + p, projected_M + p, weights.gated_norm_E + p, y_E + p, count);
            }
            factor_H[head] = squares;
        }
    }
}

void project_out(const DecodeModel& model, const DecodeLayer& weights, const DecodeStep& step, int64_t layer,
                 const float* next_norm_D, int64_t begin, int64_t end) {
    const DecodeSizes& sizes = model.sizes;
    const int64_t D = sizes.d_model, E = sizes.d_inner(), H = sizes.n_heads, L = sizes.n_layer, J = sizes.pieces();
    gemm_table.gemm(weights.out_proj, step.batch, step.gated_BE, E, 1, step.out_BD, D, nullptr, false, begin, end);
    const bool last = layer + 1 == L;
    for (int64_t row = 0; row < step.batch; ++row) {
        const float* out_D = step.out_BD + row * D;
        float* hidden_D = step.hidden_BLD + step.place(row) * step.hidden_stride + layer * D;
        const float scale = inverse_rms(step.square_BH + row * H, H, E, sizes.norm_eps);
        const float* before_D = residual(model, step, layer, row);
        for (int64_t j = begin; j < end; ++j) {
            const int64_t n = j * kPanel, count = smaller(kPanel, D - n);
            for (int64_t i = n; i < n + count; ++i) hidden_D[i] = before_D[i] + scale * out_D[i];
            const float* read = hidden_D + n;
            if (step.logits_BV != nullptr) {
                float* mixed = step.mixed_BD + row * D + n;
                mix_piece(read, model.head.fusion_L[layer], layer == 0, mixed, count);
                if (last) read = mixed;
            }
            if (next_norm_D != nullptr) {
                step.square_BJ[row * J + j] =
                    scale_piece(read, next_norm_D + n, step.scaled_BD + row * D + n, count);
            }
        }
    }
}

void mix(const DecodeModel& model, const DecodeStep& step) {
    const int64_t D = model.sizes.d_model, L = model.sizes.n_layer, J = model.sizes.pieces();
    for (int64_t row = 0; row < step.batch; ++row) {
        float* mixed_D = step.mixed_BD + row * D;
        for (int64_t j = 0; j < J; ++j) {
            const int64_t n = j * kPanel, count = smaller(kPanel, D - n);
            for (int64_t layer = 0; layer < L; ++layer) {
                mix_piece(step.hidden_BLD + step.place(row) * step.hidden_stride + layer * D + n, model.head.fusion_L[layer], layer == 0,
                          mixed_D + n, count);
            }
            step.square_BJ[row * J + j] =
                scale_piece(mixed_D + n, model.head.norm_D + n, step.scaled_BD + row * D + n, count);
        }
    }
}

void project_logits(const DecodeModel& model, const DecodeStep& step, int64_t begin, int64_t end) {
    const int64_t D = model.sizes.d_model, V = model.sizes.vocab_size, J = model.sizes.pieces();
    gemm_table.gemm(model.head.lm_head, step.batch, step.scaled_BD, D, 1, step.logits_BV, V, nullptr, false, begin, end);
    for (int64_t row = 0; row < step.batch; ++row) {
        const float scale = inverse_rms(step.square_BJ + row * J, J, D, model.sizes.norm_eps);
        float* logits_V = step.logits_BV + row * V;
        const int64_t last = smaller(end * kPanel, V);
        for (int64_t n = begin * kPanel; n < last; ++n) logits_V[n] *= scale;
    }
}

int64_t log_softmax(float* logits_V, int64_t vocab) {
    float largest = logits_V[0];
    for (int64_t n = 1; n < vocab; ++n) largest = logits_V[n] > largest ? logits_V[n] : largest;
    int64_t likeliest = 0;
    while (likeliest + 1 < vocab && logits_V[likeliest] != largest) ++likeliest;
    VecF sums{};
    by_vectors(0, vocab, [&](int64_t n, int64_t some) __attribute__((always_inline)) {
        const VecF x = exp(load_some(logits_V + n, some) - largest);
        if (some == kWidth) {
            sums += x;
        } else {
            for (int64_t i = 0; i < some; ++i) sums[i] += x[i];
        }
    });
    const float shift = largest + __builtin_logf(fold(sums));
    for (int64_t n = 0; n < vocab; ++n) logits_V[n] -= shift;
    return likeliest;
}

}  // namespace

extern const DecodeTable decode_table = {embed,       project_in, update_state,   read_branches,
                                         project_out, mix,        project_logits, log_softmax};

}  // namespace crsm::CRSM_ISA
