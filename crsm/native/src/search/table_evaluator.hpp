// A finite decision process in the place of a network, for tests and measurements: tokens are the actions 0 … A-1, a
// latent is the number of a state, Z states.
#pragma once

#include <vector>

#include "search/evaluator.hpp"

namespace crsm::search {

class TableEvaluator final : public Evaluator {
public:
    // Throws std::invalid_argument if a state lies outside of [0, Z).
    TableEvaluator(std::vector<int64_t> roots_B, std::vector<int64_t> next_state_ZA, std::vector<float> prior_logits_ZA,
                   std::vector<float> values_ZL, int64_t num_actions, int64_t num_layers);

    int64_t num_trees() const override { return int64_t(roots_B_.size()); }
    int64_t num_actions() const override { return actions_; }
    int64_t num_layers() const override { return layers_; }
    void reserve(int64_t slots) override;
    void root(const EvaluationRows& out) override;
    void expand(const Leaf* leaves, int64_t count, const EvaluationRows& out) override;
    void remap(const int64_t* new_from_old_BS, int64_t old_slots, int64_t slots) override;
    int64_t bytes_per_tree(int64_t slots) const override { return slots * int64_t(sizeof(int64_t)); }

private:
    void evaluate(int64_t state, int64_t row, const EvaluationRows& out) const;

    std::vector<int64_t> roots_B_, next_state_ZA_;
    std::vector<float> prior_logits_ZA_, values_ZL_;
    int64_t actions_, layers_;
    int64_t slots_ = 0;
    std::vector<int64_t> states_BS_;
};

}  // namespace crsm::search
