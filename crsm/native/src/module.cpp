// The extension module `_crsm_native`: one bind_* function per concept.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "arrays.hpp"
#include "bindings.hpp"
#include "isa.hpp"
#include "threads.hpp"

namespace nb = nanobind;

NB_MODULE(_crsm_native, m) {
    // A daemon thread may hold an object when the interpreter ends, and there is nobody left to free it.
    nb::set_leak_warnings(false);
    m.doc() = "Native core of CRSM: search, Mamba-2 kernels and decoding on CPU. Use it through crsm.native.";
    m.attr("__version__") = CRSM_VERSION;
    // The number in crsm/native/__init__.py.
    m.attr("INTERFACE") = 4;
    m.def("isa", [] { return std::string(crsm::isa_name(crsm::active_isa())); },
          "The instruction set in use: portable, avx2 or avx512.");
    m.def("num_threads", &crsm::num_threads, "Threads that a call may use.");
    m.def("set_num_threads", &crsm::set_num_threads, nb::arg("count"),
          "Bounds the threads of every call. Raises ValueError unless count ≥ 1.");
    crsm::bind_decode(m);
    crsm::bind_injection(m);
    crsm::bind_linear(m);
    crsm::bind_search(m);  // has the base class of what the next two bind
    crsm::bind_exact(m);
    crsm::bind_latent(m);
    crsm::bind_memory_read(m);
    crsm::bind_mixer(m);
    crsm::bind_scan(m);
    crsm::bind_slots(m);
    crsm::bind_watch(m);
}
