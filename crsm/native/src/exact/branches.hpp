// The backbone itself as a world model, without a state for every imagined position.
//
// A node is a token imagined after another node, or the snapshot of a sequence. A snapshot's SSM states are read where
// they lie and never copied; of a token, only what it adds to them is kept (DecodeStep in decode.hpp): some ten thousand
// numbers where a state has hundreds of thousands. What a step costs beside its matrices is one read of the snapshot's
// states and a product of vectors per token of the branch.
//
// Letters: B snapshots, L layers, D d_model, V vocabulary, R rows of a call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../decoder.hpp"

namespace crsm::exact {

// States of B sequences in one piece each: [B, L, H, P, N], [B, L, C, K-1], [B, L, D].
struct Snapshots {
    const float *memory, *conv, *hidden;
    int64_t count_B;
};

// For one caller at a time; the weights are shared with others.
class Branches {
public:
    // The snapshots are the first nodes. Their memory must stay alive and as it is.
    // Throws std::invalid_argument naming array, snapshot and layer where one is not finite.
    Branches(const Decoder& decoder, const Snapshots& snapshots);
    // The nodes of another one, to go on with.
    Branches(const Branches& other);
    Branches& operator=(const Branches&) = delete;
    ~Branches();

    const DecodeSizes& sizes() const { return decoder_->sizes(); }
    const DecodeHead& head() const { return decoder_->head(); }
    int64_t size() const { return static_cast<int64_t>(from_.size()); }
    // Makes room for so many nodes, at least those there are. New ones are written by `step`.
    void resize(int64_t nodes);
    // Residual streams after a node, [L, D].
    const float* hidden(int64_t node) const { return base(node) + hidden_offset_; }

    // Row r takes token_R[r] after node from_R[r] and becomes node to_R[r], which no row of the call continues.
    // logits_RV may be null.
    void step(int64_t rows, const int64_t* from_R, const int64_t* token_R, const int64_t* to_R, float* logits_RV,
              int threads);
    // Logits after nodes.
    void logits(int64_t rows, const int64_t* node_R, float* logits_RV, int threads);
    int64_t bytes_per_node() const { return stride_ * static_cast<int64_t>(sizeof(float)); }

private:
    float* base(int64_t node) const { return static_cast<float*>(pages_.data()) + node * stride_; }
    int64_t window_size() const { return sizes().conv_channels() * (sizes().d_conv - 1); }
    void place_layers();
    bool is_snapshot(int64_t node) const { return node < snapshots_.count_B; }

    std::shared_ptr<Decoder> decoder_;
    Snapshots snapshots_;
    // A node is [L][window | record] and its residual streams [L, D].
    int64_t layer_stride_ = 0, hidden_offset_ = 0, stride_ = 0;
    Pages pages_;
    std::vector<int64_t> from_;   // the node before; a snapshot: itself
    std::vector<int64_t> state_;  // the snapshot that the branch leaves
    std::vector<const float*> memory_L_;
    std::vector<float*> window_L_, record_L_;
    // Of one step, kept for the next one.
    std::vector<int64_t> state_R_, begin_R_, branch_;
};

}  // namespace crsm::exact
