// One token through a whole Mamba-2 backbone: what crsm/mamba_ssm.py's Backbone.step defines, for a batch of sequences.
//
// Letters: B batch, L layers, D d_model, V vocabulary, H heads, P head dimension, N d_state, E = H·P inner width,
// C = E + 2·N convolution channels, K convolution width, M = E + C + H columns of the input projection [z, x, B, C, dt],
// J = ceil(D / kPanel) pieces of a residual row.
//
// A layer is three phases; inside a phase all tasks are independent, and rows are independent through all of them:
//   project_in    panels of the input projection, then for its own columns: silu(z), convolution and SiLU, dt
//   update_state  (row, head): softplus, decay, h ← a·h + (dt·x) ⊗ B, y = h·C + D·x, gate; one pass over the state
//   (read_branches  row: the same y without a state of its own; see DecodeStep)
//   project_out   panels of the output projection, then for its own columns: residual, next norm's weight, fusion
// A norm's 1/rms is a factor of a whole row: the product takes x·weight, its result is scaled, and the squares are summed
// by the tasks that make x, piece by piece in a fixed order. So no task reads a whole row but the products themselves.
// Every number is computed in one order that depends neither on the batch nor on the threads.
#pragma once

#include <cstdint>

#include "gemm.hpp"
#include "isa.hpp"

namespace crsm {

struct DecodeSizes {
    int64_t d_model = 0, n_layer = 0, d_state = 0, headdim = 0, n_heads = 0, d_conv = 0, vocab_size = 0;
    float norm_eps = 0;

    int64_t d_inner() const { return n_heads * headdim; }
    int64_t conv_channels() const { return d_inner() + 2 * d_state; }
    int64_t record() const { return n_heads + d_inner() + d_state; }
    int64_t projected() const { return d_inner() + conv_channels() + n_heads; }
    int64_t pieces() const { return (d_model + kPanel - 1) / kPanel; }
};

struct DecodeLayer {
    const float* norm_D = nullptr;
    PackedMatrix in_proj;
    const float* conv_weight_KC = nullptr;  // the newest input's tap last
    const float* conv_bias_C = nullptr;
    const float* dt_bias_H = nullptr;
    const float* A_H = nullptr;  // negative
    const float* D_H = nullptr;
    const float* gated_norm_E = nullptr;
    PackedMatrix out_proj;
};

// logits = lm_head · RMSNorm(Σ_l fusion_l · x_l)
struct DecodeHead {
    const float* fusion_L = nullptr;
    const float* norm_D = nullptr;
    PackedMatrix lm_head;
};

struct DecodeModel {
    DecodeSizes sizes;
    const float* embedding_VD = nullptr;
    DecodeHead head;
};

// What one call reads and writes. A state's new tensor may be the old one: then it is updated in place.
struct DecodeStep {
    int64_t batch = 0;
    const int64_t* token_B = nullptr;
    // States, residual streams and differences of row r lie at place(r), in strides of their own.
    int64_t first = 0;
    const int64_t* place_B = nullptr;  // null: rows lie in order, from `first` on
    int64_t conv_stride = 0, ssm_stride = 0, hidden_stride = 0;
    bool taps_first = false;   // convolution states are (K-1, C), not (C, K-1)
    bool past_caches = false;  // new states will not be read before the caches have turned over
    const float* const* conv_in = nullptr;  // per layer (C, K-1), oldest first
    float* const* conv_out = nullptr;
    const float* const* ssm_in = nullptr;  // per layer (H, P, N)
    float* const* ssm_out = nullptr;
    float* const* carried_BL = nullptr;  // (H, P, N) to be multiplied by the decays as well, or null; null: none at all

    // Rows that branch off states instead of moving them: `ssm_in` holds those states, which stay as they are, and there
    // is no `ssm_out`. What a token adds to a layer's state is a record: decays (H), inputs dt·x (E), B (N). With it
    //   y = Σ_i (Π_{j>i} a_j) (B_i·C) dt_i·x_i + (Π_j a_j) h·C    over the tokens i on the branch
    // is what a state of its own would give (the dual form of arXiv 2405.21060, section 3), and nothing of the size of
    // a state is written or kept. All null: rows have states.
    const int64_t* from_B = nullptr;    // place whose convolution window is read; the new one lies at place(r)
    const int64_t* state_B = nullptr;   // which of the states the branch leaves
    const int64_t* branch_B = nullptr;  // [B + 1]: the branch of row r is `branch`[branch_B[r], branch_B[r + 1])
    const int64_t* branch = nullptr;    // places of the tokens between the state and this one, the newest first
    float* const* records = nullptr;    // per layer; that of place p lies at p · record_stride
    int64_t record_stride = 0;

    float* hidden_BLD = nullptr;
    float* decay_LBH = nullptr;
    int64_t decay_stride = 0;    // from a layer to the next
    float* logits_BV = nullptr;  // null: not wanted

    // Scratch.
    float* scaled_BD = nullptr;     // residual · weight of the norm that comes next
    float* square_BJ = nullptr;     // sums of squares of the residual
    float* projected_BM = nullptr;  // z, x, B, C, dt
    float* gated_BE = nullptr;      // gated output · weight of its norm
    float* square_BH = nullptr;     // sums of squares of the gated output
    float* out_BD = nullptr;        // the output projection
    float* mixed_BD = nullptr;      // fusion of the layers so far

    int64_t place(int64_t row) const { return place_B != nullptr ? place_B[row] : first + row; }
    int64_t window(int64_t row) const { return from_B != nullptr ? from_B[row] : place(row); }
    bool branches() const { return records != nullptr; }
};

struct DecodeTable {
    void (*embed)(const DecodeModel&, const DecodeStep&, const float* first_norm_D);
    // Panels [begin, end).
    void (*project_in)(const DecodeModel&, const DecodeLayer&, const DecodeStep&, int64_t layer, int64_t begin,
                       int64_t end);
    // Units row·H + head, [begin, end).
    void (*update_state)(const DecodeModel&, const DecodeLayer&, const DecodeStep&, int64_t layer, int64_t begin,
                         int64_t end);
    // The same for the branches of rows [begin, end), which have records and no states.
    void (*read_branches)(const DecodeModel&, const DecodeLayer&, const DecodeStep&, int64_t layer, int64_t begin,
                          int64_t end);
    // `next_norm_D`: weight of the norm after this layer, or null after the last one.
    void (*project_out)(const DecodeModel&, const DecodeLayer&, const DecodeStep&, int64_t layer,
                        const float* next_norm_D, int64_t begin, int64_t end);
    // The fusion of finished residual streams, as project_out makes it on the way.
    void (*mix)(const DecodeModel&, const DecodeStep&);
    void (*project_logits)(const DecodeModel&, const DecodeStep&, int64_t begin, int64_t end);
    // Logits of one row to log-probabilities, in place; returns the likeliest token, of equals the lowest.
    int64_t (*log_softmax)(float* logits_V, int64_t vocab);
};
CRSM_DECLARE_TABLE(DecodeTable, decode_table)

}  // namespace crsm
