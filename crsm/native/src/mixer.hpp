// The elementwise parts of a Mamba-2 mixer and their gradients: the short convolution with its SiLU, and the norms.
//
// Letters: B batch, T time, C channels, K convolution width, E width of a norm.
#pragma once

#include <cstdint>

#include "isa.hpp"
#include "scan.hpp"

namespace crsm {

template <typename T>
struct Conv {
    int64_t size_B = 0, size_T = 0, size_C = 0, size_K = 0;
    bool activate = true;  // SiLU after it
    Rows<const T> x;
    const T* weight_CK = nullptr;
    const T* bias_C = nullptr;
    const T* window = nullptr;         // (B, C, K-1): inputs before x, oldest first
    const int64_t* segment = nullptr;  // (B, T), ascending; null: one document
    // Forward.
    Rows<T> y;
    T* last = nullptr;  // (B, C, K-1)
    // Backward.
    Rows<const T> dy;
    const T* dlast = nullptr;  // null: zeros
    Rows<T> dx;
    T* dwindow = nullptr;     // may be null
    T* dparameters = nullptr;  // (B, K+1, C): taps, then bias
};

// RMSNorm of y·silu(z), or of y where z is null; rows of width E.
template <typename T>
struct Norm {
    int64_t size_E = 0;
    T eps = 0;
    const T* weight_E = nullptr;
};

template <typename T>
struct MixerFunctions {
    // Elements of scratch memory for the channels [begin, end) of one sequence.
    int64_t (*conv_scratch)(const Conv<T>&);
    void (*conv_forward)(const Conv<T>&, int64_t b, int64_t begin, int64_t end, T* scratch);
    void (*conv_backward)(const Conv<T>&, int64_t b, int64_t begin, int64_t end, T* scratch);
    // One row.
    void (*norm_forward)(const Norm<T>&, const T* y, const T* z, T* out);
    // One row; adds to dweight. dz is null where z is.
    void (*norm_backward)(const Norm<T>&, const T* y, const T* z, const T* dout, T* dy, T* dz, T* dweight_E);
};

struct MixerTable {
    MixerFunctions<float> fp32;
    MixerFunctions<double> fp64;
};
CRSM_DECLARE_TABLE(MixerTable, mixer_table)

}  // namespace crsm
