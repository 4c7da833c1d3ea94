// States of running generations, a slot each: stepped and steered in place (crsm/slots.py says what each call means).
//
// A slot is one record [SSM states of all layers | convolution windows, taps first | residual streams]; what is in force
// and the remembered decays lie apart, since most steps do not touch them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "decoder.hpp"
#include "pages.hpp"

namespace crsm {

// A plan to write; its arrays are the caller's.
struct SlotWrite {
    int64_t index = 0;  // into the named slots
    const float* u_LRE = nullptr;
    const float* b_LRN = nullptr;
    int64_t rank_R = 0;
    std::vector<double> alpha_L;
    int64_t late = 0;     // tokens since its target
    int64_t expires = 0;  // position before whose consumption it is spent
};

// For one thread at a time.
class Slots {
public:
    // crsm.steering.NEVER
    static constexpr int64_t kNever = int64_t{1} << 62;

    Slots(std::shared_ptr<Decoder> decoder, int64_t capacity);

    const DecodeSizes& sizes() const { return decoder_->sizes(); }
    int64_t capacity() const { return static_cast<int64_t>(steering_.size()); }
    void grow(int64_t capacity);

    // Row `row` of a batch: per layer (B, C, K-1) and (B, H, P, N), and (B, L, D). Nothing is in force then.
    void put(int64_t slot, const std::vector<const float*>& conv, const std::vector<const float*>& ssm,
             const float* hidden_BLD, int64_t row);
    // Copies of one slot: (C, K-1) and (H, P, N) of a layer, (L, D).
    void copy_conv(int64_t slot, int64_t layer, float* conv_CK);
    void copy_ssm(int64_t slot, int64_t layer, float* ssm_HPN);
    void copy_hidden(int64_t slot, float* hidden_LD);

    // What is in force, zeros where nothing is: (H, P, N) of a layer; and `depth(slot)` decays (L, H), the newest last.
    void copy_delta(int64_t slot, int64_t layer, float* delta_HPN);
    void copy_decays(int64_t slot, float* decay_WLH);
    int64_t expires(int64_t slot) const { return steering_[index(slot)].expires; }
    int64_t depth(int64_t slot) const { return steering_[index(slot)].depth; }
    void set_steering(int64_t slot, const std::vector<const float*>& delta, int64_t expires, const float* decay_WLH,
                      int64_t depth);
    void forget(int64_t slot);

    // Raises std::invalid_argument if a slot is named twice.
    void steer(const std::vector<int64_t>& slots, const std::vector<int64_t>& positions,
               const std::vector<char>& tracked, const std::vector<SlotWrite>& writes, float largest);
    void step(const std::vector<int64_t>& tokens, const std::vector<int64_t>& slots, int64_t remember, float* logits_BV,
              int threads);
    // The same to log-probabilities; returns the likeliest tokens.
    std::vector<int64_t> step_log_probs(const std::vector<int64_t>& tokens, const std::vector<int64_t>& slots,
                                        int64_t remember, float* log_probs_BV, int threads);

private:
    struct Steering {
        int64_t expires = kNever;
        std::vector<char> in_force_L;  // whether a layer's delta is anything but zero
        bool any = false;              // of in_force_L
        int64_t depth = 0, next = 0;   // decays that are remembered, and where in the ring the next one goes
    };

    static size_t index(int64_t value) { return static_cast<size_t>(value); }
    float* record(int64_t slot) const { return static_cast<float*>(records_.data()) + slot * record_; }
    float* delta(int64_t slot, int64_t layer) const {
        return static_cast<float*>(deltas_.data()) + (slot * sizes().n_layer + layer) * ssm_;
    }
    float* decays(int64_t slot, int64_t place) {
        return ring_.data() + (slot * kept_ + place) * sizes().n_layer * sizes().n_heads;
    }
    int64_t place_of(const Steering& steering, int64_t back) const { return (steering.next + kept_ - 1 - back) % kept_; }
    void reserve(int64_t capacity);
    void remember(int64_t depth);
    void check_apart(const std::vector<int64_t>& slots);
    void steer_one(int64_t slot, const SlotWrite* write, bool keep, float largest);

    std::shared_ptr<Decoder> decoder_;
    int64_t ssm_ = 0, conv_ = 0;                           // numbers of a layer
    int64_t conv_at_ = 0, hidden_at_ = 0, record_ = 0;     // of a record
    Pages records_, deltas_;
    std::vector<float> ring_;  // per slot (W, L, H)
    int64_t kept_ = 0;         // W
    std::vector<Steering> steering_;
    std::vector<float*> conv_L_, ssm_L_;  // of slot 0
    std::vector<float> decay_LBH_, carried_H_;
    std::vector<float*> carried_BL_;
    std::vector<int64_t> named_;  // per slot, the call that named it last
    int64_t calls_ = 0;
};

}  // namespace crsm
