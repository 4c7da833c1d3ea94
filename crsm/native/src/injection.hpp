// Gated injection of a low-rank write into states, and its gradients for the write (crsm/injection.py has the formula).
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace crsm {

// A hair inside the ball: the constant of crsm.injection.clip_to_norm.
inline constexpr double kInside = 1.0 - 1.0 / (1 << 20);

// One layer's states and writes, B rows: h [B, H, P, N], u [B, R, H·P], b [B, R, N], alpha [B].
template <typename T>
struct InjectionArrays {
    const T* ssm_BHPN;
    const T* u_BRE;
    const T* b_BRN;
    const T* alpha_B;
    int64_t heads_H, width_P, state_N, rank_R;
    T largest;  // entries of a write are cut to ± this
};

template <typename T>
struct Injection {
    // out [B, H, P, N], row `row`.
    void (*forward)(const InjectionArrays<T>& arrays, int64_t row, T* out_BHPN);
    // du [B, R, H·P] and db [B, R, N] of row `row` from dout [B, H, P, N].
    void (*backward)(const InjectionArrays<T>& arrays, int64_t row, const T* dout_BHPN, T* du_BRE, T* db_BRN);
};

struct InjectionTable {
    Injection<float> f32;
    Injection<double> f64;
};
CRSM_DECLARE_TABLE(InjectionTable, injection_table)

}  // namespace crsm
