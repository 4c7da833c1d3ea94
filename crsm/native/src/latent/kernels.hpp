// Element-wise parts of the latent network, compiled per instruction set (isa.hpp). One row a call; a row's result
// depends on the row alone.
//
// Letters as in crsm/latent_dynamics.py: L layers, D d_model, G width of the latent.
#pragma once

#include <cstdint>

#include "../isa.hpp"

namespace crsm::latent {

// Added to the mean square of what a critic reads.
inline constexpr float kCriticEps = 1e-5f;

// A token of a policy's best.
struct Candidate {
    float logit;
    int64_t token;
};

// Σ exp(logit − max) over a slice of the vocabulary.
struct SliceSum {
    float max;
    float sum;
};

// What the fused policy head and the critics read a residual stream with.
struct HeadWeights {
    int64_t num_layers_L;
    int64_t d_model_D;
    const float* fusion_L;     // mixture over layers, sums to 1
    const float* critic_LD;
    const float* critic_bias_L;
    const float* norm_D;       // weight of the final norm
    float norm_eps;
    float critic_eps;
};

}  // namespace crsm::latent

namespace crsm {

struct LatentKernels {
    // Index of the first NaN or infinity; `count` if there is none.
    int64_t (*first_non_finite)(const float* x, int64_t count);
    void (*tanh_rows)(float* x, int64_t count);
    void (*silu_rows)(float* x, int64_t count);
    // The SSM's read h·q of one layer: out[e] = Σ_n memory[e, n] · query[n].
    void (*read)(const float* memory_EN, const float* query_N, float* out_E, int64_t rows_E, int64_t columns_N);
    // x / rms(x), in place.
    void (*rms_norm)(float* x, int64_t count, float eps);
    // GRU cell from its gates' two summands, [r | z | n] each: the new latent into `out`.
    void (*gru)(const float* input_3G, const float* hidden_3G, const float* latent_G, float* out_G, int64_t width_G);
    // Values of all layers, and what the vocabulary's matrix is multiplied with; values_L may be null.
    void (*heads)(const latent::HeadWeights& weights, const float* hidden_LD, float* values_L, float* normed_D);
    // The `keep` ≤ `count` best of `count` logits, the likeliest first, equal ones by token; token i is first_token + i.
    latent::SliceSum (*select)(const float* logits, int64_t count, int64_t first_token, int64_t keep,
                               latent::Candidate* kept);
    // The `keep` best of candidates that do not repeat a token, in the same order; the array is rearranged.
    void (*best)(latent::Candidate* candidates, int64_t count, int64_t keep);
    // The greatest logit of all slices and log Σ exp(logit − max), added up in the slices' order.
    void (*log_sum)(const latent::SliceSum* slices, int64_t count, float* max, float* log_sum);
};
CRSM_DECLARE_TABLE(LatentKernels, latent_kernels)

namespace latent {

// The `keep` first candidates as tokens and log-probabilities, given what all slices of the vocabulary sum up to.
void write_best(const Candidate* candidates, const SliceSum* sums, int64_t slices, int64_t keep, int64_t* tokens_A,
                float* log_probs_A);

}  // namespace latent
}  // namespace crsm
