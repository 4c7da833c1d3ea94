#include "weights.hpp"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../threads.hpp"

namespace crsm::latent {
namespace {

// A table of all tokens' products is made up to this size.
constexpr int64_t kTableBytes = 64 << 20;

Buffer<float> copy(const float* from, int64_t count) {
    Buffer<float> to(count);
    std::memcpy(to.data(), from, static_cast<size_t>(count) * sizeof(float));
    return to;
}

// Stacks blocks [rows, columns] of row-major matrices, each with a row stride and a first column, below one another.
struct Block {
    const float* data;
    int64_t rows, stride;
};
Buffer<float> stack(std::initializer_list<Block> blocks, int64_t columns) {
    int64_t rows = 0;
    for (const Block& block : blocks) rows += block.rows;
    Buffer<float> out(rows * columns);
    float* to = out.data();
    for (const Block& block : blocks) {
        for (int64_t row = 0; row < block.rows; ++row, to += columns) {
            std::memcpy(to, block.data + row * block.stride, static_cast<size_t>(columns) * sizeof(float));
        }
    }
    return out;
}

// The matrix of y = W·x for a layer's weight W [out, in].
OwnedMatrix pack_layer(const float* weight, int64_t out, int64_t in) {
    OwnedMatrix matrix{Buffer<float>(packed_floats(in, out)), {}};
    matrix.packed = pack(weight, 1, in, in, out, matrix.panels.data(), 0);
    return matrix;
}

}  // namespace

Weights::Weights(const Parameters& p)
    : num_layers_L(p.num_layers_L),
      d_model_D(p.d_model_D),
      width_G(p.width_G),
      decoder_W(p.decoder_W),
      vocab_V(p.vocab_V),
      num_read_M(p.num_read_M),
      inner_E(p.inner_E),
      d_state_N(p.d_state_N),
      norm_eps(p.norm_eps) {
    const int64_t G = width_G, D = d_model_D;
    encoder = pack_layer(p.encoder_weight, G, hidden_size());
    encoder_bias = copy(p.encoder_bias, G);

    Buffer<float> stacked = stack({{p.cell_weight_hh, gates(), G}, {p.query_weight, queries(), G + D}}, G);
    from_latent = pack_layer(stacked.data(), gates() + queries(), G);
    gates_bias = copy(p.cell_bias_hh, gates());

    stacked = stack({{p.cell_weight_ih, gates(), D + G}, {p.query_weight + G, queries(), G + D}}, D);
    const int64_t token_width = gates() + queries();
    from_token = pack_layer(stacked.data(), token_width, D);
    token_bias = Buffer<float>(token_width);
    std::memcpy(token_bias.data(), p.cell_bias_ih, static_cast<size_t>(gates()) * sizeof(float));
    std::memcpy(token_bias.data() + gates(), p.query_bias, static_cast<size_t>(queries()) * sizeof(float));
    embedding_VD = copy(p.embedding_VD, vocab_V * D);
    if (vocab_V * token_width * static_cast<int64_t>(sizeof(float)) <= kTableBytes) {
        token_table = Buffer<float>(vocab_V * token_width);
        gemm(from_token.packed, vocab_V, embedding_VD.data(), D, 1, token_table.data(), token_width, token_bias.data(),
             false, 0);
        embedding_VD = Buffer<float>();
        from_token = {};
    }

    read = pack_layer(p.read_weight, G, read_width());
    read_bias = copy(p.read_bias, G);
    stacked = stack({{p.cell_weight_ih + D, gates(), D + G}}, G);
    from_read = pack_layer(stacked.data(), gates(), G);

    decoder_in = pack_layer(p.in_weight, decoder_W, G);
    decoder_in_bias = copy(p.in_bias, decoder_W);
    const int64_t features = G + decoder_W;
    stacked = Buffer<float>(hidden_size() * features);
    decoder_out_bias = Buffer<float>(hidden_size());
    for (int64_t row = 0; row < hidden_size(); ++row) {
        float* to = stacked.data() + row * features;
        std::memcpy(to, p.linear_weight + row * G, static_cast<size_t>(G) * sizeof(float));
        std::memcpy(to + G, p.out_weight + row * decoder_W, static_cast<size_t>(decoder_W) * sizeof(float));
        decoder_out_bias.data()[row] = p.linear_bias[row] + p.out_bias[row];
    }
    decoder_out = pack_layer(stacked.data(), hidden_size(), features);

    fusion_L = copy(p.fusion_L, num_layers_L);
    critic_LD = copy(p.critic_LD, hidden_size());
    critic_bias_L = copy(p.critic_bias_L, num_layers_L);
    norm_D = copy(p.norm_D, D);
    lm_head = pack_layer(p.lm_head_VD, vocab_V, D);
}

int64_t Weights::bytes() const {
    int64_t floats = embedding_VD.size() + token_table.size();
    for (const OwnedMatrix* matrix : {&encoder, &from_latent, &from_token, &read, &from_read, &decoder_in, &decoder_out,
                                      &lm_head}) {
        floats += matrix->panels.size();
    }
    return floats * static_cast<int64_t>(sizeof(float));
}

Memory::Memory(const Weights& weights, const float* memory_BMEN, int64_t count_B, int threads)
    : memory_BMEN_(memory_BMEN),
      count_B_(count_B),
      layers_M_(weights.num_read_M),
      rows_E_(weights.inner_E),
      columns_N_(weights.d_state_N) {
    const int64_t size = rows_E_ * columns_N_, tasks = count_B * layers_M_;
    std::atomic<int64_t> bad{-1};
    parallel_for(tasks, tasks * size < (1 << 20) ? 1 : threads, [&](int64_t task) {
        if (latent_kernels().first_non_finite(memory_BMEN + task * size, size) == size) return;
        int64_t known = bad.load();
        while ((known < 0 || task < known) && !bad.compare_exchange_weak(known, task)) {
        }
    });
    if (bad.load() >= 0) {
        throw std::invalid_argument("memory: snapshot " + std::to_string(bad.load() / layers_M_) + ", read layer " +
                                    std::to_string(bad.load() % layers_M_) +
                                    " holds NaN or infinity; allowed: finite numbers");
    }
}

}  // namespace crsm::latent
