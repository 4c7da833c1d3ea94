#include "evaluator.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace crsm::exact {
namespace {

// Rows between two looks at whether the search has been cancelled.
constexpr int64_t kRows = 96;

}  // namespace

ExactEvaluator::ExactEvaluator(const Future& future, std::shared_ptr<const Critics> critics,
                               const std::vector<int64_t>& terminal_tokens, int64_t num_actions, int threads)
    : branches_(*future.branches),
      root_F_(future.node_F),
      critics_(std::move(critics)),
      actions_A_(std::min(num_actions, branches_.sizes().vocab_size)),
      first_(branches_.size()),
      threads_(threads),
      terminal_V_(search::marked(terminal_tokens, branches_.sizes().vocab_size)),
      normed_D_(static_cast<size_t>(branches_.sizes().d_model)) {
    if (num_actions < 1) {
        throw std::invalid_argument("exact evaluator: num_actions = " + std::to_string(num_actions) +
                                    "; allowed: at least 1");
    }
}

void ExactEvaluator::reserve(int64_t slots) {
    if (slots < 1) throw std::invalid_argument("exact evaluator: slots = " + std::to_string(slots) + "; allowed: at least 1");
    if (slots <= slots_) return;
    values_FSL_ = Buffer<float>(num_trees() * slots * num_layers());
    branches_.resize(first_ + num_trees() * (slots - 1));
    slots_ = slots;
}

void ExactEvaluator::judge(int64_t node, float* values_L) {
    const DecodeSizes& s = branches_.sizes();
    const latent::HeadWeights weights{s.n_layer,
                                      s.d_model,
                                      branches_.head().fusion_L,
                                      critics_->weight_LD.data(),
                                      critics_->bias_L.data(),
                                      branches_.head().norm_D,
                                      s.norm_eps,
                                      latent::kCriticEps};
    latent_kernels().heads(weights, branches_.hidden(node), values_L, normed_D_.data());
}

void ExactEvaluator::root(const search::EvaluationRows& out) {
    if (slots_ < 1) throw std::invalid_argument("exact evaluator: slots = 0; allowed: reserve() before root()");
    const int64_t vocab = branches_.sizes().vocab_size, L = num_layers();
    logits_RV_.resize(static_cast<size_t>(num_trees() * vocab));
    branches_.logits(num_trees(), root_F_.data(), logits_RV_.data(), threads_);
    likeliest(logits_RV_.data(), num_trees(), vocab, actions_A_, out.actions_RA, out.prior_logits_RA);
    for (int64_t tree = 0; tree < num_trees(); ++tree) {
        judge(node(tree, 0), values(tree, 0));
        std::memcpy(out.values_RL + tree * L, values(tree, 0), static_cast<size_t>(L) * sizeof(float));
    }
}

void ExactEvaluator::expand(const search::Leaf* leaves, int64_t count, const search::EvaluationRows& out) {
    const int64_t vocab = branches_.sizes().vocab_size, L = num_layers();
    for (int64_t row = 0; row < count; ++row) {
        search::check_leaf("exact evaluator", leaves[row], num_trees(), slots_, vocab);
        if (leaves[row].parent >= leaves[row].node) {  // a branch must lead back to its snapshot
            throw std::invalid_argument("exact evaluator: parent = " + std::to_string(leaves[row].parent) + ", node = " +
                                        std::to_string(leaves[row].node) + "; allowed: a parent below its node");
        }
    }
    logits_RV_.resize(static_cast<size_t>(std::min(kRows, count) * vocab));
    for (int64_t begin = 0; begin < count && !cancelled(); begin += kRows) {
        const int64_t rows = std::min(kRows, count - begin);
        from_R_.clear();
        token_R_.clear();
        to_R_.clear();
        for (const search::Leaf* leaf = leaves + begin; leaf < leaves + begin + rows; ++leaf) {
            from_R_.push_back(node(leaf->tree, leaf->parent));
            token_R_.push_back(leaf->token);
            to_R_.push_back(node(leaf->tree, leaf->node));
        }
        branches_.step(rows, from_R_.data(), token_R_.data(), to_R_.data(), logits_RV_.data(), threads_);
        likeliest(logits_RV_.data(), rows, vocab, actions_A_, out.actions_RA + begin * actions_A_,
                  out.prior_logits_RA + begin * actions_A_);
        for (int64_t row = 0; row < rows; ++row) {
            const search::Leaf& leaf = leaves[begin + row];
            float* mine = values(leaf.tree, leaf.node);
            if (terminal_V_[static_cast<size_t>(leaf.token)]) {
                std::memcpy(mine, values(leaf.tree, leaf.parent), static_cast<size_t>(L) * sizeof(float));
            } else {
                judge(to_R_[static_cast<size_t>(row)], mine);
            }
            std::memcpy(out.values_RL + (begin + row) * L, mine, static_cast<size_t>(L) * sizeof(float));
        }
    }
}

int64_t ExactEvaluator::bytes_per_tree(int64_t slots) const {
    return slots * (branches_.bytes_per_node() + num_layers() * static_cast<int64_t>(sizeof(float)));
}

}  // namespace crsm::exact
