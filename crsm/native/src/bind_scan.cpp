// The chunked scan for training: how it is cut into tasks, and its sums over tasks.
#include "bindings.hpp"
#include "scan.hpp"
#include "scratch.hpp"
#include "threads.hpp"
#include "views.hpp"

namespace crsm {
namespace {

// A longer chunk costs more inside of it than the states between shorter ones.
constexpr int64_t kLongestChunk = 64;
// Tasks to aim at: enough to share among the threads of a large machine, few enough that heads share their scores.
constexpr int64_t kTasks = 16;

template <typename T>
const ScanFunctions<T>& functions() {
    if constexpr (std::is_same_v<T, float>) {
        return scan_table().fp32;
    } else {
        return scan_table().fp64;
    }
}

// Chunks of nearly equal length. Depends on the sizes only.
void cut(int64_t length, int64_t chunk_size, int64_t& size_Q, int64_t& chunks_S) {
    if (chunk_size < 1) {
        throw std::invalid_argument("chunk_size = " + std::to_string(chunk_size) + "; allowed: at least 1");
    }
    const int64_t longest = chunk_size < kLongestChunk ? chunk_size : kLongestChunk;
    const int64_t chunks = (length + longest - 1) / longest;
    size_Q = (length + chunks - 1) / chunks;
    chunks_S = (length + size_Q - 1) / size_Q;
}

int64_t count_groups(int64_t batch, int64_t heads) {
    const int64_t wanted = (kTasks + batch - 1) / batch;
    return wanted < heads ? wanted : heads;
}

// Chunks S that a scan over `length` tokens is cut into: the size of `kept`.
int64_t scan_chunks(int64_t length, int64_t chunk_size) {
    if (length < 1) throw std::invalid_argument("length = " + std::to_string(length) + "; allowed: at least 1");
    int64_t size_Q, chunks_S;
    cut(length, chunk_size, size_Q, chunks_S);
    return chunks_S;
}

// What both directions read.
template <typename T>
Scan<T> inputs(const AnyArray& x, const AnyArray& dt, const AnyArray& A, const AnyArray& B, const AnyArray& C,
               const MaybeArray& D, const MaybeArray& dt_bias, const MaybeArray& state, const MaybeArray& segment,
               int64_t chunk_size) {
    Scan<T> scan;
    const int64_t heads = checked<const T>(A, "A_H", {-1}) != nullptr ? A.shape(0) : 0;
    scan.x = checked_rows<const T>(x, "x", -1, -1, -1);
    const int64_t batch = x.shape(0), length = x.shape(1), inner = x.shape(2);
    if (heads < 1 || batch < 1 || length < 1 || inner < 1 || inner % heads != 0) {
        throw std::invalid_argument("x has shape " + shape_text({batch, length, inner}) + "; allowed: (B, T, H·P) of " +
                                    std::to_string(heads) + " heads, none of them 0");
    }
    scan.size_B = batch, scan.size_T = length, scan.size_H = heads, scan.size_P = inner / heads;
    scan.dt = checked_rows<const T>(dt, "dt", batch, length, heads);
    scan.b = checked_rows<const T>(B, "B", batch, length, -1);
    scan.size_N = B.shape(2);
    if (scan.size_N < 1) throw std::invalid_argument("B has d_state 0; allowed: at least 1");
    scan.c = checked_rows<const T>(C, "C", batch, length, scan.size_N);
    scan.A_H = checked<const T>(A, "A_H", {heads});
    scan.D_H = checked_optional<const T>(D, "D_H", {heads});
    scan.dt_bias_H = checked_optional<const T>(dt_bias, "dt_bias_H", {heads});
    scan.state = checked_optional<const T>(state, "state", {batch, heads, scan.size_P, scan.size_N});
    scan.segment = checked_optional<const int64_t>(segment, "segment", {batch, length});
    cut(length, chunk_size, scan.size_Q, scan.chunks_S);
    scan.groups_G = count_groups(batch, heads);
    return scan;
}

void scan_forward(AnyArray x, AnyArray dt, AnyArray A, AnyArray B, AnyArray C, MaybeArray D, MaybeArray dt_bias,
                  MaybeArray state, MaybeArray segment, int64_t chunk_size, AnyArray y, AnyArray last, MaybeArray kept,
                  int threads) {
    by_dtype(x, "x", [&]<typename T>() {
        Scan<T> scan = inputs<T>(x, dt, A, B, C, D, dt_bias, state, segment, chunk_size);
        const int64_t P = scan.size_P, N = scan.size_N;
        scan.y = checked_rows<T>(y, "y", scan.size_B, scan.size_T, scan.size_H * P);
        scan.last = checked<T>(last, "last", {scan.size_B, scan.size_H, P, N});
        scan.kept = checked_optional<T>(kept, "kept", {scan.size_B, scan.size_H, scan.chunks_S, N, P});
        nb::gil_scoped_release release;
        const ScanFunctions<T>& table = functions<T>();
        const int64_t need = table.forward_scratch(scan);
        parallel_for(scan.size_B * scan.groups_G, threads, [&](int64_t task) {
            table.forward(scan, task / scan.groups_G, task % scan.groups_G, thread_scratch<T>(need));
        });
    });
}

void scan_backward(AnyArray x, AnyArray dt, AnyArray A, AnyArray B, AnyArray C, MaybeArray D, MaybeArray dt_bias,
                   MaybeArray state, MaybeArray segment, int64_t chunk_size, MaybeArray kept, AnyArray dy,
                   MaybeArray dlast, AnyArray dx, AnyArray ddt, AnyArray dA, AnyArray dB, AnyArray dC, MaybeArray dD,
                   MaybeArray ddt_bias, MaybeArray dstate, int threads) {
    by_dtype(x, "x", [&]<typename T>() {
        Scan<T> scan = inputs<T>(x, dt, A, B, C, D, dt_bias, state, segment, chunk_size);
        const int64_t batch = scan.size_B, length = scan.size_T, H = scan.size_H, P = scan.size_P, N = scan.size_N;
        const int64_t groups = scan.groups_G;
        scan.dy = checked_rows<const T>(dy, "dy", batch, length, H * P);
        scan.dlast = checked_optional<const T>(dlast, "dlast", {batch, H, P, N});
        scan.kept = checked_optional<T>(kept, "kept", {batch, H, scan.chunks_S, N, P});
        if (scan.kept == nullptr && scan.chunks_S > 1) {
            throw std::invalid_argument("kept = None; allowed: the states of the forward pass, as T > chunk_size");
        }
        scan.dx = checked_rows<T>(dx, "dx", batch, length, H * P);
        scan.ddt = checked_rows<T>(ddt, "ddt", batch, length, H);
        const Rows<T> db = checked_rows<T>(dB, "dB", batch, length, N), dc = checked_rows<T>(dC, "dC", batch, length, N);
        scan.dstate = checked_optional<T>(dstate, "dstate", {batch, H, P, N});
        T* dA_H = checked<T>(dA, "dA", {H});
        T* dD_H = checked_optional<T>(dD, "dD", {H});
        T* dbias_H = checked_optional<T>(ddt_bias, "ddt_bias", {H});
        if ((dD_H != nullptr) != (scan.D_H != nullptr) || (dbias_H != nullptr) != (scan.dt_bias_H != nullptr)) {
            throw std::invalid_argument("dD and ddt_bias; allowed: given where D and dt_bias are, else None");
        }
        nb::gil_scoped_release release;
        Buffer<T> sums(3 * batch * H);
        scan.dA_BH = sums.data();
        scan.dD_BH = dD_H != nullptr ? sums.data() + batch * H : nullptr;
        scan.dbias_BH = dbias_H != nullptr ? sums.data() + 2 * batch * H : nullptr;
        const int64_t plane = batch * length * N;
        Buffer<T> parts(groups > 1 ? 2 * groups * plane : 0);
        if (groups > 1) {
            scan.db = {parts.data(), length * N, N};
            scan.dc = {parts.data() + groups * plane, length * N, N};
            scan.group_stride = plane;
        } else {
            scan.db = db;
            scan.dc = dc;
        }
        const ScanFunctions<T>& table = functions<T>();
        const int64_t need = table.backward_scratch(scan);
        parallel_for(batch * groups, threads, [&](int64_t task) {
            table.backward(scan, task / groups, task % groups, thread_scratch<T>(need));
        });
        if (groups > 1) {
            parallel_for(batch * length, threads, [&](int64_t token) {
                const int64_t b = token / length, t = token % length;
                for (int which = 0; which < 2; ++which) {
                    const Rows<T>& out = which == 0 ? db : dc;
                    const T* part = parts.data() + which * groups * plane + token * N;
                    T* to = out.data + b * out.batch + t * out.row;
                    for (int64_t n = 0; n < N; ++n) to[n] = part[n];
                    for (int64_t group = 1; group < groups; ++group) {
                        for (int64_t n = 0; n < N; ++n) to[n] += part[group * plane + n];
                    }
                }
            });
        }
        for (int which = 0; which < 3; ++which) {
            T* out = which == 0 ? dA_H : which == 1 ? dD_H : dbias_H;
            if (out == nullptr) continue;
            const T* part = sums.data() + which * batch * H;
            for (int64_t h = 0; h < H; ++h) {
                T sum = 0;
                for (int64_t b = 0; b < batch; ++b) sum += part[b * H + h];
                out[h] = sum;
            }
        }
    });
}

}  // namespace

void bind_scan(nb::module_& m) {
    m.def("scan_chunks", &scan_chunks, nb::arg("length"), nb::arg("chunk_size"));
    m.def("scan_forward", &scan_forward, nb::arg("x"), nb::arg("dt"), nb::arg("A"), nb::arg("B"), nb::arg("C"),
          nb::arg("D").none(), nb::arg("dt_bias").none(), nb::arg("state").none(), nb::arg("segment").none(),
          nb::arg("chunk_size"), nb::arg("y"), nb::arg("last"), nb::arg("kept").none(), nb::arg("threads") = 0);
    m.def("scan_backward", &scan_backward, nb::arg("x"), nb::arg("dt"), nb::arg("A"), nb::arg("B"), nb::arg("C"),
          nb::arg("D").none(), nb::arg("dt_bias").none(), nb::arg("state").none(), nb::arg("segment").none(),
          nb::arg("chunk_size"), nb::arg("kept").none(), nb::arg("dy"), nb::arg("dlast").none(), nb::arg("dx"),
          nb::arg("ddt"), nb::arg("dA"), nb::arg("dB"), nb::arg("dC"), nb::arg("dD").none(),
          nb::arg("ddt_bias").none(), nb::arg("dstate").none(), nb::arg("threads") = 0);
}

}  // namespace crsm
