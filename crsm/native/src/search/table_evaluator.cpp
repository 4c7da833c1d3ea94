#include "search/table_evaluator.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace crsm::search {
namespace {

void check_states(const char* name, const std::vector<int64_t>& states, int64_t count) {
    for (const int64_t state : states) {
        if (state < 0 || state >= count) {
            throw std::invalid_argument(std::string(name) + " holds " + std::to_string(state) + "; allowed: 0 to " +
                                        std::to_string(count - 1));
        }
    }
}

}  // namespace

TableEvaluator::TableEvaluator(std::vector<int64_t> roots_B, std::vector<int64_t> next_state_ZA,
                               std::vector<float> prior_logits_ZA, std::vector<float> values_ZL, int64_t num_actions,
                               int64_t num_layers)
    : roots_B_(std::move(roots_B)), next_state_ZA_(std::move(next_state_ZA)),
      prior_logits_ZA_(std::move(prior_logits_ZA)), values_ZL_(std::move(values_ZL)), actions_(num_actions),
      layers_(num_layers) {
    const int64_t states = int64_t(values_ZL_.size()) / layers_;
    check_states("roots", roots_B_, states);
    check_states("next_state", next_state_ZA_, states);
}

void TableEvaluator::reserve(int64_t slots) {
    slots_ = slots;
    states_BS_.assign(roots_B_.size() * size_t(slots), 0);
}

void TableEvaluator::root(const EvaluationRows& out) {
    for (int64_t b = 0; b < num_trees(); ++b) {
        states_BS_[size_t(b * slots_)] = roots_B_[size_t(b)];
        evaluate(roots_B_[size_t(b)], b, out);
    }
}

void TableEvaluator::expand(const Leaf* leaves, int64_t count, const EvaluationRows& out) {
    for (int64_t i = 0; i < count; ++i) {
        const Leaf& leaf = leaves[i];
        const int64_t parent = states_BS_[size_t(leaf.tree * slots_ + leaf.parent)];
        const int64_t state = next_state_ZA_[size_t(parent * actions_ + leaf.token)];
        states_BS_[size_t(leaf.tree * slots_ + leaf.node)] = state;
        evaluate(state, i, out);
    }
}

void TableEvaluator::remap(const int64_t* new_from_old_BS, int64_t old_slots, int64_t slots) {
    std::vector<int64_t> moved(roots_B_.size() * size_t(slots), 0);
    for (int64_t b = 0; b < num_trees(); ++b) {
        for (int64_t old = 0; old < old_slots && old < slots_; ++old) {
            const int64_t slot = new_from_old_BS[b * old_slots + old];
            if (slot >= 0 && slot < slots) moved[size_t(b * slots + slot)] = states_BS_[size_t(b * slots_ + old)];
        }
    }
    states_BS_ = std::move(moved);
    slots_ = slots;
}

void TableEvaluator::evaluate(int64_t state, int64_t row, const EvaluationRows& out) const {
    for (int64_t a = 0; a < actions_; ++a) out.actions_RA[row * actions_ + a] = a;
    std::copy_n(prior_logits_ZA_.data() + state * actions_, actions_, out.prior_logits_RA + row * actions_);
    std::copy_n(values_ZL_.data() + state * layers_, layers_, out.values_RL + row * layers_);
}

}  // namespace crsm::search
