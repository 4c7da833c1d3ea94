#include "beam.hpp"

#include <algorithm>
#include <cmath>

namespace crsm {
namespace {

struct Continuation {
    float score;
    int64_t parent;
    int64_t token;
};

}  // namespace

Beam::Beam(const int64_t* known_B, int64_t batch) : batch_B(batch), token_F(known_B, known_B + batch) {
    score_F.assign(token_F.size(), 0.0f);
    for (int64_t row = 0; row < batch; ++row) request_F.push_back(row);
}

std::vector<int64_t> Beam::follow(int64_t hypotheses, int64_t vocab, const int64_t* best_tokens,
                                  const float* best_log_probs) {
    const int64_t keep = std::min(hypotheses, vocab), beam = std::min(hypotheses, width * vocab), T = steps_T;
    std::vector<Continuation> chosen, found;
    for (int64_t request = 0; request < batch_B; ++request) {
        found.clear();
        for (int64_t parent = request * width; parent < (request + 1) * width; ++parent) {
            for (int64_t place = parent * keep; place < (parent + 1) * keep; ++place) {
                const float total = score_F[static_cast<size_t>(parent)] + best_log_probs[place];
                found.push_back({std::isnan(total) ? -INFINITY : total, parent, best_tokens[place]});
            }
        }
        std::stable_sort(found.begin(), found.end(),
                         [](const Continuation& a, const Continuation& b) { return a.score > b.score; });
        chosen.insert(chosen.end(), found.begin(), found.begin() + beam);
    }

    std::vector<int64_t> parent_F, assumed;
    token_F.clear();
    score_F.clear();
    request_F.clear();
    for (const Continuation& next : chosen) {
        request_F.push_back(static_cast<int64_t>(request_F.size()) / beam);
        parent_F.push_back(next.parent);
        token_F.push_back(next.token);
        score_F.push_back(next.score);
        const auto before = assumed_FT.begin() + next.parent * T;
        assumed.insert(assumed.end(), before, before + T);
        assumed.push_back(next.token);
    }
    assumed_FT = std::move(assumed);
    width = beam;
    ++steps_T;
    return parent_F;
}

}  // namespace crsm
