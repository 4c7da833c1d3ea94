// The backbone itself as a world model. The evaluator's base class is bound in bind_search.cpp, which comes first.
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>

#include "bindings.hpp"
#include "bound_exact.hpp"

namespace crsm {

BoundExact::BoundExact(std::shared_ptr<Decoder> decoder, AnyArray critic_LD, AnyArray bias_L)
    : decoder_(std::move(decoder)) {
    const DecodeSizes& s = decoder_->sizes();
    critics_ = std::make_shared<const exact::Critics>(
        checked<const float>(critic_LD, "critic_LD", {s.n_layer, s.d_model}),
        checked<const float>(bias_L, "critic_bias_L", {s.n_layer}), s.n_layer, s.d_model);
}

BoundFuture BoundExact::project(AnyArray memory_BLHPN, AnyArray conv_BLCK, AnyArray hidden_BLD, AnyArray known_B,
                                int64_t lag, int64_t hypotheses, int threads) const {
    const DecodeSizes& s = decoder_->sizes();
    const int64_t* known = checked<const int64_t>(known_B, "known_B", {-1});
    const int64_t batch = static_cast<int64_t>(known_B.shape(0));
    const exact::Snapshots snapshots{
        checked<const float>(memory_BLHPN, "memory_BLHPN", {batch, s.n_layer, s.n_heads, s.headdim, s.d_state}),
        checked<const float>(conv_BLCK, "conv_BLCK", {batch, s.n_layer, s.conv_channels(), s.d_conv - 1}),
        checked<const float>(hidden_BLD, "hidden_BLD", {batch, s.n_layer, s.d_model}), batch};
    if (lag < 0 || hypotheses < 1 || batch < 1) {
        throw std::invalid_argument("lag = " + std::to_string(lag) + ", hypotheses = " + std::to_string(hypotheses) +
                                    ", snapshots = " + std::to_string(batch) +
                                    "; allowed: at least 0, at least 1, at least 1");
    }
    for (int64_t row = 0; row < batch; ++row) {
        if (known[row] >= 0 && known[row] < s.vocab_size) continue;
        throw std::invalid_argument("known_B[" + std::to_string(row) + "] = " + std::to_string(known[row]) +
                                    "; allowed: 0 to " + std::to_string(s.vocab_size - 1));
    }
    nb::gil_scoped_release release;
    return {exact::project(*decoder_, snapshots, known, lag, hypotheses, threads), memory_BLHPN};
}

std::shared_ptr<exact::ExactEvaluator> BoundExact::evaluator(const BoundFuture& future,
                                                             std::vector<int64_t> terminal_tokens, int64_t num_actions,
                                                             int threads) const {
    nb::gil_scoped_release release;
    return std::make_shared<exact::ExactEvaluator>(future.future, critics_, terminal_tokens, num_actions, threads);
}

namespace {

nb::ndarray<nb::numpy, float> hidden_of(const BoundFuture& self) {
    const exact::Branches& branches = *self.future.branches;
    const size_t F = self.future.node_F.size(), L = static_cast<size_t>(branches.sizes().n_layer);
    const size_t D = static_cast<size_t>(branches.sizes().d_model);
    Buffer<float> hidden_FLD(static_cast<int64_t>(F * L * D));
    for (size_t row = 0; row < F; ++row) {
        std::copy_n(branches.hidden(self.future.node_F[row]), L * D, hidden_FLD.data() + row * L * D);
    }
    return to_numpy(std::move(hidden_FLD), {F, L, D});
}

nb::ndarray<nb::numpy, int64_t> assumed_of(const BoundFuture& self) {
    const std::vector<int64_t>& assumed = self.future.assumed_FT;
    const size_t F = self.future.node_F.size();
    Buffer<int64_t> assumed_FT(static_cast<int64_t>(assumed.size()));
    std::copy(assumed.begin(), assumed.end(), assumed_FT.data());
    return to_numpy(std::move(assumed_FT), {F, assumed.size() / F});
}

}  // namespace

void bind_exact(nb::module_& m) {
    nb::class_<BoundFuture>(m, "ExactFuture", "Projected futures, told apart by what their tokens add to the snapshots.")
        .def_prop_ro("hidden_FLD", &hidden_of, nb::rv_policy::move)
        .def_prop_ro("assumed_FT", &assumed_of, nb::rv_policy::move);
    nb::class_<exact::ExactEvaluator, search::Evaluator>(m, "ExactEvaluator", "The backbone itself, over F trees.");
    nb::class_<BoundExact>(m, "Exact", "The backbone as a world model, with its critics.")
        .def("project", &BoundExact::project, nb::arg("memory_BLHPN"), nb::arg("conv_BLCK"), nb::arg("hidden_BLD"),
             nb::arg("known_B"), nb::arg("lag"), nb::arg("hypotheses"), nb::arg("threads") = 0, nb::keep_alive<0, 1>())
        .def("evaluator", &BoundExact::evaluator, nb::arg("future"), nb::arg("terminal_tokens"), nb::arg("num_actions"),
             nb::arg("threads") = 0, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>());
}

}  // namespace crsm
