#include "branches.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../latent/kernels.hpp"

namespace crsm::exact {
namespace {

size_t bytes(int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); }

void check_finite(const char* name, const float* values, int64_t count_B, int64_t layers_L, int64_t size) {
    for (int64_t i = 0; i < count_B * layers_L; ++i) {
        if (latent_kernels().first_non_finite(values + i * size, size) == size) continue;
        throw std::invalid_argument(std::string(name) + ": snapshot " + std::to_string(i / layers_L) + ", layer " +
                                    std::to_string(i % layers_L) + " holds NaN or infinity; allowed: finite numbers");
    }
}

}  // namespace

Branches::Branches(const Decoder& decoder, const Snapshots& snapshots)
    : decoder_(decoder.sibling()), snapshots_(snapshots) {
    const DecodeSizes& s = sizes();
    const int64_t L = s.n_layer, C = s.conv_channels(), taps = s.d_conv - 1, hidden = L * s.d_model;
    check_finite("memory_BLHPN", snapshots.memory, snapshots.count_B, L, s.d_inner() * s.d_state);
    check_finite("conv_BLCK", snapshots.conv, snapshots.count_B, L, window_size());
    check_finite("hidden_BLD", snapshots.hidden, snapshots.count_B, L, s.d_model);
    layer_stride_ = window_size() + s.record();
    hidden_offset_ = L * layer_stride_;
    stride_ = (hidden_offset_ + hidden + 15) / 16 * 16;
    resize(snapshots.count_B);
    for (int64_t node = 0; node < snapshots.count_B; ++node) {
        from_[static_cast<size_t>(node)] = state_[static_cast<size_t>(node)] = node;
        for (int64_t layer = 0; layer < L; ++layer) {
            const float* window_CK = snapshots.conv + (node * L + layer) * window_size();
            float* window_KC = base(node) + layer * layer_stride_;
            for (int64_t c = 0; c < C; ++c) {
                for (int64_t k = 0; k < taps; ++k) window_KC[k * C + c] = window_CK[c * taps + k];
            }
        }
        std::memcpy(base(node) + hidden_offset_, snapshots.hidden + node * hidden, bytes(hidden));
    }
}

Branches::Branches(const Branches& other)
    : decoder_(other.decoder_->sibling()),
      snapshots_(other.snapshots_),
      layer_stride_(other.layer_stride_),
      hidden_offset_(other.hidden_offset_),
      stride_(other.stride_),
      from_(other.from_),
      state_(other.state_) {
    pages_ = decoder_->pool()->take(bytes(size() * stride_));
    std::memcpy(pages_.data(), other.pages_.data(), bytes(size() * stride_));
    place_layers();
}

Branches::~Branches() { decoder_->pool()->give_back(std::move(pages_)); }

void Branches::resize(int64_t nodes) {
    Pages larger = decoder_->pool()->take(bytes(nodes * stride_));
    if (size() > 0) std::memcpy(larger.data(), pages_.data(), bytes(size() * stride_));
    std::swap(pages_, larger);
    decoder_->pool()->give_back(std::move(larger));
    from_.resize(static_cast<size_t>(nodes));
    state_.resize(static_cast<size_t>(nodes));
    place_layers();
}

void Branches::place_layers() {
    const DecodeSizes& s = sizes();
    memory_L_.clear();
    window_L_.clear();
    record_L_.clear();
    for (int64_t layer = 0; layer < s.n_layer; ++layer) {
        memory_L_.push_back(snapshots_.memory + layer * s.d_inner() * s.d_state);
        window_L_.push_back(base(0) + layer * layer_stride_);
        record_L_.push_back(window_L_.back() + window_size());
    }
}

void Branches::step(int64_t rows, const int64_t* from_R, const int64_t* token_R, const int64_t* to_R, float* logits_RV,
                    int threads) {
    const DecodeSizes& s = sizes();
    state_R_.clear();
    branch_.clear();
    begin_R_.assign(1, 0);
    for (int64_t row = 0; row < rows; ++row) {
        const size_t from = static_cast<size_t>(from_R[row]), to = static_cast<size_t>(to_R[row]);
        from_[to] = from_R[row];
        state_[to] = state_[from];
        state_R_.push_back(state_[to]);
        for (int64_t node = from_R[row]; !is_snapshot(node); node = from_[static_cast<size_t>(node)]) {
            branch_.push_back(node);
        }
        begin_R_.push_back(static_cast<int64_t>(branch_.size()));
    }
    DecodeStep step;
    step.batch = rows;
    step.token_B = token_R;
    step.place_B = to_R;
    step.taps_first = true;
    step.conv_in = step.conv_out = window_L_.data();
    step.ssm_in = memory_L_.data();
    step.hidden_BLD = base(0) + hidden_offset_;
    step.conv_stride = step.hidden_stride = step.record_stride = stride_;
    step.ssm_stride = s.n_layer * s.d_inner() * s.d_state;
    step.from_B = from_R;
    step.state_B = state_R_.data();
    step.branch_B = begin_R_.data();
    step.branch = branch_.data();
    step.records = record_L_.data();
    step.logits_BV = logits_RV;
    decoder_->step(step, threads);
}

void Branches::logits(int64_t rows, const int64_t* node_R, float* logits_RV, int threads) {
    const int64_t size = sizes().n_layer * sizes().d_model;
    std::vector<float> hidden_RLD(static_cast<size_t>(rows * size));
    for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(hidden_RLD.data() + row * size, hidden(node_R[row]), bytes(size));
    }
    decoder_->logits(rows, hidden_RLD.data(), logits_RV, threads);
}

}  // namespace crsm::exact
