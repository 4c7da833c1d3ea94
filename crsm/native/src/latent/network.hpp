// The latent network on rows: what LatentDynamics, the fused policy head and the critics of crsm/ compute, one row per
// imagined position. A row's result is bit by bit the same whatever rows are computed with it and however many threads
// take part. No function keeps state; any number of threads may call them with workspaces of their own.
#pragma once

#include <cstdint>
#include <vector>

#include "weights.hpp"

namespace crsm::latent {

// Logits that are made and judged at a time: they stay in the cache, and a large vocabulary can be shared by threads.
inline constexpr int64_t kSlice = 2048;

// Intermediate results of up to `rows` rows.
class Workspace {
public:
    // keep: candidates per row and slice that `policy` selects; 0: `policy` is not called.
    Workspace(const Weights& weights, int64_t rows, int64_t keep);

    Buffer<float> latent_RG;    // in: the latents to advance
    Buffer<float> features_RF;  // out: [new latent | silu(decoder_in)]; F = G + W
    Buffer<float> hidden_RLD;   // out: predicted residual streams
    Buffer<float> normed_RD;    // out: what the vocabulary's matrix is multiplied with
    std::vector<int64_t> memory_R, token_R;  // in: snapshot that is read, token that is consumed

    Buffer<float> from_latent_RX;  // hidden summand of the gates | queries
    Buffer<float> from_token_RX;   // input summand of the gates | queries
    Buffer<float> embedded_RD, read_RE, input_RG, logits_RV;
    Buffer<Candidate> candidates;  // [R][slices][keep]
    Buffer<SliceSum> sums;         // [R][slices]
};

// Rows that one workspace handles at once, at most: enough to read the weights rarely, few enough for a late thread to
// find work left and for intermediate results to stay in the cache. Two of the matrix product's tiles.
inline constexpr int64_t kChunk = 24;

// tanh(encoder(hidden)): latents of the snapshots' own positions.
void begin(const Weights& weights, const float* hidden_RLD, int64_t rows, float* latent_RG, int threads);

// Consumes token_R from latent_RG, reading memory_R: fills the first G columns of features_RF.
void advance(const Weights& weights, const Memory& memory, int64_t rows, Workspace& work);

// Residual streams from the first G columns of features_RF; fills the rest of it.
void decode(const Weights& weights, int64_t rows, float* hidden_RLD, Workspace& work);

// Values per layer (may be null), and normed_RD.
void heads(const Weights& weights, const float* hidden_RLD, int64_t rows, float* values_RL, Workspace& work);

// Logits over the vocabulary from normed_RD.
void logits(const Weights& weights, const float* normed_RD, int64_t rows, float* logits_RV, int threads);

// The `keep` most likely tokens and their log-probabilities from normed_RD; equal logits by token id. A row whose logits
// are not finite gets NaN. threads: of a large vocabulary's slices; 1 where rows are already shared among threads.
void policy(const Weights& weights, int64_t rows, int64_t keep, int64_t* tokens_RA, float* log_probs_RA, Workspace& work,
            int threads);

// Shares `rows` among threads in chunks: body(begin, end, workspace). Workspaces are made on first use and kept.
class Chunks {
public:
    Chunks(const Weights& weights, int64_t keep, int threads) : weights_(weights), keep_(keep), threads_(threads) {}

    template <typename F>
    void run(int64_t rows, F&& body) {
        run(
            rows,
            [](void* context, int64_t begin, int64_t end, Workspace& work, int threads) {
                (*static_cast<F*>(context))(begin, end, work, threads);
            },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

private:
    using Body = void (*)(void*, int64_t begin, int64_t end, Workspace& work, int threads);
    void run(int64_t rows, Body body, void* context);

    const Weights& weights_;
    int64_t keep_;
    int threads_;
    int64_t workspace_rows_ = 0;
    std::vector<Workspace> workspaces_;
};

}  // namespace crsm::latent
