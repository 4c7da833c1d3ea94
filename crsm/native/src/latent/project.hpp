// Projection: the world model rolled over the known token and then over its own most likely predictions. The same as
// `project` in crsm/reasoning.py, which is the definition, up to rounding; equal scores by parent, then by token.
#pragma once

#include <cstdint>
#include <vector>

#include "weights.hpp"

namespace crsm::latent {

// F = B · width futures, those of a request neighbouring, the likeliest first.
struct Future {
    Buffer<float> latent_FG;
    Buffer<float> hidden_FLD;
    std::vector<int64_t> memory_F;   // snapshot that each future reads
    std::vector<int64_t> assumed_FT; // [F, lag]
};

// hidden_BLD: residual streams of the snapshots; known_B: tokens below V that they have not consumed; lag ≥ 0,
// hypotheses ≥ 1.
Future project(const Weights& weights, const Memory& memory, const float* hidden_BLD, const int64_t* known_B,
               int64_t lag, int64_t hypotheses, int threads);

}  // namespace crsm::latent
