// The search's evaluator by the latent network: see NetworkEvaluator in crsm/reasoning.py, which is the definition.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../search/evaluator.hpp"
#include "network.hpp"

namespace crsm::latent {

// Latents and values of every evaluated node are kept per (tree, slot). A terminal token takes over the value of the
// position that it ends. For one caller at a time; weights and memory are shared with others.
class LatentEvaluator final : public search::Evaluator {
public:
    // Copies the roots: latent_FG and hidden_FLD of F trees, and which snapshot of the memory each of them reads.
    // Throws std::invalid_argument naming the argument, the tree and the layer if something is not finite or not there.
    LatentEvaluator(std::shared_ptr<const Weights> weights, std::shared_ptr<const Memory> memory,
                    const int64_t* memory_F, const float* latent_FG, const float* hidden_FLD, int64_t trees_F,
                    const std::vector<int64_t>& terminal_tokens, int64_t num_actions, int threads);

    int64_t num_trees() const override { return trees_F_; }
    int64_t num_actions() const override { return actions_A_; }
    int64_t num_layers() const override { return weights_->num_layers_L; }
    void reserve(int64_t slots) override;
    void root(const search::EvaluationRows& out) override;
    void expand(const search::Leaf* leaves, int64_t count, const search::EvaluationRows& out) override;
    void remap(const int64_t* new_from_old_BS, int64_t old_slots, int64_t slots) override;
    int64_t bytes_per_tree(int64_t slots) const override;

private:
    float* latent(int64_t tree, int64_t slot) { return latents_FSG_.data() + (tree * slots_ + slot) * weights_->width_G; }
    float* values(int64_t tree, int64_t slot) {
        return values_FSL_.data() + (tree * slots_ + slot) * weights_->num_layers_L;
    }

    std::shared_ptr<const Weights> weights_;
    std::shared_ptr<const Memory> memory_;
    std::vector<int64_t> memory_F_;
    int64_t trees_F_, actions_A_, slots_ = 0;
    Buffer<float> root_latent_FG_, root_hidden_FLD_;
    std::vector<uint8_t> terminal_V_;
    Buffer<float> latents_FSG_, values_FSL_;
    Chunks chunks_;
};

}  // namespace crsm::latent
