// A write into one layer of one sequence, and the withdrawal of the one before it, in place (crsm/steering.py says what
// happens when, crsm/injection.py has the formulas).
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace crsm {

struct LayerSteering {
    float* ssm_HPN = nullptr;
    float* delta_HPN = nullptr;  // worked in, whatever else is asked for
    int64_t heads_H = 0, width_P = 0, state_N = 0, rank_R = 0;
    bool withdraw = false;             // delta is in force: it is taken out
    float alpha = 0;                   // then u ⊗ b is written, unless this is 0
    const float* u_RE = nullptr;
    const float* b_RN = nullptr;
    const float* carried_H = nullptr;  // factors of the write by which it is carried to now
    float largest = 0;                 // entries of the write are cut to ± this
};

struct SteerTable {
    // If it wrote, delta is then the difference that the write made; else it is undefined. No head's norm grows.
    void (*layer)(const LayerSteering&);
};
CRSM_DECLARE_TABLE(SteerTable, steer_table)

}  // namespace crsm
