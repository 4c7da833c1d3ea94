// The latent network: packed weights, memories, projection, and the evaluator that the search calls. The evaluator's
// base class is bound in bind_search.cpp, which comes first.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "arrays.hpp"
#include "bindings.hpp"
#include "latent/evaluator.hpp"
#include "latent/project.hpp"

namespace crsm {
namespace {

using latent::LatentEvaluator;
using latent::Memory;
using latent::Weights;
using WeightsPtr = std::shared_ptr<const Weights>;
using MemoryPtr = std::shared_ptr<const Memory>;

WeightsPtr make_weights(AnyArray embedding_VD, AnyArray encoder_weight, AnyArray encoder_bias, AnyArray query_weight,
                        AnyArray query_bias, AnyArray read_weight, AnyArray read_bias, AnyArray cell_weight_ih,
                        AnyArray cell_weight_hh, AnyArray cell_bias_ih, AnyArray cell_bias_hh, AnyArray linear_weight,
                        AnyArray linear_bias, AnyArray in_weight, AnyArray in_bias, AnyArray out_weight,
                        AnyArray out_bias, AnyArray fusion_L, AnyArray critic_LD, AnyArray critic_bias_L,
                        AnyArray norm_D, AnyArray lm_head_VD, int64_t num_read_M, float norm_eps) {
    latent::Parameters p{};
    p.embedding_VD = checked<const float>(embedding_VD, "embedding_VD", {-1, -1});
    p.critic_LD = checked<const float>(critic_LD, "critic_LD", {-1, -1});
    p.encoder_weight = checked<const float>(encoder_weight, "encoder_weight", {-1, -1});
    p.in_weight = checked<const float>(in_weight, "in_weight", {-1, -1});
    p.vocab_V = embedding_VD.shape(0);
    const int64_t D = p.d_model_D = embedding_VD.shape(1);
    const int64_t L = p.num_layers_L = critic_LD.shape(0);
    const int64_t G = p.width_G = encoder_weight.shape(0);
    const int64_t W = p.decoder_W = in_weight.shape(0);
    const int64_t M = p.num_read_M = num_read_M;
    p.query_weight = checked<const float>(query_weight, "query_weight", {-1, G + D});
    p.read_weight = checked<const float>(read_weight, "read_weight", {G, -1});
    const int64_t queries = query_weight.shape(0), read = read_weight.shape(1);
    if (M < 1 || queries % M != 0 || read % M != 0 || p.vocab_V < 1) {
        throw std::invalid_argument("num_read_M = " + std::to_string(M) + "; allowed: a divisor of " +
                                    std::to_string(queries) + " queries and of " + std::to_string(read) + " inputs");
    }
    p.d_state_N = queries / M;
    p.inner_E = read / M;
    p.critic_LD = checked<const float>(critic_LD, "critic_LD", {L, D});
    p.encoder_weight = checked<const float>(encoder_weight, "encoder_weight", {G, L * D});
    p.encoder_bias = checked<const float>(encoder_bias, "encoder_bias", {G});
    p.query_bias = checked<const float>(query_bias, "query_bias", {queries});
    p.read_bias = checked<const float>(read_bias, "read_bias", {G});
    p.cell_weight_ih = checked<const float>(cell_weight_ih, "cell_weight_ih", {3 * G, D + G});
    p.cell_weight_hh = checked<const float>(cell_weight_hh, "cell_weight_hh", {3 * G, G});
    p.cell_bias_ih = checked<const float>(cell_bias_ih, "cell_bias_ih", {3 * G});
    p.cell_bias_hh = checked<const float>(cell_bias_hh, "cell_bias_hh", {3 * G});
    p.linear_weight = checked<const float>(linear_weight, "linear_weight", {L * D, G});
    p.linear_bias = checked<const float>(linear_bias, "linear_bias", {L * D});
    p.in_weight = checked<const float>(in_weight, "in_weight", {W, G});
    p.in_bias = checked<const float>(in_bias, "in_bias", {W});
    p.out_weight = checked<const float>(out_weight, "out_weight", {L * D, W});
    p.out_bias = checked<const float>(out_bias, "out_bias", {L * D});
    p.fusion_L = checked<const float>(fusion_L, "fusion_L", {L});
    p.critic_bias_L = checked<const float>(critic_bias_L, "critic_bias_L", {L});
    p.norm_D = checked<const float>(norm_D, "norm_D", {D});
    p.lm_head_VD = checked<const float>(lm_head_VD, "lm_head_VD", {p.vocab_V, D});
    p.norm_eps = norm_eps;
    nb::gil_scoped_release release;
    return std::make_shared<const Weights>(p);
}

// The memory and the weights must be of one model; their sizes are what can be compared.
void check_pair(const Weights& weights, const Memory& memory) {
    if (!memory.fits(weights)) throw std::invalid_argument("memory: of other sizes; allowed: one made with these weights");
}

void check_range(const char* name, const int64_t* values, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; ++i) {
        if (values[i] < 0 || values[i] >= size) {
            throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] = " +
                                        std::to_string(values[i]) + "; allowed: 0 to " + std::to_string(size - 1));
        }
    }
}

MemoryPtr make_memory(WeightsPtr weights, AnyArray memory_BMHPN, int threads) {
    if (memory_BMHPN.ndim() != 5 ||
        static_cast<int64_t>(memory_BMHPN.shape(2) * memory_BMHPN.shape(3)) != weights->inner_E) {
        throw std::invalid_argument("memory_BMHPN: wrong shape; allowed: (any, " + std::to_string(weights->num_read_M) +
                                    ", H, P, " + std::to_string(weights->d_state_N) + ") with H·P = " +
                                    std::to_string(weights->inner_E));
    }
    const float* data = checked<const float>(memory_BMHPN, "memory_BMHPN", {-1, weights->num_read_M, -1, -1,
                                                                            weights->d_state_N});
    const int64_t count = memory_BMHPN.shape(0);
    nb::gil_scoped_release release;
    return std::make_shared<const Memory>(*weights, data, count, threads);
}

Buffer<int64_t> as_buffer(const std::vector<int64_t>& from) {
    Buffer<int64_t> to(static_cast<int64_t>(from.size()));
    std::copy(from.begin(), from.end(), to.data());
    return to;
}

nb::tuple project(WeightsPtr weights, MemoryPtr memory, AnyArray hidden_BLD, AnyArray known_B, int64_t lag,
                  int64_t hypotheses, int threads) {
    check_pair(*weights, *memory);
    const int64_t batch = memory->count(), L = weights->num_layers_L, D = weights->d_model_D;
    const float* hidden = checked<const float>(hidden_BLD, "hidden_BLD", {batch, L, D});
    const int64_t* known = checked<const int64_t>(known_B, "known_B", {batch});
    check_range("known_B", known, batch, weights->vocab_V);
    if (lag < 0 || hypotheses < 1 || batch < 1) {
        throw std::invalid_argument("lag = " + std::to_string(lag) + ", hypotheses = " + std::to_string(hypotheses) +
                                    ", snapshots = " + std::to_string(batch) +
                                    "; allowed: at least 0, at least 1, at least 1");
    }
    latent::Future future;
    {
        nb::gil_scoped_release release;
        future = latent::project(*weights, *memory, hidden, known, lag, hypotheses, threads);
    }
    const size_t rows = future.memory_F.size();
    return nb::make_tuple(to_numpy(std::move(future.latent_FG), {rows, static_cast<size_t>(weights->width_G)}),
                          to_numpy(std::move(future.hidden_FLD), {rows, static_cast<size_t>(L), static_cast<size_t>(D)}),
                          to_numpy(as_buffer(future.memory_F), {rows}),
                          to_numpy(as_buffer(future.assumed_FT), {rows, static_cast<size_t>(lag)}));
}

// One token further from given latents: new latents and predicted residual streams.
nb::tuple advance(WeightsPtr weights, MemoryPtr memory, AnyArray memory_R, AnyArray latent_RG, AnyArray token_R,
                  int threads) {
    check_pair(*weights, *memory);
    const Weights& w = *weights;
    const float* from = checked<const float>(latent_RG, "latent_RG", {-1, w.width_G});
    const int64_t rows = latent_RG.shape(0);
    const int64_t* token = checked<const int64_t>(token_R, "token_R", {rows});
    const int64_t* snapshot = checked<const int64_t>(memory_R, "memory_R", {rows});
    check_range("token_R", token, rows, w.vocab_V);
    check_range("memory_R", snapshot, rows, memory->count());
    Buffer<float> latent_out(rows * w.width_G), hidden_out(rows * w.hidden_size());
    {
        nb::gil_scoped_release release;
        latent::Chunks chunks(w, 0, threads);
        chunks.run(rows, [&](int64_t begin, int64_t end, latent::Workspace& work, int) {
            const int64_t G = w.width_G;
            std::copy(from + begin * G, from + end * G, work.latent_RG.data());
            std::copy(token + begin, token + end, work.token_R.begin());
            std::copy(snapshot + begin, snapshot + end, work.memory_R.begin());
            latent::advance(w, *memory, end - begin, work);
            for (int64_t row = 0; row < end - begin; ++row) {
                const float* made = work.features_RF.data() + row * (G + w.decoder_W);
                std::copy(made, made + G, latent_out.data() + (begin + row) * G);
            }
            latent::decode(w, end - begin, hidden_out.data() + begin * w.hidden_size(), work);
        });
    }
    return nb::make_tuple(to_numpy(std::move(latent_out), {static_cast<size_t>(rows), static_cast<size_t>(w.width_G)}),
                          to_numpy(std::move(hidden_out), {static_cast<size_t>(rows), static_cast<size_t>(w.num_layers_L),
                                                           static_cast<size_t>(w.d_model_D)}));
}

// The fused policy head and the critics: logits over the vocabulary, and values per layer.
nb::tuple heads(WeightsPtr weights, AnyArray hidden_RLD, int threads) {
    const Weights& w = *weights;
    const float* hidden = checked<const float>(hidden_RLD, "hidden_RLD", {-1, w.num_layers_L, w.d_model_D});
    const int64_t rows = hidden_RLD.shape(0);
    Buffer<float> logits(rows * w.vocab_V), values(rows * w.num_layers_L);
    {
        nb::gil_scoped_release release;
        latent::Workspace work(w, rows, 0);
        latent::heads(w, hidden, rows, values.data(), work);
        latent::logits(w, work.normed_RD.data(), rows, logits.data(), threads);
    }
    return nb::make_tuple(to_numpy(std::move(logits), {static_cast<size_t>(rows), static_cast<size_t>(w.vocab_V)}),
                          to_numpy(std::move(values), {static_cast<size_t>(rows), static_cast<size_t>(w.num_layers_L)}));
}

std::shared_ptr<LatentEvaluator> make_evaluator(WeightsPtr weights, MemoryPtr memory, AnyArray memory_F,
                                                AnyArray latent_FG, AnyArray hidden_FLD,
                                                std::vector<int64_t> terminal_tokens, int64_t num_actions, int threads) {
    check_pair(*weights, *memory);
    const float* latent = checked<const float>(latent_FG, "latent_FG", {-1, weights->width_G});
    const int64_t trees = latent_FG.shape(0);
    const float* hidden =
        checked<const float>(hidden_FLD, "hidden_FLD", {trees, weights->num_layers_L, weights->d_model_D});
    const int64_t* snapshot = checked<const int64_t>(memory_F, "memory_F", {trees});
    nb::gil_scoped_release release;
    return std::make_shared<LatentEvaluator>(std::move(weights), std::move(memory), snapshot, latent, hidden, trees,
                                             std::move(terminal_tokens), num_actions, threads);
}

}  // namespace

void bind_latent(nb::module_& m) {
    nb::class_<Weights>(m, "LatentWeights", "Packed weights of world model, policy head and critics; immutable.")
        .def_prop_ro("bytes", &Weights::bytes)
        .def_prop_ro("has_table", &Weights::has_table);
    m.def("latent_weights", &make_weights, nb::arg("embedding_VD"), nb::arg("encoder_weight"), nb::arg("encoder_bias"),
          nb::arg("query_weight"), nb::arg("query_bias"), nb::arg("read_weight"), nb::arg("read_bias"),
          nb::arg("cell_weight_ih"), nb::arg("cell_weight_hh"), nb::arg("cell_bias_ih"), nb::arg("cell_bias_hh"),
          nb::arg("linear_weight"), nb::arg("linear_bias"), nb::arg("in_weight"), nb::arg("in_bias"),
          nb::arg("out_weight"), nb::arg("out_bias"), nb::arg("fusion_L"), nb::arg("critic_LD"),
          nb::arg("critic_bias_L"), nb::arg("norm_D"), nb::arg("lm_head_VD"), nb::arg("num_read_M"),
          nb::arg("norm_eps"));
    nb::class_<Memory>(m, "LatentMemory", "SSM memories of some snapshots: a checked view that keeps its array.")
        .def_prop_ro("count", &Memory::count);
    m.def("latent_memory", &make_memory, nb::arg("weights"), nb::arg("memory_BMHPN"), nb::arg("threads") = 0,
          nb::keep_alive<0, 2>());
    m.def("latent_project", &project, nb::arg("weights"), nb::arg("memory"), nb::arg("hidden_BLD"), nb::arg("known_B"),
          nb::arg("lag"), nb::arg("hypotheses"), nb::arg("threads") = 0);
    m.def("latent_advance", &advance, nb::arg("weights"), nb::arg("memory"), nb::arg("memory_R"), nb::arg("latent_RG"),
          nb::arg("token_R"), nb::arg("threads") = 0);
    m.def("latent_heads", &heads, nb::arg("weights"), nb::arg("hidden_RLD"), nb::arg("threads") = 0);
    nb::class_<LatentEvaluator, search::Evaluator>(m, "LatentEvaluator", "The latent network, over F trees.")
        .def(
            "remap",
            [](LatentEvaluator& self, AnyArray new_from_old_BS, int64_t slots) {
                const int64_t* map = checked<const int64_t>(new_from_old_BS, "new_from_old_BS", {self.num_trees(), -1});
                self.remap(map, static_cast<int64_t>(new_from_old_BS.shape(1)), slots);
            },
            nb::arg("new_from_old_BS"), nb::arg("slots"), "Moves the latents of trees that are used again.");
    m.def("latent_evaluator", &make_evaluator, nb::arg("weights"), nb::arg("memory"), nb::arg("memory_F"),
          nb::arg("latent_FG"), nb::arg("hidden_FLD"), nb::arg("terminal_tokens"), nb::arg("num_actions"),
          nb::arg("threads") = 0);
}

}  // namespace crsm
