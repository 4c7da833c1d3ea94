// The latent network's weights, packed once and then shared by any number of threads, and the memories that it reads.
//
// Letters: B requests, M read layers, H heads, P head dimension, N d_state, E = H·P, L layers, D d_model, G width,
// W decoder width, V vocabulary.
#pragma once

#include <cstdint>

#include "../arrays.hpp"
#include "../gemm.hpp"
#include "kernels.hpp"

namespace crsm::latent {

// Sizes and plain row-major parameters, as PyTorch holds them; read while `Weights` is made.
struct Parameters {
    int64_t num_layers_L, d_model_D, width_G, decoder_W, vocab_V, num_read_M, inner_E, d_state_N;
    const float* embedding_VD;
    const float *encoder_weight, *encoder_bias;  // [G, L·D]
    const float *query_weight, *query_bias;      // [M·N, G + D]
    const float *read_weight, *read_bias;        // [G, M·E]
    const float *cell_weight_ih, *cell_weight_hh, *cell_bias_ih, *cell_bias_hh;  // [3G, D + G], [3G, G]
    const float *linear_weight, *linear_bias;    // [L·D, G]
    const float *in_weight, *in_bias;            // [W, G]
    const float *out_weight, *out_bias;          // [L·D, W]
    const float* fusion_L;                       // mixture, sums to 1
    const float *critic_LD, *critic_bias_L;
    const float* norm_D;
    float norm_eps;
    const float* lm_head_VD;
};

// A matrix and the memory that it lies in.
struct OwnedMatrix {
    Buffer<float> panels;
    PackedMatrix packed;
};

// Immutable once made.
class Weights {
public:
    explicit Weights(const Parameters& from);

    int64_t num_layers_L, d_model_D, width_G, decoder_W, vocab_V, num_read_M, inner_E, d_state_N;
    int64_t queries() const { return num_read_M * d_state_N; }
    int64_t gates() const { return 3 * width_G; }
    int64_t read_width() const { return num_read_M * inner_E; }
    int64_t hidden_size() const { return num_layers_L * d_model_D; }

    OwnedMatrix encoder;  // hidden → latent
    Buffer<float> encoder_bias;
    // The latent's products: hidden summand of the gates | queries.
    OwnedMatrix from_latent;
    Buffer<float> gates_bias;  // of the hidden summand
    // The token's products, biases included: input summand of the gates | queries. A table [V, 3G + M·N] where that is
    // small, else the matrix that makes its rows; equal bits either way.
    Buffer<float> token_table;
    OwnedMatrix from_token;
    Buffer<float> token_bias;
    Buffer<float> embedding_VD;
    OwnedMatrix read;
    Buffer<float> read_bias;
    OwnedMatrix from_read;  // input summand of the gates
    OwnedMatrix decoder_in;
    Buffer<float> decoder_in_bias;
    OwnedMatrix decoder_out;  // from [latent | silu(decoder_in)]
    Buffer<float> decoder_out_bias;
    Buffer<float> fusion_L, critic_LD, critic_bias_L, norm_D;
    float norm_eps;
    OwnedMatrix lm_head;

    bool has_table() const { return token_table.size() > 0; }
    HeadWeights heads() const {
        return {num_layers_L,         d_model_D,     fusion_L.data(), critic_LD.data(),
                critic_bias_L.data(), norm_D.data(), norm_eps,        kCriticEps};
    }
    int64_t bytes() const;
};

// SSM memories of B snapshots: a view of an array [B, M, E, N] that someone else keeps alive and unchanged.
class Memory {
public:
    // Throws std::invalid_argument naming snapshot and layer where it is not finite.
    Memory(const Weights& weights, const float* memory_BMEN, int64_t count_B, int threads);

    int64_t count() const { return count_B_; }
    bool fits(const Weights& weights) const {
        return layers_M_ == weights.num_read_M && rows_E_ == weights.inner_E && columns_N_ == weights.d_state_N;
    }
    const float* layer(int64_t snapshot, int64_t layer) const {
        return memory_BMEN_ + (snapshot * layers_M_ + layer) * rows_E_ * columns_N_;
    }

private:
    const float* memory_BMEN_;
    int64_t count_B_, layers_M_, rows_E_, columns_N_;
};

}  // namespace crsm::latent
