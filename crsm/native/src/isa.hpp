// Instruction sets: what this processor has, and how code for several of them lives in one module.
//
// A source `x_isa.cpp` is compiled once per instruction set, inside namespace crsm::CRSM_ISA, and exports one constant
// table of function pointers declared in `x.hpp`. Such a source must not instantiate templates or call inline functions
// of the standard library or of headers outside its namespace: the linker keeps one copy of an inline function, and it
// could be the one with AVX-512 in it. Raw pointers, plain loops and the contents of vec.hpp only.
#pragma once

namespace crsm {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

// The best one that this processor has and this build holds; CRSM_NATIVE_ISA in the environment can lower it.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace crsm

// Declares the table of one concept for every instruction set that the build holds, and the choice among them:
//   CRSM_DECLARE_TABLE(GemmTable, gemm_table)  →  const GemmTable& gemm_table()
#if defined(__x86_64__) || defined(_M_X64)
#define CRSM_DECLARE_TABLE(Type, name)                                \
    namespace portable { extern const Type name; }                    \
    namespace avx2 { extern const Type name; }                        \
    namespace avx512 { extern const Type name; }                      \
    static inline const Type& name() {                                \
        static const Isa isa = active_isa();                          \
        return isa == Isa::avx512 ? avx512::name : isa == Isa::avx2 ? avx2::name : portable::name; \
    }
#else
#define CRSM_DECLARE_TABLE(Type, name)             \
    namespace portable { extern const Type name; } \
    static inline const Type& name() { return portable::name; }
#endif
