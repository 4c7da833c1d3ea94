#include "evaluator.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace crsm::latent {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("latent evaluator: " + what); }

size_t bytes(int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); }

Buffer<float> copy(const float* from, int64_t count) {
    Buffer<float> to(count);
    std::memcpy(to.data(), from, bytes(count));
    return to;
}

}  // namespace

LatentEvaluator::LatentEvaluator(std::shared_ptr<const Weights> weights, std::shared_ptr<const Memory> memory,
                                 const int64_t* memory_F, const float* latent_FG, const float* hidden_FLD,
                                 int64_t trees_F, const std::vector<int64_t>& terminal_tokens, int64_t num_actions, int threads)
    : weights_(std::move(weights)),
      memory_(std::move(memory)),
      memory_F_(memory_F, memory_F + trees_F),
      trees_F_(trees_F),
      actions_A_(std::min(num_actions, weights_->vocab_V)),
      terminal_V_(search::marked(terminal_tokens, weights_->vocab_V)),
      chunks_(*weights_, actions_A_, threads) {
    if (num_actions < 1) refuse("num_actions = " + std::to_string(num_actions) + "; allowed: at least 1");
    const int64_t G = weights_->width_G, hidden = weights_->hidden_size(), D = weights_->d_model_D;
    for (int64_t tree = 0; tree < trees_F; ++tree) {
        if (memory_F[tree] < 0 || memory_F[tree] >= memory_->count()) {
            refuse("memory_F[" + std::to_string(tree) + "] = " + std::to_string(memory_F[tree]) + "; allowed: 0 to " +
                   std::to_string(memory_->count() - 1));
        }
        if (latent_kernels().first_non_finite(latent_FG + tree * G, G) < G) {
            refuse("latent_FG: tree " + std::to_string(tree) + " holds NaN or infinity; allowed: finite numbers");
        }
        const int64_t bad = latent_kernels().first_non_finite(hidden_FLD + tree * hidden, hidden);
        if (bad < hidden) {
            refuse("hidden_FLD: tree " + std::to_string(tree) + ", layer " + std::to_string(bad / D) +
                   " holds NaN or infinity; allowed: finite numbers");
        }
    }
    root_latent_FG_ = copy(latent_FG, trees_F * G);
    root_hidden_FLD_ = copy(hidden_FLD, trees_F * hidden);
}

void LatentEvaluator::reserve(int64_t slots) {
    if (slots < 1) refuse("slots = " + std::to_string(slots) + "; allowed: at least 1");
    if (slots <= slots_) return;
    Buffer<float> latents(trees_F_ * slots * weights_->width_G), values(trees_F_ * slots * weights_->num_layers_L);
    latents_FSG_ = std::move(latents);
    values_FSL_ = std::move(values);
    slots_ = slots;
}

void LatentEvaluator::root(const search::EvaluationRows& out) {
    if (slots_ < 1) refuse("slots = 0; allowed: reserve() before root()");
    const Weights& w = *weights_;
    chunks_.run(trees_F_, [&](int64_t begin, int64_t end, Workspace& work, int inner) {
        float* values_RL = out.values_RL + begin * w.num_layers_L;
        heads(w, root_hidden_FLD_.data() + begin * w.hidden_size(), end - begin, values_RL, work);
        policy(w, end - begin, actions_A_, out.actions_RA + begin * actions_A_, out.prior_logits_RA + begin * actions_A_,
               work, inner);
        for (int64_t tree = begin; tree < end; ++tree) {
            std::memcpy(latent(tree, 0), root_latent_FG_.data() + tree * w.width_G, bytes(w.width_G));
            std::memcpy(values(tree, 0), out.values_RL + tree * w.num_layers_L, bytes(w.num_layers_L));
        }
    });
}

void LatentEvaluator::expand(const search::Leaf* leaves, int64_t count, const search::EvaluationRows& out) {
    for (int64_t row = 0; row < count; ++row) {
        search::check_leaf("latent evaluator", leaves[row], trees_F_, slots_, weights_->vocab_V);
    }
    const Weights& w = *weights_;
    const int64_t G = w.width_G, L = w.num_layers_L;
    chunks_.run(count, [&](int64_t begin, int64_t end, Workspace& work, int inner) {
        if (cancelled()) return;
        const int64_t rows = end - begin;
        for (int64_t row = 0; row < rows; ++row) {
            const search::Leaf& leaf = leaves[begin + row];
            std::memcpy(work.latent_RG.data() + row * G, latent(leaf.tree, leaf.parent), bytes(G));
            work.memory_R[static_cast<size_t>(row)] = memory_F_[static_cast<size_t>(leaf.tree)];
            work.token_R[static_cast<size_t>(row)] = leaf.token;
        }
        advance(w, *memory_, rows, work);
        decode(w, rows, work.hidden_RLD.data(), work);
        heads(w, work.hidden_RLD.data(), rows, out.values_RL + begin * L, work);
        for (int64_t row = 0; row < rows; ++row) {
            const search::Leaf& leaf = leaves[begin + row];
            float* value_L = out.values_RL + (begin + row) * L;
            if (terminal_V_[static_cast<size_t>(leaf.token)]) {
                std::memcpy(value_L, values(leaf.tree, leaf.parent), bytes(L));
            }
            std::memcpy(latent(leaf.tree, leaf.node), work.features_RF.data() + row * (G + w.decoder_W), bytes(G));
            std::memcpy(values(leaf.tree, leaf.node), value_L, bytes(L));
        }
        policy(w, rows, actions_A_, out.actions_RA + begin * actions_A_, out.prior_logits_RA + begin * actions_A_, work,
               inner);
    });
}

void LatentEvaluator::remap(const int64_t* new_from_old_BS, int64_t old_slots, int64_t slots) {
    if (old_slots < 0 || old_slots > slots_) {
        refuse("old_slots = " + std::to_string(old_slots) + "; allowed: 0 to the " + std::to_string(slots_) +
               " that there are");
    }
    if (slots < 1) refuse("slots = " + std::to_string(slots) + "; allowed: at least 1");
    for (int64_t i = 0; i < trees_F_ * old_slots; ++i) {
        const int64_t to = new_from_old_BS[i], from = i % old_slots;
        if (to < -1 || to > from || to >= slots) {
            refuse("new_from_old_BS: slot " + std::to_string(from) + " of tree " + std::to_string(i / old_slots) +
                   " goes to " + std::to_string(to) + "; allowed: -1, or a slot that is not higher");
        }
    }
    const int64_t G = weights_->width_G, L = weights_->num_layers_L, size = std::max(slots, slots_);
    Buffer<float> latents, values;
    if (size > slots_) {
        latents = Buffer<float>(trees_F_ * size * G);
        values = Buffer<float>(trees_F_ * size * L);
    }
    float* latents_to = size > slots_ ? latents.data() : latents_FSG_.data();
    float* values_to = size > slots_ ? values.data() : values_FSL_.data();
    for (int64_t tree = 0; tree < trees_F_; ++tree) {
        // In this order a slot is read before anything moves into it.
        for (int64_t old = 0; old < old_slots; ++old) {
            const int64_t to = new_from_old_BS[tree * old_slots + old];
            if (to < 0) continue;
            std::memmove(latents_to + (tree * size + to) * G, latent(tree, old), bytes(G));
            std::memmove(values_to + (tree * size + to) * L, this->values(tree, old), bytes(L));
        }
    }
    if (size == slots_) return;
    latents_FSG_ = std::move(latents);
    values_FSL_ = std::move(values);
    slots_ = size;
}

int64_t LatentEvaluator::bytes_per_tree(int64_t slots) const {
    return slots * (weights_->width_G + weights_->num_layers_L) * static_cast<int64_t>(sizeof(float));
}

}  // namespace crsm::latent
