// Slots as Python holds them; made by a decoder, which outlives them (it keeps the embedding).
#pragma once

#include <nanobind/stl/vector.h>

#include <memory>

#include "arrays.hpp"
#include "slots.hpp"

namespace crsm {

class BoundSlots {
public:
    BoundSlots(std::shared_ptr<Decoder> decoder, int64_t capacity)
        : slots_(std::make_unique<Slots>(std::move(decoder), capacity)) {}

    int64_t capacity() const { return slots_->capacity(); }
    void grow(int64_t capacity) { slots_->grow(capacity); }
    void put(nb::handle slots, const std::vector<AnyArray>& conv, const std::vector<AnyArray>& ssm, AnyArray hidden);
    void restore(int64_t slot, const std::vector<AnyArray>& conv, const std::vector<AnyArray>& ssm, AnyArray hidden,
                 const std::vector<AnyArray>& delta, int64_t expires, AnyArray decays);
    nb::tuple save(int64_t slot);
    nb::tuple read(nb::handle slots, nb::handle layers, bool conv);
    void steer(nb::handle slots, nb::handle positions, nb::handle tracked, nb::list writes, double largest);
    void step(nb::handle tokens, nb::handle slots, int64_t remember, AnyArray logits, int threads);
    std::vector<int64_t> step_log_probs(nb::handle tokens, nb::handle slots, int64_t remember, AnyArray log_probs,
                                        int threads);
    void free(int64_t slot);

private:
    struct Tokens {
        std::vector<int64_t> said, slots;
        float* logits_BV;
    };

    Tokens checked_tokens(nb::handle tokens, nb::handle slots, int64_t remember, const AnyArray& logits) const;
    std::vector<int64_t> checked_slots(nb::handle slots) const;
    void check_slot(int64_t slot) const;

    std::unique_ptr<Slots> slots_;
};

}  // namespace crsm
