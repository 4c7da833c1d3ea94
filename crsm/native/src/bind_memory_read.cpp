#include "arrays.hpp"
#include "bindings.hpp"
#include "memory_read.hpp"
#include "threads.hpp"

namespace crsm {
namespace {

constexpr int64_t kWorthAThread = 1 << 18;  // elements of memory

template <typename T>
void run(const MemoryRead<T>& kernel, bool backward, AnyArray memory, AnyArray input, AnyArray output, int threads) {
    const T* m = checked<const T>(memory, "memory", {-1, -1, -1});
    const int64_t count = memory.shape(0), width = memory.shape(1), state = memory.shape(2);
    const T* in = checked<const T>(input, backward ? "dread" : "query", {count, backward ? width : state});
    T* out = checked<T>(output, backward ? "dquery" : "read", {count, backward ? state : width});
    nb::gil_scoped_release release;
    const int64_t all = threads > 0 ? threads : num_threads();
    const int64_t share = count * width * state / kWorthAThread < all ? count * width * state / kWorthAThread : all;
    const int64_t tasks = share > 1 ? (count < 4 * share ? count : 4 * share) : 1;
    parallel_for(tasks, static_cast<int>(share > 1 ? share : 1), [&](int64_t task) {
        const int64_t begin = count * task / tasks, end = count * (task + 1) / tasks;
        (backward ? kernel.backward : kernel.forward)(m, in, out, begin, end - begin, width, state);
    });
}

void memory_read(AnyArray memory, AnyArray input, AnyArray output, bool backward, int threads) {
    if (memory.dtype() == nb::dtype<double>()) {
        run(memory_read_table().f64, backward, memory, input, output, threads);
    } else {
        run(memory_read_table().f32, backward, memory, input, output, threads);
    }
}

}  // namespace

void bind_memory_read(nb::module_& m) {
    m.def(
        "memory_read", [](AnyArray memory, AnyArray query, AnyArray read, int threads) {
            memory_read(memory, query, read, false, threads);
        },
        nb::arg("memory"), nb::arg("query"), nb::arg("read"), nb::arg("threads") = 0,
        "read[i, e] = memory[i, e, :] · query[i, :].");
    m.def(
        "memory_read_backward", [](AnyArray memory, AnyArray dread, AnyArray dquery, int threads) {
            memory_read(memory, dread, dquery, true, threads);
        },
        nb::arg("memory"), nb::arg("dread"), nb::arg("dquery"), nb::arg("threads") = 0,
        "The query's gradient of memory_read.");
}

}  // namespace crsm
