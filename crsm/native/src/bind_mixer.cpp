// Convolution and norms of a mixer for training: how they are cut into tasks, and their sums over tasks.
#include "bindings.hpp"
#include "mixer.hpp"
#include "scratch.hpp"
#include "threads.hpp"
#include "views.hpp"

namespace crsm {
namespace {

constexpr int64_t kChannels = 64;  // of a convolution's task
constexpr int64_t kNormRows = 32;  // of a norm's task

template <typename T>
const MixerFunctions<T>& functions() {
    if constexpr (std::is_same_v<T, float>) {
        return mixer_table().fp32;
    } else {
        return mixer_table().fp64;
    }
}

template <typename T>
Conv<T> conv_inputs(const AnyArray& x, const AnyArray& weight, const AnyArray& bias, const AnyArray& window,
                    const MaybeArray& segment, bool activate) {
    Conv<T> conv;
    conv.x = checked_rows<const T>(x, "x", -1, -1, -1);
    conv.size_B = x.shape(0), conv.size_T = x.shape(1), conv.size_C = x.shape(2);
    if (conv.size_B < 1 || conv.size_T < 1 || conv.size_C < 1) {
        throw std::invalid_argument("x has shape " + shape_text({conv.size_B, conv.size_T, conv.size_C}) +
                                    "; allowed: (B, T, C), none of them 0");
    }
    conv.weight_CK = checked<const T>(weight, "weight", {conv.size_C, -1});
    conv.size_K = weight.shape(1);
    if (conv.size_K < 1) throw std::invalid_argument("weight has width 0; allowed: at least 1");
    conv.bias_C = checked<const T>(bias, "bias", {conv.size_C});
    conv.window = checked<const T>(window, "state", {conv.size_B, conv.size_C, conv.size_K - 1});
    conv.segment = checked_optional<const int64_t>(segment, "segment", {conv.size_B, conv.size_T});
    conv.activate = activate;
    return conv;
}

template <typename T, typename F>
void conv_tasks(const Conv<T>& conv, int threads, F function) {
    const int64_t blocks = (conv.size_C + kChannels - 1) / kChannels;
    const int64_t need = functions<T>().conv_scratch(conv);
    parallel_for(conv.size_B * blocks, threads, [&](int64_t task) {
        const int64_t begin = task % blocks * kChannels;
        const int64_t end = begin + kChannels < conv.size_C ? begin + kChannels : conv.size_C;
        function(conv, task / blocks, begin, end, thread_scratch<T>(need));
    });
}

void conv_forward(AnyArray x, AnyArray weight, AnyArray bias, AnyArray window, MaybeArray segment, bool activate,
                  AnyArray y, AnyArray last, int threads) {
    by_dtype(x, "x", [&]<typename T>() {
        Conv<T> conv = conv_inputs<T>(x, weight, bias, window, segment, activate);
        conv.y = checked_rows<T>(y, "y", conv.size_B, conv.size_T, conv.size_C);
        conv.last = checked<T>(last, "last", {conv.size_B, conv.size_C, conv.size_K - 1});
        nb::gil_scoped_release release;
        conv_tasks(conv, threads, functions<T>().conv_forward);
    });
}

void conv_backward(AnyArray x, AnyArray weight, AnyArray bias, AnyArray window, MaybeArray segment, bool activate,
                   AnyArray dy, MaybeArray dlast, AnyArray dx, AnyArray dweight, AnyArray dbias, MaybeArray dwindow,
                   int threads) {
    by_dtype(x, "x", [&]<typename T>() {
        Conv<T> conv = conv_inputs<T>(x, weight, bias, window, segment, activate);
        const int64_t C = conv.size_C, K = conv.size_K;
        conv.dy = checked_rows<const T>(dy, "dy", conv.size_B, conv.size_T, C);
        conv.dlast = checked_optional<const T>(dlast, "dlast", {conv.size_B, C, K - 1});
        conv.dx = checked_rows<T>(dx, "dx", conv.size_B, conv.size_T, C);
        conv.dwindow = checked_optional<T>(dwindow, "dwindow", {conv.size_B, C, K - 1});
        T* dweight_CK = checked<T>(dweight, "dweight", {C, K});
        T* dbias_C = checked<T>(dbias, "dbias", {C});
        nb::gil_scoped_release release;
        Buffer<T> parameters(conv.size_B * (K + 1) * C);
        conv.dparameters = parameters.data();
        conv_tasks(conv, threads, functions<T>().conv_backward);
        T* total = parameters.data();
        for (int64_t b = 1; b < conv.size_B; ++b) {
            const T* part = total + b * (K + 1) * C;
            for (int64_t i = 0; i < (K + 1) * C; ++i) total[i] += part[i];
        }
        for (int64_t c = 0; c < C; ++c) {
            for (int64_t k = 0; k < K; ++k) dweight_CK[c * K + k] = total[k * C + c];
            dbias_C[c] = total[K * C + c];
        }
    });
}

template <typename T>
Norm<T> norm_inputs(const AnyArray& y, const AnyArray& weight, double eps) {
    Norm<T> norm;
    norm.size_E = y.ndim() == 3 ? y.shape(2) : 0;
    if (norm.size_E < 1) throw std::invalid_argument("y: wrong shape; allowed: (B, T, E) with E ≥ 1");
    norm.eps = static_cast<T>(eps);
    norm.weight_E = checked<const T>(weight, "weight", {norm.size_E});
    return norm;
}

template <typename T>
Rows<const T> optional_rows(const MaybeArray& array, const char* name, const AnyArray& like) {
    if (!array.has_value()) return {};
    return checked_rows<const T>(*array, name, like.shape(0), like.shape(1), like.shape(2));
}

void norm_forward(AnyArray y, MaybeArray z, AnyArray weight, double eps, AnyArray out, int threads) {
    by_dtype(y, "y", [&]<typename T>() {
        const Norm<T> norm = norm_inputs<T>(y, weight, eps);
        const int64_t batch = y.shape(0), length = y.shape(1);
        const Rows<const T> in = checked_rows<const T>(y, "y", batch, length, norm.size_E);
        const Rows<const T> gate = optional_rows<T>(z, "z", y);
        const Rows<T> to = checked_rows<T>(out, "out", batch, length, norm.size_E);
        nb::gil_scoped_release release;
        const int64_t rows = batch * length, tasks = (rows + kNormRows - 1) / kNormRows;
        parallel_for(tasks, threads, [&](int64_t task) {
            for (int64_t row = task * kNormRows; row < rows && row < (task + 1) * kNormRows; ++row) {
                const int64_t b = row / length, t = row % length;
                functions<T>().norm_forward(norm, in.data + b * in.batch + t * in.row,
                                            gate.data ? gate.data + b * gate.batch + t * gate.row : nullptr,
                                            to.data + b * to.batch + t * to.row);
            }
        });
    });
}

void norm_backward(AnyArray y, MaybeArray z, AnyArray weight, double eps, AnyArray dout, AnyArray dy, MaybeArray dz,
                   AnyArray dweight, int threads) {
    by_dtype(y, "y", [&]<typename T>() {
        const Norm<T> norm = norm_inputs<T>(y, weight, eps);
        const int64_t batch = y.shape(0), length = y.shape(1), E = norm.size_E;
        const Rows<const T> in = checked_rows<const T>(y, "y", batch, length, E);
        const Rows<const T> gate = optional_rows<T>(z, "z", y);
        const Rows<const T> grad = checked_rows<const T>(dout, "dout", batch, length, E);
        const Rows<T> to = checked_rows<T>(dy, "dy", batch, length, E);
        if (dz.has_value() != z.has_value()) throw std::invalid_argument("dz; allowed: given where z is, else None");
        const Rows<T> to_gate = dz.has_value() ? checked_rows<T>(*dz, "dz", batch, length, E) : Rows<T>{};
        T* total = checked<T>(dweight, "dweight", {E});
        nb::gil_scoped_release release;
        const int64_t rows = batch * length, tasks = (rows + kNormRows - 1) / kNormRows;
        Buffer<T> parts(tasks * E);
        parallel_for(tasks, threads, [&](int64_t task) {
            T* part = parts.data() + task * E;
            for (int64_t i = 0; i < E; ++i) part[i] = 0;
            for (int64_t row = task * kNormRows; row < rows && row < (task + 1) * kNormRows; ++row) {
                const int64_t b = row / length, t = row % length;
                functions<T>().norm_backward(norm, in.data + b * in.batch + t * in.row,
                                             gate.data ? gate.data + b * gate.batch + t * gate.row : nullptr,
                                             grad.data + b * grad.batch + t * grad.row,
                                             to.data + b * to.batch + t * to.row,
                                             to_gate.data ? to_gate.data + b * to_gate.batch + t * to_gate.row : nullptr,
                                             part);
            }
        });
        for (int64_t i = 0; i < E; ++i) total[i] = 0;
        for (int64_t task = 0; task < tasks; ++task) {
            for (int64_t i = 0; i < E; ++i) total[i] += parts.data()[task * E + i];
        }
    });
}

}  // namespace

void bind_mixer(nb::module_& m) {
    m.def("conv_forward", &conv_forward, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("state"),
          nb::arg("segment").none(), nb::arg("activate"), nb::arg("y"), nb::arg("last"), nb::arg("threads") = 0);
    m.def("conv_backward", &conv_backward, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("state"),
          nb::arg("segment").none(), nb::arg("activate"), nb::arg("dy"), nb::arg("dlast").none(), nb::arg("dx"),
          nb::arg("dweight"), nb::arg("dbias"), nb::arg("dwindow").none(), nb::arg("threads") = 0);
    m.def("norm_forward", &norm_forward, nb::arg("y"), nb::arg("z").none(), nb::arg("weight"), nb::arg("eps"),
          nb::arg("out"), nb::arg("threads") = 0);
    m.def("norm_backward", &norm_backward, nb::arg("y"), nb::arg("z").none(), nb::arg("weight"), nb::arg("eps"),
          nb::arg("dout"), nb::arg("dy"), nb::arg("dz").none(), nb::arg("dweight"), nb::arg("threads") = 0);
}

}  // namespace crsm
