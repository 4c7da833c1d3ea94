// The backbone as a world model, as Python holds it; made by a decoder, which outlives it (it keeps the embedding).
#pragma once

#include <nanobind/stl/vector.h>

#include <memory>
#include <vector>

#include "arrays.hpp"
#include "exact/evaluator.hpp"

namespace crsm {

// Futures, with the arrays that they read.
struct BoundFuture {
    exact::Future future;
    AnyArray memory;
};

class BoundExact {
public:
    BoundExact(std::shared_ptr<Decoder> decoder, AnyArray critic_LD, AnyArray bias_L);

    BoundFuture project(AnyArray memory_BLHPN, AnyArray conv_BLCK, AnyArray hidden_BLD, AnyArray known_B, int64_t lag,
                        int64_t hypotheses, int threads) const;
    std::shared_ptr<exact::ExactEvaluator> evaluator(const BoundFuture& future, std::vector<int64_t> terminal_tokens,
                                                     int64_t num_actions, int threads) const;

private:
    std::shared_ptr<Decoder> decoder_;
    std::shared_ptr<const exact::Critics> critics_;
};

}  // namespace crsm
