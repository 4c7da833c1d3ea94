// The decoder of crsm/native/decoder.py, and packing as a function of its own for tests.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_exact.hpp"
#include "bound_slots.hpp"
#include "decoder.hpp"

namespace crsm {
namespace {

WeightType weight_type(const std::string& name) {
    if (name == "fp32") return WeightType::fp32;
    if (name == "bf16") return WeightType::bf16;
    if (name == "int8") return WeightType::int8;
    throw std::invalid_argument("weights = '" + name + "'; allowed: 'fp32', 'bf16', 'int8'");
}

int64_t positive(int64_t value, const char* name) {
    constexpr int64_t kLargest = int64_t{1} << 31;  // products of two sizes fit
    if (value < 1 || value >= kLargest) {
        throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) + "; allowed: 1 to 2^31 - 1");
    }
    return value;
}

// The tensors of a state as the decoder uses them, checked once, with what keeps them alive.
struct StateMemory {
    int64_t batch = 0;
    std::vector<float*> conv, ssm;  // per layer
    int64_t conv_count = 0, ssm_count = 0;  // numbers of one tensor
    bool apart = false;  // no two tensors share memory: it may be written
    std::vector<AnyArray> arrays;
    nb::object owner;
};

// Whether pieces of `count` numbers from these addresses on have no memory in common.
bool lie_apart(std::vector<float*> addresses, int64_t count) {
    std::sort(addresses.begin(), addresses.end());
    for (size_t i = 1; i < addresses.size(); ++i) {
        if (addresses[i] < addresses[i - 1] + count) return false;
    }
    return true;
}
// Whether what is written has no memory in common with what is read, which may share memory itself.
bool lie_apart(const std::vector<float*>& read, std::vector<float*> written, int64_t count) {
    std::sort(written.begin(), written.end());
    for (const float* piece : read) {
        // The first piece that ends behind this one's begin; the pieces themselves lie apart.
        const auto next = std::upper_bound(written.begin(), written.end(), piece,
                                           [count](const float* x, const float* y) { return x < y + count; });
        if (next != written.end() && *next < piece + count) return false;
    }
    return true;
}

// A decoder that Python holds, with what it must keep alive.
class BoundDecoder {
public:
    BoundDecoder(int64_t d_model, int64_t n_layer, int64_t d_state, int64_t headdim, int64_t n_heads, int64_t d_conv,
                 int64_t vocab_size, double norm_eps, const std::string& weights, bool head)
        : decoder_(std::make_shared<Decoder>(
              DecodeSizes{positive(d_model, "d_model"), positive(n_layer, "n_layer"), positive(d_state, "d_state"),
                          positive(headdim, "headdim"), positive(n_heads, "n_heads"), positive(d_conv - 1, "d_conv - 1") + 1,
                          positive(vocab_size, "vocab_size"), static_cast<float>(norm_eps)},
              weight_type(weights), head)) {}

    void load_embedding(AnyArray embedding) {
        const DecodeSizes& sizes = decoder_->sizes();
        decoder_->set_embedding(checked<const float>(embedding, "embedding", {sizes.vocab_size, sizes.d_model}));
        embedding_ = embedding;
    }

    void load_layer(int64_t index, AnyArray norm, AnyArray in_proj, AnyArray conv_weight, AnyArray conv_bias,
                    AnyArray dt_bias, AnyArray A, AnyArray D, AnyArray gated_norm, AnyArray out_proj, int threads) {
        const DecodeSizes& s = decoder_->sizes();
        if (index < 0 || index >= s.n_layer) {
            throw std::invalid_argument("layer = " + std::to_string(index) + "; allowed: 0 to " +
                                        std::to_string(s.n_layer - 1));
        }
        const Decoder::LayerSource source{
            checked<const float>(norm, "norm", {s.d_model}),
            checked<const float>(in_proj, "in_proj", {s.projected(), s.d_model}),
            checked<const float>(conv_weight, "conv_weight", {s.conv_channels(), s.d_conv}),
            checked<const float>(conv_bias, "conv_bias", {s.conv_channels()}),
            checked<const float>(dt_bias, "dt_bias", {s.n_heads}),
            checked<const float>(A, "A", {s.n_heads}),
            checked<const float>(D, "D", {s.n_heads}),
            checked<const float>(gated_norm, "gated_norm", {s.d_inner()}),
            checked<const float>(out_proj, "out_proj", {s.d_model, s.d_inner()}),
        };
        nb::gil_scoped_release release;
        decoder_->pack_layer(index, source, threads);
    }

    void load_head(AnyArray fusion, AnyArray norm, AnyArray lm_head, int threads) {
        const DecodeSizes& s = decoder_->sizes();
        require_head();
        const float* fusion_L = checked<const float>(fusion, "fusion", {s.n_layer});
        const float* norm_D = checked<const float>(norm, "norm", {s.d_model});
        const float* lm_head_VD = checked<const float>(lm_head, "lm_head", {s.vocab_size, s.d_model});
        nb::gil_scoped_release release;
        decoder_->pack_head(fusion_L, norm_D, lm_head_VD, threads);
    }

    // New memory for a state, conv (L, B, C, K-1) and ssm (L, B, H, P, N); it returns to the pool when Python drops it.
    nb::tuple new_state(int64_t batch) {
        const DecodeSizes& s = decoder_->sizes();
        const size_t L = size(s.n_layer), B = size(positive(batch, "batch"));
        const auto conv = pooled({L, B, size(s.conv_channels()), size(s.d_conv - 1)});
        const auto ssm = pooled({L, B, size(s.n_heads), size(s.headdim), size(s.d_state)});
        StateMemory memory = empty_memory(batch);
        for (int64_t layer = 0; layer < s.n_layer; ++layer) {
            memory.conv.push_back(conv.data() + layer * memory.conv_count);
            memory.ssm.push_back(ssm.data() + layer * memory.ssm_count);
        }
        memory.apart = true;
        memory.owner = nb::make_tuple(conv, ssm);
        nb::object arrays = memory.owner;
        return nb::make_tuple(arrays[0], arrays[1], std::move(memory));
    }

    // The memory of tensors that are there: conv (B, C, K-1) and ssm (B, H, P, N), one of each a layer.
    StateMemory state_of(const std::vector<AnyArray>& conv, const std::vector<AnyArray>& ssm) const {
        const DecodeSizes& s = decoder_->sizes();
        if (static_cast<int64_t>(conv.size()) != s.n_layer || ssm.size() != conv.size()) {
            throw std::invalid_argument("the state has " + std::to_string(conv.size()) + " conv_BCK and " +
                                        std::to_string(ssm.size()) + " ssm_BHPN; allowed: one of each a layer, " +
                                        std::to_string(s.n_layer));
        }
        if (conv[0].ndim() < 1) throw std::invalid_argument("conv_BCK has shape (); allowed: (B, C, K-1)");
        StateMemory memory = empty_memory(static_cast<int64_t>(conv[0].shape(0)));
        for (size_t layer = 0; layer < conv.size(); ++layer) {
            memory.conv.push_back(
                checked<float>(conv[layer], "conv_BCK", {memory.batch, s.conv_channels(), s.d_conv - 1}));
            memory.ssm.push_back(
                checked<float>(ssm[layer], "ssm_BHPN", {memory.batch, s.n_heads, s.headdim, s.d_state}));
        }
        memory.apart = lie_apart(memory.conv, memory.conv_count) && lie_apart(memory.ssm, memory.ssm_count);
        memory.arrays = conv;
        memory.arrays.insert(memory.arrays.end(), ssm.begin(), ssm.end());
        return memory;
    }

    // `to` may be `from`: then the state is moved in place.
    void step(AnyArray token, const StateMemory& from, StateMemory& to, AnyArray hidden, AnyArray decay,
              std::optional<AnyArray> logits, int threads) {
        DecodeStep step = checked_step(token, from, to, hidden, decay, logits);
        nb::gil_scoped_release release;
        decoder_->step(step, threads);
    }

    // `said` [B, T]: T tokens, each the likeliest after those before it; among equals the lowest id.
    void greedy(AnyArray token, const StateMemory& from, StateMemory& to, AnyArray hidden, AnyArray decay,
                AnyArray logits, AnyArray said, int threads) {
        DecodeStep step = checked_step(token, from, to, hidden, decay, logits);
        int64_t* out = checked<int64_t>(said, "said", {step.batch, -1});
        const int64_t count = static_cast<int64_t>(said.shape(1)), vocab = decoder_->sizes().vocab_size;
        nb::gil_scoped_release release;
        std::vector<int64_t> next(size(step.batch));
        for (int64_t place = 0; place < count; ++place) {
            decoder_->step(step, threads);
            for (int64_t row = 0; row < step.batch; ++row) {
                const float* scores = step.logits_BV + row * vocab;
                next[size(row)] = std::max_element(scores, scores + vocab) - scores;
                out[row * count + place] = next[size(row)];
            }
            step.token_B = next.data();
            step.conv_in = to.conv.data();
            step.ssm_in = to.ssm.data();
        }
    }

    void logits(AnyArray hidden, AnyArray logits, int threads) {
        const DecodeSizes& s = decoder_->sizes();
        require_head();
        const float* from = checked<const float>(hidden, "hidden_BLD", {-1, s.n_layer, s.d_model});
        const int64_t batch = static_cast<int64_t>(hidden.shape(0));
        float* to = checked<float>(logits, "logits_BV", {batch, s.vocab_size});
        nb::gil_scoped_release release;
        decoder_->logits(batch, from, to, threads);
    }

    int64_t bytes_of_weights() const { return decoder_->bytes_of_weights(); }

    BoundSlots slots(int64_t capacity) const {
        require_head();
        return BoundSlots(decoder_, capacity);
    }

    BoundExact exact(AnyArray critic, AnyArray critic_bias) const {
        require_head();
        return BoundExact(decoder_, critic, critic_bias);
    }

private:
    static size_t size(int64_t value) { return static_cast<size_t>(value); }

    DecodeStep checked_step(const AnyArray& token, const StateMemory& from, const StateMemory& to,
                            const AnyArray& hidden, const AnyArray& decay, const std::optional<AnyArray>& logits) const {
        const DecodeSizes& s = decoder_->sizes();
        DecodeStep step;
        step.token_B = checked<const int64_t>(token, "token_B", {-1});
        step.batch = static_cast<int64_t>(token.shape(0));
        for (int64_t row = 0; row < step.batch; ++row) {
            if (step.token_B[row] < 0 || step.token_B[row] >= s.vocab_size) {
                throw std::invalid_argument("token_B[" + std::to_string(row) + "] = " +
                                            std::to_string(step.token_B[row]) + "; allowed: 0 to " +
                                            std::to_string(s.vocab_size - 1));
            }
        }
        check_state(from, step.batch);
        check_state(to, step.batch);
        if (!to.apart || (&from != &to && !(lie_apart(from.conv, to.conv, from.conv_count) &&
                                            lie_apart(from.ssm, to.ssm, from.ssm_count)))) {
            throw std::invalid_argument("tensors of the new state share memory; allowed: memory of its own for each");
        }
        step.conv_in = from.conv.data();
        step.ssm_in = from.ssm.data();
        step.conv_out = to.conv.data();
        step.ssm_out = to.ssm.data();
        step.hidden_BLD = checked<float>(hidden, "hidden_BLD", {step.batch, s.n_layer, s.d_model});
        step.decay_LBH = checked<float>(decay, "decay_LBH", {s.n_layer, step.batch, s.n_heads});
        step.conv_stride = s.conv_channels() * (s.d_conv - 1);
        step.ssm_stride = s.d_inner() * s.d_state;
        step.hidden_stride = s.n_layer * s.d_model;
        step.decay_stride = step.batch * s.n_heads;
        if (logits.has_value()) {
            require_head();
            step.logits_BV = checked<float>(*logits, "logits_BV", {step.batch, s.vocab_size});
        }
        if (!embedding_.is_valid()) throw std::invalid_argument("weights are not loaded; allowed: after load_embedding");
        return step;
    }

    void require_head() const {
        if (!decoder_->has_head()) throw std::invalid_argument("head = False; allowed: logits of a decoder with a head");
    }

    StateMemory empty_memory(int64_t batch) const {
        const DecodeSizes& s = decoder_->sizes();
        StateMemory memory;
        memory.batch = batch;
        memory.conv_count = batch * s.conv_channels() * (s.d_conv - 1);
        memory.ssm_count = batch * s.d_inner() * s.d_state;
        return memory;
    }

    void check_state(const StateMemory& memory, int64_t batch) const {
        const StateMemory mine = empty_memory(batch);
        if (memory.batch != batch || memory.conv_count != mine.conv_count || memory.ssm_count != mine.ssm_count ||
            static_cast<int64_t>(memory.conv.size()) != decoder_->sizes().n_layer) {
            throw std::invalid_argument("the state is of batch " + std::to_string(memory.batch) + " and " +
                                        std::to_string(memory.conv.size()) + " layers; allowed: of this model, batch " +
                                        std::to_string(batch));
        }
    }

    nb::ndarray<nb::numpy, float> pooled(std::initializer_list<size_t> shape) {
        struct Lent {
            std::shared_ptr<PagePool> pool;  // lives as long as what it lent
            Pages pages;
        };
        size_t bytes = sizeof(float);
        for (const size_t extent : shape) bytes *= extent;
        auto lent = std::make_unique<Lent>(Lent{decoder_->pool(), decoder_->pool()->take(bytes)});
        float* data = static_cast<float*>(lent->pages.data());
        nb::capsule owner(lent.release(), [](void* p) noexcept {
            std::unique_ptr<Lent> lent(static_cast<Lent*>(p));
            lent->pool->give_back(std::move(lent->pages));
        });
        return nb::ndarray<nb::numpy, float>(data, shape, owner);
    }

    std::shared_ptr<Decoder> decoder_;
    AnyArray embedding_;
};

// y[M, N] = x[M, K] · weight[N, K]ᵀ with the weights packed as the type says.
void linear_as(AnyArray x, AnyArray weight, AnyArray y, const std::string& weights, int threads) {
    const WeightType type = weight_type(weights);
    const float* w = checked<const float>(weight, "weight", {-1, -1});
    const int64_t columns = weight.shape(0), depth = weight.shape(1);
    const float* in = checked<const float>(x, "x", {-1, depth});
    const int64_t rows = x.shape(0);
    float* out = checked<float>(y, "y", {rows, columns});
    nb::gil_scoped_release release;
    Buffer<char> panels(packed_floats(depth, columns) * bytes_of(type));
    Buffer<float> scales(scale_floats(depth, columns));
    const PackedMatrix packed = pack_as(type, w, 1, depth, depth, columns, panels.data(), scales.data(), threads);
    gemm(packed, rows, in, depth, 1, out, columns, nullptr, false, threads);
}

}  // namespace

void bind_decode(nb::module_& m) {
    m.def("linear_as", &linear_as, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("weights"),
          nb::arg("threads") = 0);
    nb::class_<StateMemory>(m, "StateMemory").def_ro("apart", &StateMemory::apart);
    nb::class_<BoundDecoder>(m, "Decoder")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, const std::string&, bool>(),
             nb::kw_only(), nb::arg("d_model"), nb::arg("n_layer"), nb::arg("d_state"), nb::arg("headdim"),
             nb::arg("n_heads"), nb::arg("d_conv"), nb::arg("vocab_size"), nb::arg("norm_eps"), nb::arg("weights"),
             nb::arg("head"))
        .def("load_embedding", &BoundDecoder::load_embedding, nb::arg("embedding"))
        .def("load_layer", &BoundDecoder::load_layer, nb::arg("layer"), nb::arg("norm"), nb::arg("in_proj"),
             nb::arg("conv_weight"), nb::arg("conv_bias"), nb::arg("dt_bias"), nb::arg("A"), nb::arg("D"),
             nb::arg("gated_norm"), nb::arg("out_proj"), nb::arg("threads") = 0)
        .def("load_head", &BoundDecoder::load_head, nb::arg("fusion"), nb::arg("norm"), nb::arg("lm_head"),
             nb::arg("threads") = 0)
        .def("new_state", &BoundDecoder::new_state, nb::arg("batch"))
        .def("state_of", &BoundDecoder::state_of, nb::arg("conv"), nb::arg("ssm"))
        .def("step", &BoundDecoder::step, nb::arg("token"), nb::arg("from_state"), nb::arg("to_state"),
             nb::arg("hidden"), nb::arg("decay"), nb::arg("logits").none(), nb::arg("threads") = 0)
        .def("greedy", &BoundDecoder::greedy, nb::arg("token"), nb::arg("from_state"), nb::arg("to_state"),
             nb::arg("hidden"), nb::arg("decay"), nb::arg("logits"), nb::arg("said"), nb::arg("threads") = 0)
        .def("logits", &BoundDecoder::logits, nb::arg("hidden"), nb::arg("logits"), nb::arg("threads") = 0)
        .def("slots", &BoundDecoder::slots, nb::arg("capacity"), nb::keep_alive<0, 1>())
        .def("exact", &BoundDecoder::exact, nb::arg("critic"), nb::arg("critic_bias"), nb::keep_alive<0, 1>())
        .def_prop_ro("bytes_of_weights", &BoundDecoder::bytes_of_weights);
}

}  // namespace crsm
