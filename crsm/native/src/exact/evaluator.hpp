// The search's evaluator by the backbone itself: NetworkEvaluator in crsm/reasoning.py with ExactDynamics, which is the
// definition; results differ by rounding.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../arrays.hpp"
#include "../latent/kernels.hpp"
#include "../search/evaluator.hpp"
#include "project.hpp"

namespace crsm::exact {

// What the critics read a residual stream with; copied from [L, D] and [L].
struct Critics {
    Critics(const float* critic_LD, const float* bias_L, int64_t layers_L, int64_t d_model_D)
        : weight_LD(critic_LD, critic_LD + layers_L * d_model_D), bias_L(bias_L, bias_L + layers_L) {}
    std::vector<float> weight_LD, bias_L;
};

// A terminal token takes over the value of the position that it ends. For one caller at a time.
class ExactEvaluator final : public search::Evaluator {
public:
    // Throws std::invalid_argument if `num_actions` is below 1.
    ExactEvaluator(const Future& future, std::shared_ptr<const Critics> critics,
                   const std::vector<int64_t>& terminal_tokens, int64_t num_actions, int threads);

    int64_t num_trees() const override { return static_cast<int64_t>(root_F_.size()); }
    int64_t num_actions() const override { return actions_A_; }
    int64_t num_layers() const override { return branches_.sizes().n_layer; }
    void reserve(int64_t slots) override;
    void root(const search::EvaluationRows& out) override;
    void expand(const search::Leaf* leaves, int64_t count, const search::EvaluationRows& out) override;
    int64_t bytes_per_tree(int64_t slots) const override;

private:
    int64_t node(int64_t tree, int64_t slot) const {
        return slot == 0 ? root_F_[static_cast<size_t>(tree)] : first_ + tree * (slots_ - 1) + slot - 1;
    }
    float* values(int64_t tree, int64_t slot) { return values_FSL_.data() + (tree * slots_ + slot) * num_layers(); }
    // Values of all layers after a node.
    void judge(int64_t node, float* values_L);

    Branches branches_;
    std::vector<int64_t> root_F_;
    std::shared_ptr<const Critics> critics_;
    int64_t actions_A_, first_, slots_ = 0;
    int threads_;
    std::vector<uint8_t> terminal_V_;
    Buffer<float> values_FSL_;
    std::vector<float> logits_RV_, normed_D_;
    std::vector<int64_t> from_R_, token_R_, to_R_;
};

}  // namespace crsm::exact
