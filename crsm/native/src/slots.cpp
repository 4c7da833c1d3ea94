#include "slots.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "steer.hpp"

namespace crsm {
namespace {

constexpr int64_t kLine = 16;  // numbers of a cache line

int64_t whole_lines(int64_t numbers) { return (numbers + kLine - 1) / kLine * kLine; }

void copy(const float* from, float* to, int64_t count) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

Pages longer(const Pages& old, int64_t numbers) {
    Pages pages(static_cast<size_t>(numbers) * sizeof(float));
    if (old.size() > 0) std::memcpy(pages.data(), old.data(), std::min(old.size(), pages.size()));
    return pages;
}

}  // namespace

Slots::Slots(std::shared_ptr<Decoder> decoder, int64_t capacity) : decoder_(std::move(decoder)) {
    const DecodeSizes& s = sizes();
    ssm_ = s.d_inner() * s.d_state;
    conv_ = s.conv_channels() * (s.d_conv - 1);
    conv_at_ = whole_lines(s.n_layer * ssm_);
    hidden_at_ = conv_at_ + whole_lines(s.n_layer * conv_);
    record_ = hidden_at_ + whole_lines(s.n_layer * s.d_model);
    carried_H_.resize(index(s.n_heads));
    grow(capacity);
}

void Slots::grow(int64_t capacity) {
    if (capacity < 1 || capacity < this->capacity()) {
        throw std::invalid_argument("capacity = " + std::to_string(capacity) + "; allowed: at least " +
                                    std::to_string(std::max<int64_t>(1, this->capacity())) +
                                    (this->capacity() > 0 ? ", what there is" : ""));
    }
    const DecodeSizes& s = sizes();
    Pages records = longer(records_, capacity * record_), deltas = longer(deltas_, capacity * s.n_layer * ssm_);
    ring_.resize(index(capacity * kept_ * s.n_layer * s.n_heads));
    named_.resize(index(capacity), 0);
    Steering fresh;
    fresh.in_force_L.assign(index(s.n_layer), 0);
    steering_.resize(index(capacity), fresh);
    records_ = std::move(records);
    deltas_ = std::move(deltas);
    conv_L_.clear();
    ssm_L_.clear();
    for (int64_t layer = 0; layer < s.n_layer; ++layer) {
        ssm_L_.push_back(record(0) + layer * ssm_);
        conv_L_.push_back(record(0) + conv_at_ + layer * conv_);
    }
}

void Slots::put(int64_t slot, const std::vector<const float*>& conv, const std::vector<const float*>& ssm,
                const float* hidden_BLD, int64_t row) {
    const DecodeSizes& s = sizes();
    const int64_t C = s.conv_channels(), taps = s.d_conv - 1, hidden = s.n_layer * s.d_model;
    for (int64_t layer = 0; layer < s.n_layer; ++layer) {
        copy(ssm[index(layer)] + row * ssm_, record(slot) + layer * ssm_, ssm_);
        const float* from_CK = conv[index(layer)] + row * conv_;
        float* to_KC = record(slot) + conv_at_ + layer * conv_;
        for (int64_t c = 0; c < C; ++c) {
            for (int64_t k = 0; k < taps; ++k) to_KC[k * C + c] = from_CK[c * taps + k];
        }
    }
    copy(hidden_BLD + row * hidden, record(slot) + hidden_at_, hidden);
    forget(slot);
}

void Slots::forget(int64_t slot) {
    Steering& steering = steering_[index(slot)];
    steering.expires = kNever;
    steering.depth = 0;
    steering.any = false;
    std::fill(steering.in_force_L.begin(), steering.in_force_L.end(), 0);
}

void Slots::copy_conv(int64_t slot, int64_t layer, float* conv_CK) {
    const int64_t C = sizes().conv_channels(), taps = sizes().d_conv - 1;
    const float* from_KC = record(slot) + conv_at_ + layer * conv_;
    for (int64_t c = 0; c < C; ++c) {
        for (int64_t k = 0; k < taps; ++k) conv_CK[c * taps + k] = from_KC[k * C + c];
    }
}

void Slots::copy_ssm(int64_t slot, int64_t layer, float* ssm_HPN) { copy(record(slot) + layer * ssm_, ssm_HPN, ssm_); }

void Slots::copy_hidden(int64_t slot, float* hidden_LD) {
    copy(record(slot) + hidden_at_, hidden_LD, sizes().n_layer * sizes().d_model);
}

void Slots::copy_delta(int64_t slot, int64_t layer, float* delta_HPN) {
    if (steering_[index(slot)].in_force_L[index(layer)]) {
        copy(delta(slot, layer), delta_HPN, ssm_);
    } else {
        std::fill(delta_HPN, delta_HPN + ssm_, 0.0f);
    }
}

void Slots::copy_decays(int64_t slot, float* decay_WLH) {
    const int64_t count = sizes().n_layer * sizes().n_heads, depth = steering_[index(slot)].depth;
    for (int64_t back = 0; back < depth; ++back) {
        copy(decays(slot, place_of(steering_[index(slot)], back)), decay_WLH + (depth - 1 - back) * count, count);
    }
}

void Slots::set_steering(int64_t slot, const std::vector<const float*>& delta_L, int64_t expires,
                         const float* decay_WLH, int64_t depth) {
    remember(depth);
    Steering& steering = steering_[index(slot)];
    steering.expires = expires;
    steering.any = false;
    for (int64_t layer = 0; layer < sizes().n_layer; ++layer) {
        const float* from = delta_L[index(layer)];
        const bool in_force = expires != kNever && std::any_of(from, from + ssm_, [](float x) { return x != 0; });
        if (in_force) copy(from, delta(slot, layer), ssm_);
        steering.in_force_L[index(layer)] = in_force;
        steering.any |= in_force;
    }
    const int64_t count = sizes().n_layer * sizes().n_heads;
    for (int64_t place = 0; place < depth; ++place) copy(decay_WLH + place * count, decays(slot, place), count);
    steering.depth = depth;
    steering.next = kept_ > 0 ? depth % kept_ : 0;
}

// Makes room in the ring for so many decays of every slot.
void Slots::remember(int64_t depth) {
    if (depth <= kept_) return;
    const int64_t count = sizes().n_layer * sizes().n_heads;
    std::vector<float> ring(index(capacity() * depth * count));
    for (int64_t slot = 0; slot < capacity(); ++slot) {
        Steering& steering = steering_[index(slot)];
        for (int64_t back = 0; back < steering.depth; ++back) {
            copy(decays(slot, place_of(steering, back)),
                 ring.data() + (slot * depth + steering.depth - 1 - back) * count, count);
        }
        steering.next = steering.depth;  // below `depth`: it was at most what was kept
    }
    ring_ = std::move(ring);
    kept_ = depth;
}

void Slots::check_apart(const std::vector<int64_t>& slots) {
    ++calls_;
    for (const int64_t slot : slots) {
        if (named_[index(slot)] == calls_) {
            throw std::invalid_argument("slots name " + std::to_string(slot) + " twice; allowed: each once");
        }
        named_[index(slot)] = calls_;
    }
}

void Slots::steer(const std::vector<int64_t>& slots, const std::vector<int64_t>& positions,
                  const std::vector<char>& tracked, const std::vector<SlotWrite>& writes, float largest) {
    check_apart(slots);
    std::vector<const SlotWrite*> writing(writes.empty() ? 0 : slots.size(), nullptr);
    for (const SlotWrite& write : writes) {
        const bool open = std::any_of(write.alpha_L.begin(), write.alpha_L.end(), [](double alpha) { return alpha != 0; });
        if (open) writing[index(write.index)] = &write;
    }
    for (size_t place = 0; place < slots.size(); ++place) {
        Steering& steering = steering_[index(slots[place])];
        const SlotWrite* write = writing.empty() ? nullptr : writing[place];
        const bool spent = steering.expires <= positions[place];
        if (!spent && write == nullptr) continue;
        if (spent) steering.expires = kNever;
        if (write != nullptr && tracked[place]) steering.expires = write->expires;
        steer_one(slots[place], write, steering.expires != kNever, largest);
    }
}

void Slots::steer_one(int64_t slot, const SlotWrite* write, bool keep, float largest) {
    const DecodeSizes& s = sizes();
    Steering& steering = steering_[index(slot)];
    steering.any = false;
    for (int64_t layer = 0; layer < s.n_layer; ++layer) {
        LayerSteering work;
        work.ssm_HPN = record(slot) + layer * ssm_;
        work.delta_HPN = delta(slot, layer);
        work.heads_H = s.n_heads;
        work.width_P = s.headdim;
        work.state_N = s.d_state;
        work.withdraw = steering.in_force_L[index(layer)];
        if (write != nullptr) {
            work.rank_R = write->rank_R;
            work.alpha = static_cast<float>(write->alpha_L[index(layer)]);
            work.u_RE = write->u_LRE + layer * work.rank_R * s.d_inner();
            work.b_RN = write->b_LRN + layer * work.rank_R * s.d_state;
            work.largest = largest;
            std::fill(carried_H_.begin(), carried_H_.end(), 1.0f);
            for (int64_t back = 0; back < std::min(write->late, steering.depth); ++back) {
                const float* decay_H = decays(slot, place_of(steering, back)) + layer * s.n_heads;
                for (int64_t head = 0; head < s.n_heads; ++head) carried_H_[index(head)] *= decay_H[head];
            }
            work.carried_H = carried_H_.data();
        }
        if (work.withdraw || work.alpha > 0) steer_table().layer(work);
        const bool in_force = keep && work.alpha > 0;
        steering.in_force_L[index(layer)] = in_force;
        steering.any |= in_force;
    }
}

void Slots::step(const std::vector<int64_t>& tokens, const std::vector<int64_t>& slots, int64_t remember,
                 float* logits_BV, int threads) {
    check_apart(slots);
    const DecodeSizes& s = sizes();
    const int64_t batch = static_cast<int64_t>(slots.size()), L = s.n_layer, H = s.n_heads;
    DecodeStep step;
    step.batch = batch;
    step.token_B = tokens.data();
    step.place_B = slots.data();
    step.conv_stride = step.ssm_stride = step.hidden_stride = record_;
    step.taps_first = true;
    step.conv_in = step.conv_out = conv_L_.data();
    step.ssm_in = step.ssm_out = ssm_L_.data();
    step.hidden_BLD = record(0) + hidden_at_;
    decay_LBH_.resize(index(L * batch * H));
    step.decay_LBH = decay_LBH_.data();
    step.decay_stride = batch * H;
    step.logits_BV = logits_BV;
    if (std::any_of(slots.begin(), slots.end(), [&](int64_t slot) { return steering_[index(slot)].any; })) {
        carried_BL_.assign(index(batch * L), nullptr);
        for (int64_t row = 0; row < batch; ++row) {
            const int64_t slot = slots[index(row)];
            for (int64_t layer = 0; layer < L; ++layer) {
                if (steering_[index(slot)].in_force_L[index(layer)]) carried_BL_[index(row * L + layer)] = delta(slot, layer);
            }
        }
        step.carried_BL = carried_BL_.data();
    }
    decoder_->step(step, threads);
    this->remember(remember);
    for (int64_t row = 0; row < batch; ++row) {
        const int64_t slot = slots[index(row)];
        Steering& steering = steering_[index(slot)];
        steering.depth = std::min(steering.depth + 1, remember);
        if (remember == 0) continue;
        for (int64_t layer = 0; layer < L; ++layer) {
            copy(decay_LBH_.data() + (layer * batch + row) * H, decays(slot, steering.next) + layer * H, H);
        }
        steering.next = steering.next + 1 < kept_ ? steering.next + 1 : 0;
    }
}

std::vector<int64_t> Slots::step_log_probs(const std::vector<int64_t>& tokens, const std::vector<int64_t>& slots,
                                           int64_t remember, float* log_probs_BV, int threads) {
    step(tokens, slots, remember, log_probs_BV, threads);
    std::vector<int64_t> likeliest;
    const int64_t vocab = sizes().vocab_size;
    for (size_t row = 0; row < slots.size(); ++row) {
        likeliest.push_back(decode_table().log_softmax(log_probs_BV + static_cast<int64_t>(row) * vocab, vocab));
    }
    return likeliest;
}

}  // namespace crsm
