// The beam of a projection: which continuations of a batch's futures are followed.
#pragma once

#include <cstdint>
#include <vector>

namespace crsm {

// F = B · width futures, those of a request neighbouring, the likeliest first.
struct Beam {
    Beam(const int64_t* known_B, int64_t batch_B);

    // Follows, of every request, the at most `hypotheses` likeliest continuations; equal ones by future, then by rank. Of
    // each future `keep` = min(hypotheses, vocab) continuations are known, the likeliest first: best_tokens and
    // best_log_probs [F, keep]. A score that is not a number counts as −∞. Returns the future that each one continues.
    std::vector<int64_t> follow(int64_t hypotheses, int64_t vocab, const int64_t* best_tokens,
                                const float* best_log_probs);

    int64_t futures() const { return static_cast<int64_t>(token_F.size()); }

    int64_t batch_B, width = 1, steps_T = 0;
    std::vector<int64_t> token_F;     // to be consumed next
    std::vector<int64_t> request_F;
    std::vector<int64_t> assumed_FT;  // [F, T]
    std::vector<float> score_F;       // log-probability of what is assumed
};

}  // namespace crsm
