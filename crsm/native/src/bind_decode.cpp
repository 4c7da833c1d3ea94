// The decoder of crsm/native/decoder.py, and packing as a function of its own for tests.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "arrays.hpp"
#include "bindings.hpp"
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
        return nb::make_tuple(pooled({L, B, size(s.conv_channels()), size(s.d_conv - 1)}),
                              pooled({L, B, size(s.n_heads), size(s.headdim), size(s.d_state)}));
    }

    // conv_out and ssm_out: the lists of new tensors; an entry may be the tensor of the input list.
    void step(AnyArray token, const std::vector<AnyArray>& conv_in, const std::vector<AnyArray>& ssm_in,
              const std::vector<AnyArray>& conv_out, const std::vector<AnyArray>& ssm_out, AnyArray hidden,
              AnyArray decay, std::optional<AnyArray> logits, int threads) {
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
        const std::initializer_list<int64_t> conv_shape{step.batch, s.conv_channels(), s.d_conv - 1};
        const std::initializer_list<int64_t> ssm_shape{step.batch, s.n_heads, s.headdim, s.d_state};
        const auto conv_from = addresses<const float>(conv_in, "conv_BCK", conv_shape);
        const auto ssm_from = addresses<const float>(ssm_in, "ssm_BHPN", ssm_shape);
        const auto conv_to = addresses<float>(conv_out, "new conv_BCK", conv_shape);
        const auto ssm_to = addresses<float>(ssm_out, "new ssm_BHPN", ssm_shape);
        check_apart(conv_from, conv_to, step.batch * s.conv_channels() * (s.d_conv - 1), "conv_BCK");
        check_apart(ssm_from, ssm_to, step.batch * s.d_inner() * s.d_state, "ssm_BHPN");
        step.conv_in = conv_from.data();
        step.ssm_in = ssm_from.data();
        step.conv_out = conv_to.data();
        step.ssm_out = ssm_to.data();
        step.hidden_BLD = checked<float>(hidden, "hidden_BLD", {step.batch, s.n_layer, s.d_model});
        step.decay_LBH = checked<float>(decay, "decay_LBH", {s.n_layer, step.batch, s.n_heads});
        if (logits.has_value()) {
            require_head();
            step.logits_BV = checked<float>(*logits, "logits_BV", {step.batch, s.vocab_size});
        }
        if (!embedding_.is_valid()) throw std::invalid_argument("weights are not loaded; allowed: after load_embedding");
        nb::gil_scoped_release release;
        decoder_->step(step, threads);
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

private:
    static size_t size(int64_t value) { return static_cast<size_t>(value); }

    void require_head() const {
        if (!decoder_->has_head()) throw std::invalid_argument("head = False; allowed: logits of a decoder with a head");
    }

    template <typename T>
    std::vector<T*> addresses(const std::vector<AnyArray>& tensors, const char* name,
                              std::initializer_list<int64_t> shape) const {
        if (static_cast<int64_t>(tensors.size()) != decoder_->sizes().n_layer) {
            throw std::invalid_argument(std::string("the state has ") + std::to_string(tensors.size()) + " " + name +
                                        "; allowed: one a layer, " + std::to_string(decoder_->sizes().n_layer));
        }
        std::vector<T*> found;
        for (const AnyArray& tensor : tensors) found.push_back(checked<T>(tensor, name, shape));
        return found;
    }

    // What is written may be what is read for the same layer, and nothing else.
    static void check_apart(const std::vector<const float*>& from, const std::vector<float*>& to, int64_t count,
                            const char* name) {
        struct Use {
            const float* begin;
            bool written;
            size_t layer;
        };
        std::vector<Use> uses;
        for (size_t layer = 0; layer < from.size(); ++layer) {
            uses.push_back({from[layer], false, layer});
            uses.push_back({to[layer], true, layer});
        }
        std::sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) {
            return a.begin != b.begin ? a.begin < b.begin : a.layer != b.layer ? a.layer < b.layer : a.written < b.written;
        });
        // Sorted by address: whatever overlaps a piece begins before its end.
        for (size_t i = 0; i < uses.size(); ++i) {
            for (size_t j = i + 1; j < uses.size() && uses[j].begin < uses[i].begin + count; ++j) {
                const bool in_place = uses[i].begin == uses[j].begin && uses[i].layer == uses[j].layer;
                if ((uses[i].written || uses[j].written) && !in_place) {
                    throw std::invalid_argument(std::string(name) + " of layers " + std::to_string(uses[i].layer) +
                                                " and " + std::to_string(uses[j].layer) +
                                                " share memory; allowed: memory of its own for what is written");
                }
            }
        }
    }

    nb::ndarray<nb::numpy, float> pooled(std::initializer_list<size_t> shape) {
        struct Lent {
            std::shared_ptr<Decoder> decoder;  // the pool lives as long as what it lent
            Pages pages;
        };
        size_t bytes = sizeof(float);
        for (const size_t extent : shape) bytes *= extent;
        auto lent = std::make_unique<Lent>(Lent{decoder_, decoder_->pool().take(bytes)});
        float* data = static_cast<float*>(lent->pages.data());
        nb::capsule owner(lent.release(), [](void* p) noexcept {
            std::unique_ptr<Lent> lent(static_cast<Lent*>(p));
            lent->decoder->pool().give_back(std::move(lent->pages));
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
        .def("step", &BoundDecoder::step, nb::arg("token"), nb::arg("conv_in"), nb::arg("ssm_in"), nb::arg("conv_out"),
             nb::arg("ssm_out"), nb::arg("hidden"), nb::arg("decay"), nb::arg("logits").none(), nb::arg("threads") = 0)
        .def("logits", &BoundDecoder::logits, nb::arg("hidden"), nb::arg("logits"), nb::arg("threads") = 0)
        .def_prop_ro("bytes_of_weights", &BoundDecoder::bytes_of_weights);
}

}  // namespace crsm
