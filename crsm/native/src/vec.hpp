// Vectors of the instruction set at hand, by the compiler's vector extensions: arithmetic is written with operators, and
// `a * b + c` becomes a fused multiply-add. Only for sources that are compiled per instruction set (isa.hpp).
#pragma once

#include <stdint.h>

namespace crsm::CRSM_ISA {

#if defined(CRSM_ISA_avx512)
inline constexpr int kVectorBytes = 64;
#elif defined(CRSM_ISA_avx2)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// The widths are spelled out: attributes do not take dependent sizes.
typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef float VecFUnaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef double VecDUnaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
typedef uint16_t VecHalf __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t VecHalfUnaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef int8_t VecByte __attribute__((vector_size(kVectorBytes / 4)));
typedef int8_t VecByteUnaligned __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));

template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
    using type = VecF;
    using unaligned = VecFUnaligned;
};
template <>
struct VecOf<double> {
    using type = VecD;
    using unaligned = VecDUnaligned;
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
static inline Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <typename T>
static inline void store(T* p, Vec<T> v) {
    *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}
template <typename T>
static inline Vec<T> broadcast(T x) {
    return x - Vec<T>{};  // x - 0 is x, -0 too, and no instruction; 0 + x would be one
}

// bfloat16 is the upper half of a float.
// GCC widens integers by way of several shuffles, unless told of the one instruction that does it.
static inline VecF load_bf16(const uint16_t* p) {
#if defined(CRSM_ISA_avx512) && !defined(__clang__)
    typedef short Halves __attribute__((vector_size(32), aligned(2), may_alias));
    const Halves halves = *reinterpret_cast<const Halves*>(p);
    return reinterpret_cast<VecF>(__builtin_ia32_pmovzxwd512_mask(halves, VecI{}, 0xffff) << 16);
#elif defined(CRSM_ISA_avx2) && !defined(__clang__)
    typedef short Halves __attribute__((vector_size(16), aligned(2), may_alias));
    const Halves halves = *reinterpret_cast<const Halves*>(p);
    return reinterpret_cast<VecF>(__builtin_ia32_pmovzxwd256(halves) << 16);
#else
    const VecHalf half = *reinterpret_cast<const VecHalfUnaligned*>(p);
    return reinterpret_cast<VecF>(__builtin_convertvector(half, VecU) << 16);
#endif
}
static inline VecF load_int8(const int8_t* p) {
#if defined(CRSM_ISA_avx512) && !defined(__clang__)
    typedef char Bytes __attribute__((vector_size(16), aligned(1), may_alias));
    const Bytes bytes = *reinterpret_cast<const Bytes*>(p);
    return __builtin_convertvector(__builtin_ia32_pmovsxbd512_mask(bytes, VecI{}, 0xffff), VecF);
#elif defined(CRSM_ISA_avx2) && !defined(__clang__)
    typedef char Bytes __attribute__((vector_size(16)));
    int64_t low;
    __builtin_memcpy(&low, p, sizeof low);
    typedef int64_t Words __attribute__((vector_size(16)));
    return __builtin_convertvector(__builtin_ia32_pmovsxbd256(reinterpret_cast<Bytes>(Words{low, 0})), VecF);
#else
    const VecByte byte = *reinterpret_cast<const VecByteUnaligned*>(p);
    return __builtin_convertvector(__builtin_convertvector(byte, VecI), VecF);
#endif
}

// Sum of the lanes, halves first: always the same order for one instruction set.
template <typename T>
static inline T sum_lanes(Vec<T> v) {
    Vec<T> other = v;  // every lane is overwritten
#pragma GCC unroll 8
    for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<T>; ++i) other[i] = v[i ^ half];
        v += other;
    }
    return v[0];
}

// Sums of the lanes of four vectors at once: half the shuffles of four separate sums.
template <typename T>
static inline void sum_lanes4(const Vec<T> (&v)[4], T* sums) {
    constexpr int lanes = kLanes<T>;
    if constexpr (lanes < 4) {
        for (int r = 0; r < 4; ++r) sums[r] = sum_lanes<T>(v[r]);
        return;
    } else {
        Vec<T> low{}, high{}, pairs[2] = {}, all;
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; ++pair) {  // [v0 | v1]: each in one half
            const Vec<T> a = v[2 * pair], b = v[2 * pair + 1];
#pragma GCC unroll 16
            for (int i = 0; i < lanes / 2; ++i) {
                low[i] = a[i];
                low[i + lanes / 2] = b[i];
                high[i] = a[i + lanes / 2];
                high[i + lanes / 2] = b[i + lanes / 2];
            }
            pairs[pair] = low + high;
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {  // [v0 v1 | v2 v3]: each in one quarter
            const int quarter = lanes / 4, from = (i % (lanes / 2)) / quarter * (lanes / 2) + i % quarter;
            low[i] = pairs[i / (lanes / 2)][from];
            high[i] = pairs[i / (lanes / 2)][from + quarter];
        }
        all = low + high;
#pragma GCC unroll 4
        for (int half = lanes / 8; half > 0; half /= 2) {
            Vec<T> other = all;
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) other[i] = all[i ^ half];
            all += other;
        }
        for (int r = 0; r < 4; ++r) sums[r] = all[r * (lanes / 4)];
    }
}

// exp(x) within 2 units in the last place for floats (Cephes, expf.c); 0 below -87, clamped above 88.
static inline VecF exp(VecF x) {
    const VecF low = broadcast(-87.33654f), high = broadcast(88.37626f);
    const VecI under = x < low;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const VecF shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5·2^23: rounds to the nearest integer
    const VecF k = shifted - 12582912.0f;
    VecF r = x - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    VecF p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const VecF mantissa = p * (r * r) + r + 1.0f;
    const VecI power = (__builtin_convertvector(k, VecI) + 127) << 23;
    const VecF result = mantissa * reinterpret_cast<VecF>(power);
    return under ? VecF{} : result;
}
static inline float exp(float x) { return exp(broadcast(x))[0]; }

static inline VecD exp(VecD x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
    return x;
}
static inline double exp(double x) { return __builtin_exp(x); }

template <typename V>
static inline V sigmoid(V x) {
    return 1 / (1 + exp(-x));
}
template <typename V>
static inline V silu(V x) {
    return x / (1 + exp(-x));
}

}  // namespace crsm::CRSM_ISA
