#include "network.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../threads.hpp"

namespace crsm::latent {
namespace {

constexpr float kReadEps = 1e-6f;
// Below this many rows a second thread gains less than its wake-up and a second pass over the weights cost.
constexpr int64_t kRowsPerThread = 4;
// Rows that a workspace has room for at least; so many threads can share the vocabulary of one row.
constexpr int64_t kLeastRows = 8;

size_t bytes(int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); }

int64_t num_slices(const Weights& weights) { return (weights.vocab_V + kSlice - 1) / kSlice; }

// One part of the vocabulary: columns [slice·kSlice, …) of its matrix.
PackedMatrix slice_of(const Weights& weights, int64_t slice) {
    PackedMatrix part = weights.lm_head.packed;
    part.panels = static_cast<const float*>(part.panels) + slice * kSlice * part.rows_K;
    part.columns_N = std::min(kSlice, weights.vocab_V - slice * kSlice);
    return part;
}
static_assert(kSlice % kPanel == 0);

// This thread alone; callers share out rows.
void product(const PackedMatrix& matrix, int64_t rows, const float* a, int64_t a_row, float* c, int64_t c_row,
             const float* bias, bool accumulate) {
    gemm_table().gemm(matrix, rows, a, a_row, 1, c, c_row, bias, accumulate, 0, matrix.num_panels());
}

}  // namespace

Workspace::Workspace(const Weights& w, int64_t rows, int64_t keep)
    : latent_RG(rows * w.width_G),
      features_RF(rows * (w.width_G + w.decoder_W)),
      hidden_RLD(rows * w.hidden_size()),
      normed_RD(rows * w.d_model_D),
      memory_R(static_cast<size_t>(rows)),
      token_R(static_cast<size_t>(rows)),
      from_latent_RX(rows * (w.gates() + w.queries())),
      from_token_RX(rows * (w.gates() + w.queries())),
      embedded_RD(w.has_table() ? 0 : rows * w.d_model_D),
      read_RE(rows * w.read_width()),
      input_RG(rows * w.width_G),
      logits_RV(keep > 0 ? rows * std::min(kSlice, w.vocab_V) : 0),
      candidates(rows * num_slices(w) * std::min(keep, kSlice)),
      sums(keep > 0 ? rows * num_slices(w) : 0) {}

void begin(const Weights& w, const float* hidden_RLD, int64_t rows, float* latent_RG, int threads) {
    gemm(w.encoder.packed, rows, hidden_RLD, w.hidden_size(), 1, latent_RG, w.width_G, w.encoder_bias.data(), false,
         threads);
    latent_kernels().tanh_rows(latent_RG, rows * w.width_G);
}

void advance(const Weights& w, const Memory& memory, int64_t rows, Workspace& work) {
    const LatentKernels& kernels = latent_kernels();
    const int64_t G = w.width_G, gates = w.gates(), queries = w.queries(), width = gates + queries;
    float* from_latent = work.from_latent_RX.data();
    float* from_token = work.from_token_RX.data();
    float* read = work.read_RE.data();

    const float* token_rows = from_token;  // stride: width
    if (w.has_table()) {
        for (int64_t row = 0; row < rows; ++row) {
            std::memcpy(from_token + row * width, w.token_table.data() + work.token_R[row] * width, bytes(gates));
        }
        token_rows = nullptr;
    } else {
        for (int64_t row = 0; row < rows; ++row) {
            std::memcpy(work.embedded_RD.data() + row * w.d_model_D,
                        w.embedding_VD.data() + work.token_R[row] * w.d_model_D, bytes(w.d_model_D));
        }
        product(w.from_token.packed, rows, work.embedded_RD.data(), w.d_model_D, from_token, width, w.token_bias.data(),
                false);
    }
    for (int64_t row = 0; row < rows; ++row) {
        const float* token_row = token_rows != nullptr ? token_rows + row * width
                                                       : w.token_table.data() + work.token_R[row] * width;
        std::memcpy(from_latent + row * width, w.gates_bias.data(), bytes(gates));
        std::memcpy(from_latent + row * width + gates, token_row + gates, bytes(queries));
    }
    product(w.from_latent.packed, rows, work.latent_RG.data(), G, from_latent, width, nullptr, true);

    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t layer = 0; layer < w.num_read_M; ++layer) {
            kernels.read(memory.layer(work.memory_R[static_cast<size_t>(row)], layer),
                         from_latent + row * width + gates + layer * w.d_state_N,
                         read + row * w.read_width() + layer * w.inner_E, w.inner_E, w.d_state_N);
        }
        kernels.rms_norm(read + row * w.read_width(), w.read_width(), kReadEps);
    }
    product(w.read.packed, rows, read, w.read_width(), work.input_RG.data(), G, w.read_bias.data(), false);
    product(w.from_read.packed, rows, work.input_RG.data(), G, from_token, width, nullptr, true);

    const int64_t stride = G + w.decoder_W;
    for (int64_t row = 0; row < rows; ++row) {
        kernels.gru(from_token + row * width, from_latent + row * width, work.latent_RG.data() + row * G,
                    work.features_RF.data() + row * stride, G);
    }
}

void decode(const Weights& w, int64_t rows, float* hidden_RLD, Workspace& work) {
    const int64_t stride = w.width_G + w.decoder_W;
    float* features = work.features_RF.data();
    product(w.decoder_in.packed, rows, features, stride, features + w.width_G, stride, w.decoder_in_bias.data(), false);
    for (int64_t row = 0; row < rows; ++row) {
        latent_kernels().silu_rows(features + row * stride + w.width_G, w.decoder_W);
    }
    product(w.decoder_out.packed, rows, features, stride, hidden_RLD, w.hidden_size(), w.decoder_out_bias.data(), false);
}

void heads(const Weights& w, const float* hidden_RLD, int64_t rows, float* values_RL, Workspace& work) {
    const HeadWeights weights = w.heads();
    for (int64_t row = 0; row < rows; ++row) {
        latent_kernels().heads(weights, hidden_RLD + row * w.hidden_size(),
                               values_RL == nullptr ? nullptr : values_RL + row * w.num_layers_L,
                               work.normed_RD.data() + row * w.d_model_D);
    }
}

void logits(const Weights& w, const float* normed_RD, int64_t rows, float* logits_RV, int threads) {
    gemm(w.lm_head.packed, rows, normed_RD, w.d_model_D, 1, logits_RV, w.vocab_V, nullptr, false, threads);
}

void policy(const Weights& w, int64_t rows, int64_t keep, int64_t* tokens_RA, float* log_probs_RA, Workspace& work,
            int threads) {
    const LatentKernels& kernels = latent_kernels();
    const int64_t slices = num_slices(w), places = std::min(keep, kSlice);
    const auto judge = [&](int64_t slice, int64_t first, int64_t count, float* logits) {
        const PackedMatrix part = slice_of(w, slice);
        product(part, count, work.normed_RD.data() + first * w.d_model_D, w.d_model_D, logits, part.columns_N, nullptr,
                false);
        for (int64_t row = first; row < first + count; ++row) {
            const int64_t at = row * slices + slice;
            work.sums.data()[at] = kernels.select(logits + (row - first) * part.columns_N, part.columns_N,
                                                  slice * kSlice, std::min(places, part.columns_N),
                                                  work.candidates.data() + at * places);
        }
    };
    // Threads that share slices need logits each: the workspace has room for as many as it has rows.
    const int64_t capacity = work.logits_RV.size() / std::min(kSlice, w.vocab_V);
    int64_t lanes = std::min<int64_t>(threads > 0 ? threads : num_threads(), std::min(slices, capacity / rows));
    if (rows * w.d_model_D * kSlice < 200'000) lanes = 1;
    if (lanes <= 1) {
        for (int64_t slice = 0; slice < slices; ++slice) judge(slice, 0, rows, work.logits_RV.data());
    } else {
        std::atomic<int64_t> next{0};
        parallel_for(lanes, static_cast<int>(lanes), [&](int64_t lane) {
            for (int64_t slice; (slice = next.fetch_add(1)) < slices;) {
                judge(slice, 0, rows, work.logits_RV.data() + lane * rows * std::min(kSlice, w.vocab_V));
            }
        });
    }
    for (int64_t row = 0; row < rows; ++row) {
        Candidate* candidates = work.candidates.data() + row * slices * places;
        if (slices > 1) {
            // The last slice may have fewer; the places of the others are full.
            const int64_t last = std::min(places, w.vocab_V - (slices - 1) * kSlice);
            kernels.best(candidates, (slices - 1) * places + last, keep);
        }
        write_best(candidates, work.sums.data() + row * slices, slices, keep, tokens_RA + row * keep,
                   log_probs_RA + row * keep);
    }
}

void write_best(const Candidate* candidates, const SliceSum* sums, int64_t slices, int64_t keep, int64_t* tokens_A,
                float* log_probs_A) {
    float max, log_sum;
    latent_kernels().log_sum(sums, slices, &max, &log_sum);
    for (int64_t action = 0; action < keep; ++action) {
        tokens_A[action] = candidates[action].token;
        log_probs_A[action] = (candidates[action].logit - max) - log_sum;
    }
}

void Chunks::run(int64_t rows, Body body, void* context) {
    const int64_t available = threads_ > 0 ? threads_ : num_threads();
    const int64_t threads = std::clamp<int64_t>(rows / kRowsPerThread, 1, available);
    // Equal chunks, a multiple of the threads in number.
    const int64_t rounds = (rows + threads * kChunk - 1) / (threads * kChunk);
    const int64_t chunks = threads * rounds;
    const int64_t size = (rows + chunks - 1) / chunks;
    if (size > workspace_rows_) {
        workspaces_.clear();
        workspace_rows_ = std::max(size, kLeastRows);
    }
    while (static_cast<int64_t>(workspaces_.size()) < threads) workspaces_.emplace_back(weights_, workspace_rows_, keep_);
    // Where rows do not occupy the threads, a large vocabulary may.
    const int inner = threads == 1 ? threads_ : 1;
    std::atomic<int64_t> next{0};
    parallel_for(threads, static_cast<int>(threads), [&](int64_t thread) {
        for (int64_t begin; (begin = next.fetch_add(size)) < rows;) {
            body(context, begin, std::min(begin + size, rows), workspaces_[static_cast<size_t>(thread)], inner);
        }
    });
}

}  // namespace crsm::latent
