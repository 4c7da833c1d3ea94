#include "project.hpp"

#include <algorithm>
#include <numeric>

#include "../beam.hpp"
#include "../latent/kernels.hpp"

namespace crsm::exact {

void likeliest(const float* logits_RV, int64_t rows, int64_t vocab_V, int64_t keep, int64_t* tokens_RA,
               float* log_probs_RA) {
    std::vector<latent::Candidate> candidates(static_cast<size_t>(keep));
    for (int64_t row = 0; row < rows; ++row) {
        const latent::SliceSum sum =
            latent_kernels().select(logits_RV + row * vocab_V, vocab_V, 0, keep, candidates.data());
        latent::write_best(candidates.data(), &sum, 1, keep, tokens_RA + row * keep, log_probs_RA + row * keep);
    }
}

Future project(const Decoder& decoder, const Snapshots& snapshots, const int64_t* known_B, int64_t lag,
               int64_t hypotheses, int threads) {
    const int64_t vocab = decoder.sizes().vocab_size, keep = std::min(hypotheses, vocab);
    auto branches = std::make_shared<Branches>(decoder, snapshots);
    Beam beam(known_B, snapshots.count_B);
    std::vector<int64_t> node_F(beam.request_F), best_tokens;
    std::vector<float> logits, best_log_probs;
    for (int64_t i = 0; i <= lag; ++i) {
        if (i > 0) {
            std::vector<int64_t> parent_F =
                beam.follow(hypotheses, vocab, best_tokens.data(), best_log_probs.data());
            for (int64_t& parent : parent_F) parent = node_F[static_cast<size_t>(parent)];
            node_F = std::move(parent_F);
        }
        const int64_t rows = beam.futures(), first = branches->size();
        branches->resize(first + rows);
        std::vector<int64_t> next_F(static_cast<size_t>(rows));
        std::iota(next_F.begin(), next_F.end(), first);
        const bool last = i == lag;
        logits.resize(last ? 0 : static_cast<size_t>(rows * vocab));
        branches->step(rows, node_F.data(), beam.token_F.data(), next_F.data(), last ? nullptr : logits.data(), threads);
        node_F = std::move(next_F);
        if (last) break;
        best_tokens.resize(static_cast<size_t>(rows * keep));
        best_log_probs.resize(static_cast<size_t>(rows * keep));
        likeliest(logits.data(), rows, vocab, keep, best_tokens.data(), best_log_probs.data());
    }
    return {std::move(branches), std::move(node_F), std::move(beam.assumed_FT)};
}

}  // namespace crsm::exact
