// Projection by the backbone itself: the same as `project` in crsm/reasoning.py with ExactDynamics, up to rounding; equal
// scores by parent, then by token.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "branches.hpp"

namespace crsm::exact {

// F futures, those of a request neighbouring, the likeliest first.
struct Future {
    std::shared_ptr<const Branches> branches;
    std::vector<int64_t> node_F;      // where each future has come to
    std::vector<int64_t> assumed_FT;  // [F, lag]
};

// known_B: tokens below V that the snapshots have not consumed; lag ≥ 0, hypotheses ≥ 1.
Future project(const Decoder& decoder, const Snapshots& snapshots, const int64_t* known_B, int64_t lag,
               int64_t hypotheses, int threads);

// The `keep` likeliest tokens of every row and their log-probabilities; equal ones by token. NaN where logits are not
// finite.
void likeliest(const float* logits_RV, int64_t rows, int64_t vocab_V, int64_t keep, int64_t* tokens_RA,
               float* log_probs_RA);

}  // namespace crsm::exact
