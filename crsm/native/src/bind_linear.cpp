// Dense layers for training: products of activations with weights, and the two products of their gradients.
#include "arrays.hpp"
#include "bindings.hpp"
#include "gemm.hpp"

namespace crsm {
namespace {

// y[M, N] = x[M, K] · weight[N, K]ᵀ
void linear(AnyArray x, AnyArray weight, AnyArray y, int threads) {
    const float* w = checked<const float>(weight, "weight", {-1, -1});
    const int64_t columns = weight.shape(0), depth = weight.shape(1);
    const float* in = checked<const float>(x, "x", {-1, depth});
    const int64_t rows = x.shape(0);
    float* out = checked<float>(y, "y", {rows, columns});
    nb::gil_scoped_release release;
    Buffer<float> panels(packed_floats(depth, columns));
    const PackedMatrix packed = pack(w, 1, depth, depth, columns, panels.data(), threads);
    gemm(packed, rows, in, depth, 1, out, columns, nullptr, false, threads);
}

// dx[M, K] = dy[M, N] · weight[N, K]
void linear_input_grad(AnyArray dy, AnyArray weight, AnyArray dx, int threads) {
    const float* w = checked<const float>(weight, "weight", {-1, -1});
    const int64_t columns = weight.shape(0), depth = weight.shape(1);
    const float* in = checked<const float>(dy, "dy", {-1, columns});
    const int64_t rows = dy.shape(0);
    float* out = checked<float>(dx, "dx", {rows, depth});
    nb::gil_scoped_release release;
    Buffer<float> panels(packed_floats(columns, depth));
    const PackedMatrix packed = pack(w, depth, 1, columns, depth, panels.data(), threads);
    gemm(packed, rows, in, columns, 1, out, depth, nullptr, false, threads);
}

// dweight[N, K] = dy[M, N]ᵀ · x[M, K]
void linear_weight_grad(AnyArray dy, AnyArray x, AnyArray dweight, int threads) {
    const float* in = checked<const float>(x, "x", {-1, -1});
    const int64_t rows = x.shape(0), depth = x.shape(1);
    const float* grad = checked<const float>(dy, "dy", {rows, -1});
    const int64_t columns = dy.shape(1);
    float* out = checked<float>(dweight, "dweight", {columns, depth});
    nb::gil_scoped_release release;
    Buffer<float> panels(packed_floats(rows, depth));
    const PackedMatrix packed = pack(in, depth, 1, rows, depth, panels.data(), threads);
    gemm(packed, columns, grad, 1, columns, out, depth, nullptr, false, threads);
}

}  // namespace

void bind_linear(nb::module_& m) {
    m.def("linear", &linear, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("threads") = 0);
    m.def("linear_input_grad", &linear_input_grad, nb::arg("dy"), nb::arg("weight"), nb::arg("dx"),
          nb::arg("threads") = 0);
    m.def("linear_weight_grad", &linear_weight_grad, nb::arg("dy"), nb::arg("x"), nb::arg("dweight"),
          nb::arg("threads") = 0);
}

}  // namespace crsm
