// Monte Carlo tree search over a batch of trees: crsm/search/search.py, with several leaves per tree in flight and with
// trees that go on from what an earlier search left.
#pragma once

#include <cstdint>
#include <exception>
#include <vector>

#include "search/evaluator.hpp"
#include "search/rules.hpp"
#include "search/stop.hpp"
#include "search/tree.hpp"

namespace crsm::search {

struct SearchSettings {
    RuleSettings rules;
    Consensus judge;
    double root_prior_mass;
    int64_t max_considered;
    int64_t max_depth;
    const int64_t* budget_B;
    std::vector<int64_t> terminal_tokens;
    // Leaves of one tree that are evaluated together. Each puts `virtual_loss` visits of value 0 on its way until its
    // own value is there, so that the next one goes elsewhere.
    int64_t leaves;
    int32_t virtual_loss;
    // Null for a new tree. Else the block holds trees whose first free slots these are, and the evaluator has the
    // latents where they were before: `new_from_old_BS` says where they go.
    const int64_t* first_slot_B;
    const int64_t* new_from_old_BS;
    int64_t old_slots;
    int threads;
};

// What the evaluator said of a node is no evaluation. `layer` ≥ 0: this value; else these prior logits.
struct BadEvaluation : std::exception {
    int64_t tree = 0;
    int64_t layer = -1;
    float value = 0.0f;
    std::vector<float> logits_A;
    const char* what() const noexcept override { return "evaluator: not an evaluation"; }
};

// Fills the block of memory: tree_bytes(sizes) of zeros but for root_gumbel_BA, or trees to go on with. Throws
// BadEvaluation, and whatever the evaluator or the stop rule throws.
void search(Evaluator& evaluator, const SearchSettings& settings, uint8_t* block, const TreeSizes& sizes,
            StopRule& stop);

}  // namespace crsm::search
