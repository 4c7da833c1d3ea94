#include "isa.hpp"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace crsm {
namespace {

Isa best_isa() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        return Isa::avx512;
    }
    if (avx2) return Isa::avx2;
#endif
    return Isa::portable;
}

Isa chosen_isa() {
    const Isa best = best_isa();
    const char* wanted = std::getenv("CRSM_NATIVE_ISA");
    if (wanted == nullptr) return best;
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (std::strcmp(wanted, isa_name(isa)) == 0 && isa <= best) return isa;
    }
    return best;
}

}  // namespace

Isa active_isa() {
    static const Isa isa = chosen_isa();
    return isa;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::portable: break;
    }
    return "portable";
}

}  // namespace crsm
