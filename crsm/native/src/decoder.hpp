// The owner of a decoder's weights: packs them, and runs the phases of decode.hpp over the threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "decode.hpp"
#include "pages.hpp"

namespace crsm {

// One thread or all: whichever has been faster lately, with a trial of the other now and then. A team whose processors are
// wanted by others (planners, say) waits for its slowest member at every barrier and can be slower than one thread alone.
// The results are the same bits.
class TeamChoice {
public:
    // Members of the next step. Steps of another kind (a batch size, say) are counted anew.
    int next(int64_t kind, int wanted);
    void took(int members, double seconds);

private:
    static constexpr int64_t kTrialEvery = 32;
    static constexpr double kNewest = 0.25;  // weight of the newest step in the running mean

    int64_t kind_ = -1, steps_ = 0;
    double alone_ = 0, team_ = 0;  // seconds; 0: not known yet
};

// Weights, packed once, and the scratch of a step. Calls exclude each other.
class Decoder {
public:
    Decoder(const DecodeSizes& sizes, WeightType type, bool has_head);

    // A decoder of the same weights with a scratch of its own, so that both may step at a time. Neither may be packed
    // again while the other one steps.
    std::shared_ptr<Decoder> sibling() const;

    const DecodeSizes& sizes() const { return model_.sizes; }
    const DecodeHead& head() const { return model_.head; }
    bool has_head() const { return has_head_; }
    // Of everything that a step may read of the weights, the embedding included.
    int64_t bytes_of_weights() const { return bytes_of_weights_; }

    // Rows of fp32 that the caller keeps alive: a step reads one of them per sequence, so they are not copied.
    void set_embedding(const float* embedding_VD);
    struct LayerSource {
        const float *norm_D, *in_proj_MD, *conv_weight_CK, *conv_bias_C, *dt_bias_H, *A_H, *D_H, *gated_norm_E, *out_proj_DE;
    };
    void pack_layer(int64_t layer, const LayerSource& source, int threads);
    void pack_head(const float* fusion_L, const float* norm_D, const float* lm_head_VD, int threads);

    // Scratch of `step` is filled in here. Tokens must be inside of the vocabulary.
    void step(DecodeStep step, int threads);
    // logits_BV of hidden_BLD alone.
    void logits(int64_t batch, const float* hidden_BLD, float* logits_BV, int threads);

    // Memory of states; it outlives the decoder where a state does.
    const std::shared_ptr<PagePool>& pool() const { return pool_; }

private:
    // Tasks of a phase that are handed out; a cache line each.
    struct alignas(64) Phase {
        std::atomic<int64_t> next{0};
    };

    Decoder(const Decoder& other, const std::lock_guard<std::mutex>& lock);

    void reserve(DecodeStep& step);
    int worthwhile(int64_t batch, bool layers, bool head, int threads) const;
    bool layers_are_small() const;
    void step_by_rows(const DecodeStep& step, int threads);
    void step_by_panels(const DecodeStep& step, int members);
    const float* norm_after(int64_t layer, bool head) const;

    DecodeModel model_;
    std::vector<DecodeLayer> layers_;
    bool has_head_;
    int64_t bytes_of_weights_ = 0;
    std::shared_ptr<Pages> weights_;
    Pages scratch_;
    std::vector<Phase> phases_;
    TeamChoice choice_;
    std::shared_ptr<PagePool> pool_ = std::make_shared<PagePool>();
    mutable std::mutex busy_;
};

}  // namespace crsm
