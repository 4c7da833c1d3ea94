#include "arrays.hpp"
#include "bindings.hpp"
#include "injection.hpp"
#include "threads.hpp"

namespace crsm {
namespace {

constexpr int64_t kWorthAThread = 1 << 17;  // elements of state

template <typename T>
InjectionArrays<T> arrays_of(const AnyArray& ssm, const AnyArray& u, const AnyArray& b, const AnyArray& alpha,
                             double largest) {
    InjectionArrays<T> a{};
    a.ssm_BHPN = checked<const T>(ssm, "ssm", {-1, -1, -1, -1});
    const int64_t rows = ssm.shape(0);
    a.heads_H = ssm.shape(1);
    a.width_P = ssm.shape(2);
    a.state_N = ssm.shape(3);
    a.u_BRE = checked<const T>(u, "u", {rows, -1, a.heads_H * a.width_P});
    a.rank_R = u.shape(1);
    a.b_BRN = checked<const T>(b, "b", {rows, a.rank_R, a.state_N});
    a.alpha_B = checked<const T>(alpha, "alpha", {rows});
    a.largest = static_cast<T>(largest);
    return a;
}

template <typename F>
void over_rows(int64_t rows, int64_t elements, int threads, F&& body) {
    const int64_t all = threads > 0 ? threads : num_threads();
    const int64_t share = rows * elements / kWorthAThread < all ? rows * elements / kWorthAThread : all;
    parallel_for(rows, static_cast<int>(share > 1 ? share : 1), [&](int64_t row) { body(row); });
}

template <typename T>
void forward(const Injection<T>& kernel, AnyArray ssm, AnyArray u, AnyArray b, AnyArray alpha, double largest,
             AnyArray out, int threads) {
    const InjectionArrays<T> a = arrays_of<T>(ssm, u, b, alpha, largest);
    const int64_t rows = ssm.shape(0);
    T* to = checked<T>(out, "out", {rows, a.heads_H, a.width_P, a.state_N});
    nb::gil_scoped_release release;
    over_rows(rows, a.heads_H * a.width_P * a.state_N, threads, [&](int64_t row) { kernel.forward(a, row, to); });
}

template <typename T>
void backward(const Injection<T>& kernel, AnyArray ssm, AnyArray u, AnyArray b, AnyArray alpha, double largest,
              AnyArray dout, AnyArray du, AnyArray db, int threads) {
    const InjectionArrays<T> a = arrays_of<T>(ssm, u, b, alpha, largest);
    const int64_t rows = ssm.shape(0);
    const T* from = checked<const T>(dout, "dout", {rows, a.heads_H, a.width_P, a.state_N});
    T* to_u = checked<T>(du, "du", {rows, a.rank_R, a.heads_H * a.width_P});
    T* to_b = checked<T>(db, "db", {rows, a.rank_R, a.state_N});
    nb::gil_scoped_release release;
    over_rows(rows, a.heads_H * a.width_P * a.state_N, threads,
              [&](int64_t row) { kernel.backward(a, row, from, to_u, to_b); });
}

}  // namespace

void bind_injection(nb::module_& m) {
    m.def(
        "inject",
        [](AnyArray ssm, AnyArray u, AnyArray b, AnyArray alpha, double largest, AnyArray out, int threads) {
            if (ssm.dtype() == nb::dtype<double>()) {
                forward(injection_table().f64, ssm, u, b, alpha, largest, out, threads);
            } else {
                forward(injection_table().f32, ssm, u, b, alpha, largest, out, threads);
            }
        },
        nb::arg("ssm"), nb::arg("u"), nb::arg("b"), nb::arg("alpha"), nb::arg("largest"), nb::arg("out"),
        nb::arg("threads") = 0);
    m.def(
        "inject_backward",
        [](AnyArray ssm, AnyArray u, AnyArray b, AnyArray alpha, double largest, AnyArray dout, AnyArray du, AnyArray db,
           int threads) {
            if (ssm.dtype() == nb::dtype<double>()) {
                backward(injection_table().f64, ssm, u, b, alpha, largest, dout, du, db, threads);
            } else {
                backward(injection_table().f32, ssm, u, b, alpha, largest, dout, du, db, threads);
            }
        },
        nb::arg("ssm"), nb::arg("u"), nb::arg("b"), nb::arg("alpha"), nb::arg("largest"), nb::arg("dout"),
        nb::arg("du"), nb::arg("db"), nb::arg("threads") = 0);
}

}  // namespace crsm
