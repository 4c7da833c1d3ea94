#include "mixer.hpp"
#include "vec_tile.hpp"

namespace crsm::CRSM_ISA {
namespace {

// One vector of channels of one sequence: taps and inputs in columns of scratch memory, [K] and [K-1 + T] vectors.
template <typename T>
struct Column {
    int64_t count;  // lanes in use
    T* x_T;         // the window, then the inputs
    T* du_T;        // gradient of the sum before the activation
    T* weight_K;
    Vec<T> bias;
};

template <typename T>
int64_t conv_scratch(const Conv<T>& conv) {
    return (2 * (conv.size_T + conv.size_K) + conv.size_K) * kLanes<T>;
}

template <typename T>
Column<T> load_column(const Conv<T>& conv, int64_t b, int64_t c, int64_t end, T* scratch) {
    constexpr int64_t n = kLanes<T>;
    const int64_t K = conv.size_K, length = conv.size_T;
    Column<T> column;
    column.count = smaller(n, end - c);
    column.x_T = scratch;
    column.du_T = scratch + (K - 1 + length) * n;
    column.weight_K = column.du_T + (K - 1 + length) * n;
    column.bias = load_some(conv.bias_C + c, column.count);
    for (int64_t k = 0; k < K; ++k) {
        Vec<T> taps{};
        for (int64_t i = 0; i < column.count; ++i) taps[i] = conv.weight_CK[(c + i) * K + k];
        store(column.weight_K + k * n, taps);
    }
    for (int64_t k = 0; k < K - 1; ++k) {
        Vec<T> before{};
        for (int64_t i = 0; i < column.count; ++i) before[i] = conv.window[(b * conv.size_C + c + i) * (K - 1) + k];
        store(column.x_T + k * n, before);
    }
    const T* x = conv.x.data + b * conv.x.batch + c;
    for (int64_t t = 0; t < length; ++t) {
        store(column.x_T + (K - 1 + t) * n, load_some(x + t * conv.x.row, column.count));
    }
    return column;
}

// How many inputs before token t belong to its document, at most K-1.
template <typename T>
inline int64_t reach_of(const Conv<T>& conv, const int64_t* segment, int64_t t) {
    const int64_t K = conv.size_K;
    if (segment == nullptr) return K - 1;
    int64_t reach = 0;
    // The window belongs to the document of the first token.
    while (reach < K - 1 && segment[t - reach - 1 > 0 ? t - reach - 1 : 0] == segment[t]) ++reach;
    return reach;
}

template <typename T>
inline Vec<T> sum_of(const Column<T>& column, int64_t K, int64_t t, int64_t reach) {
    constexpr int64_t n = kLanes<T>;
    Vec<T> sum = column.bias;
    for (int64_t k = K - 1 - reach; k < K; ++k) sum += load(column.weight_K + k * n) * load(column.x_T + (t + k) * n);
    return sum;
}

template <typename T>
void conv_forward(const Conv<T>& conv, int64_t b, int64_t begin, int64_t end, T* scratch) {
    constexpr int64_t n = kLanes<T>;
    const int64_t K = conv.size_K, length = conv.size_T;
    const int64_t* segment = conv.segment == nullptr ? nullptr : conv.segment + b * length;
    for (int64_t c = begin; c < end; c += n) {
        const Column<T> column = load_column(conv, b, c, end, scratch);
        T* y = conv.y.data + b * conv.y.batch + c;
        if (segment == nullptr && K == 4) {
            const Vec<T> w0 = load(column.weight_K), w1 = load(column.weight_K + n), w2 = load(column.weight_K + 2 * n),
                         w3 = load(column.weight_K + 3 * n);
            const T* x = column.x_T;
            for (int64_t t = 0; t < length; ++t, x += n) {
                const Vec<T> sum = column.bias + w0 * load(x) + w1 * load(x + n) + w2 * load(x + 2 * n) +
                                   w3 * load(x + 3 * n);
                store_some(y + t * conv.y.row, conv.activate ? silu(sum) : sum, column.count);
            }
        } else {
            for (int64_t t = 0; t < length; ++t) {
                const Vec<T> sum = sum_of(column, K, t, reach_of(conv, segment, t));
                store_some(y + t * conv.y.row, conv.activate ? silu(sum) : sum, column.count);
            }
        }
        const int64_t reach = segment == nullptr ? K - 1 : reach_of(conv, segment, length - 1) + 1;
        for (int64_t k = 0; k < K - 1; ++k) {
            // Input k of the new window lies K-2-k before the last token.
            const bool same = K - 2 - k < reach;
            for (int64_t i = 0; i < column.count; ++i) {
                conv.last[(b * conv.size_C + c + i) * (K - 1) + k] = same ? column.x_T[(length + k) * n + i] : T(0);
            }
        }
    }
}

template <typename T>
void conv_backward(const Conv<T>& conv, int64_t b, int64_t begin, int64_t end, T* scratch) {
    constexpr int64_t n = kLanes<T>;
    const int64_t K = conv.size_K, length = conv.size_T, C = conv.size_C;
    const int64_t* segment = conv.segment == nullptr ? nullptr : conv.segment + b * length;
    T* parameters = conv.dparameters + b * (K + 1) * C;
    for (int64_t c = begin; c < end; c += n) {
        const Column<T> column = load_column(conv, b, c, end, scratch);
        const T* dy = conv.dy.data + b * conv.dy.batch + c;
        const bool plain = segment == nullptr && K == 4;  // the width and the rows that matter, without branches
        Vec<T> dbias{};
        if (plain) {
            Vec<T> w[4], dtap[4] = {};
            for (int k = 0; k < 4; ++k) w[k] = load(column.weight_K + k * n);
            for (int64_t t = 0; t < length; ++t) {
                Vec<T> du = load_some(dy + t * conv.dy.row, column.count), sum = column.bias, x[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    x[k] = load(column.x_T + (t + k) * n);
                    sum += w[k] * x[k];
                }
                if (conv.activate) {
                    const Vec<T> gate = sigmoid(sum);
                    du *= gate * (1 + sum * (1 - gate));
                }
                store(column.du_T + t * n, du);
                dbias += du;
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) dtap[k] += du * x[k];
            }
            for (int64_t k = 0; k < 4; ++k) store_some(parameters + k * C + c, dtap[k], column.count);
        } else {
            for (int64_t t = 0; t < length; ++t) {
                Vec<T> du = load_some(dy + t * conv.dy.row, column.count);
                if (conv.activate) {
                    const Vec<T> sum = sum_of(column, K, t, reach_of(conv, segment, t)), gate = sigmoid(sum);
                    du *= gate * (1 + sum * (1 - gate));
                }
                store(column.du_T + t * n, du);
                dbias += du;
            }
            for (int64_t k = 0; k < K; ++k) {
                Vec<T> dtap{};
                for (int64_t t = 0; t < length; ++t) {
                    if (segment != nullptr && K - 1 - k > reach_of(conv, segment, t)) continue;
                    dtap += load(column.du_T + t * n) * load(column.x_T + (t + k) * n);
                }
                store_some(parameters + k * C + c, dtap, column.count);
            }
        }
        store_some(parameters + K * C + c, dbias, column.count);
        // Input i (of the window and x together) reaches tokens i-(K-1) … i, through taps K-1 … 0.
        const int64_t last_reach = segment == nullptr ? K - 1 : reach_of(conv, segment, length - 1) + 1;
        T* dx = conv.dx.data + b * conv.dx.batch + c;
        if (plain) {  // inputs that are neither in a window nor near an end
            const Vec<T> w0 = load(column.weight_K), w1 = load(column.weight_K + n), w2 = load(column.weight_K + 2 * n),
                         w3 = load(column.weight_K + 3 * n);
            for (int64_t i = 3; i < length; ++i) {
                const T* du = column.du_T + i * n;
                store_some(dx + (i - 3) * conv.dx.row,
                           w0 * load(du) + w1 * load(du - n) + w2 * load(du - 2 * n) + w3 * load(du - 3 * n),
                           column.count);
            }
        }
        for (int64_t i = conv.dwindow == nullptr ? K - 1 : 0; i < K - 1 + length; ++i) {
            if (plain && i >= 3 && i < length) continue;
            Vec<T> sum{};
            for (int64_t k = 0; k < K; ++k) {
                const int64_t t = i - k;
                if (t < 0 || t >= length) continue;
                if (segment != nullptr && K - 1 - k > reach_of(conv, segment, t)) continue;
                sum += load(column.du_T + t * n) * load(column.weight_K + k * n);
            }
            const int64_t k = i - length;  // its place in the new window
            if (conv.dlast != nullptr && k >= 0 && K - 2 - k < last_reach) {
                for (int64_t j = 0; j < column.count; ++j) sum[j] += conv.dlast[(b * C + c + j) * (K - 1) + k];
            }
            if (i >= K - 1) {
                store_some(dx + (i - (K - 1)) * conv.dx.row, sum, column.count);
            } else {
                for (int64_t j = 0; j < column.count; ++j) conv.dwindow[(b * C + c + j) * (K - 1) + i] = sum[j];
            }
        }
    }
}

template <typename T>
inline Vec<T> gated(const T* y, const T* z, int64_t i, int64_t left) {
    const Vec<T> value = load_some(y + i, left);
    return z == nullptr ? value : value * silu(load_some(z + i, left));
}

template <typename T>
void norm_forward(const Norm<T>& norm, const T* y, const T* z, T* out) {
    const int64_t E = norm.size_E;
    Vec<T> squares{};
    for (int64_t i = 0; i < E; i += kLanes<T>) {
        const Vec<T> u = gated(y, z, i, E - i);
        squares += u * u;
        store_some(out + i, u, E - i);
    }
    const Vec<T> scale = broadcast(1 / root(sum_lanes<T>(squares) / T(E) + norm.eps));
    for (int64_t i = 0; i < E; i += kLanes<T>) {
        store_some(out + i, load_some(out + i, E - i) * scale * load_some(norm.weight_E + i, E - i), E - i);
    }
}

template <typename T>
void norm_backward(const Norm<T>& norm, const T* y, const T* z, const T* dout, T* dy, T* dz, T* dweight_E) {
    const int64_t E = norm.size_E;
    Vec<T> squares{}, products{};
    for (int64_t i = 0; i < E; i += kLanes<T>) {
        const Vec<T> u = gated(y, z, i, E - i);
        squares += u * u;
        products += u * load_some(dout + i, E - i) * load_some(norm.weight_E + i, E - i);
    }
    const T scale = 1 / root(sum_lanes<T>(squares) / T(E) + norm.eps);
    const T back = sum_lanes<T>(products) * scale * scale * scale / T(E);
    for (int64_t i = 0; i < E; i += kLanes<T>) {
        const int64_t left = E - i;
        const Vec<T> grad = load_some(dout + i, left), value = load_some(y + i, left);
        Vec<T> u = value, gate{}, input{};
        if (z != nullptr) {
            input = load_some(z + i, left);
            gate = sigmoid(input);
            u = value * input * gate;
        }
        store_some(dweight_E + i, load_some(dweight_E + i, left) + grad * u * scale, left);
        const Vec<T> du = grad * load_some(norm.weight_E + i, left) * scale - u * back;
        if (z == nullptr) {
            store_some(dy + i, du, left);
        } else {
            store_some(dy + i, du * input * gate, left);
            store_some(dz + i, du * value * gate * (1 + input * (1 - gate)), left);
        }
    }
}

}  // namespace

extern const MixerTable mixer_table = {
    {conv_scratch<float>, conv_forward<float>, conv_backward<float>, norm_forward<float>, norm_backward<float>},
    {conv_scratch<double>, conv_forward<double>, conv_backward<double>, norm_forward<double>, norm_backward<double>},
};

}  // namespace crsm::CRSM_ISA
