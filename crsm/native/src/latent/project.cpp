#include "project.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "network.hpp"

namespace crsm::latent {
namespace {

struct Continuation {
    float score;
    int64_t parent;  // row of the step before
    int64_t token;
};

}  // namespace

Future project(const Weights& w, const Memory& memory, const float* hidden_BLD, const int64_t* known_B, int64_t lag,
               int64_t hypotheses, int threads) {
    const int64_t batch = memory.count(), G = w.width_G;
    const int64_t keep = lag > 0 ? std::min(hypotheses, w.vocab_V) : 0;
    Chunks chunks(w, keep, threads);

    // One step of all rows: `latent_RG` and `token` in; the new latents, their hidden and their best tokens out.
    Future future;
    std::vector<int64_t> token(known_B, known_B + batch), best_tokens;
    std::vector<float> best_log_probs;
    const auto step = [&](const Buffer<float>& latent_RG, bool last) {
        const int64_t rows = static_cast<int64_t>(token.size());
        future.latent_FG = Buffer<float>(rows * G);
        future.hidden_FLD = Buffer<float>(rows * w.hidden_size());
        best_tokens.resize(static_cast<size_t>(rows * keep));
        best_log_probs.resize(static_cast<size_t>(rows * keep));
        chunks.run(rows, [&](int64_t begin, int64_t end, Workspace& work, int inner) {
            const int64_t count = end - begin;
            std::memcpy(work.latent_RG.data(), latent_RG.data() + begin * G,
                        static_cast<size_t>(count * G) * sizeof(float));
            std::copy_n(future.memory_F.begin() + begin, count, work.memory_R.begin());
            std::copy_n(token.begin() + begin, count, work.token_R.begin());
            advance(w, memory, count, work);
            for (int64_t row = 0; row < count; ++row) {
                std::memcpy(future.latent_FG.data() + (begin + row) * G,
                            work.features_RF.data() + row * (G + w.decoder_W), static_cast<size_t>(G) * sizeof(float));
            }
            float* hidden = future.hidden_FLD.data() + begin * w.hidden_size();
            decode(w, count, hidden, work);
            if (last) return;
            heads(w, hidden, count, nullptr, work);
            policy(w, count, keep, best_tokens.data() + begin * keep, best_log_probs.data() + begin * keep, work, inner);
        });
    };

    for (int64_t row = 0; row < batch; ++row) future.memory_F.push_back(row);
    Buffer<float> latent(batch * G);
    begin(w, hidden_BLD, batch, latent.data(), threads);
    step(latent, lag == 0);

    std::vector<float> score(static_cast<size_t>(batch), 0.0f);
    std::vector<Continuation> found;
    for (int64_t i = 0; i < lag; ++i) {
        const int64_t width = future.width;
        const int64_t beam = std::min(hypotheses, width * w.vocab_V);
        std::vector<Continuation> chosen;
        for (int64_t request = 0; request < batch; ++request) {
            found.clear();
            for (int64_t parent = request * width; parent < (request + 1) * width; ++parent) {
                for (int64_t rank = 0; rank < keep; ++rank) {
                    const float total = score[parent] + best_log_probs[parent * keep + rank];
                    found.push_back({std::isnan(total) ? -INFINITY : total, parent, best_tokens[parent * keep + rank]});
                }
            }
            std::stable_sort(found.begin(), found.end(),
                             [](const Continuation& a, const Continuation& b) { return a.score > b.score; });
            chosen.insert(chosen.end(), found.begin(), found.begin() + beam);
        }
        const int64_t rows = batch * beam;
        latent = Buffer<float>(rows * G);
        std::vector<int64_t> assumed(static_cast<size_t>(rows * (i + 1)));
        score.resize(static_cast<size_t>(rows));
        token.resize(static_cast<size_t>(rows));
        future.memory_F.resize(static_cast<size_t>(rows));
        for (int64_t row = 0; row < rows; ++row) {
            const Continuation& from = chosen[static_cast<size_t>(row)];
            std::memcpy(latent.data() + row * G, future.latent_FG.data() + from.parent * G,
                        static_cast<size_t>(G) * sizeof(float));
            std::copy_n(future.assumed_FT.begin() + from.parent * i, i, assumed.begin() + row * (i + 1));
            assumed[row * (i + 1) + i] = from.token;
            score[row] = from.score;
            token[row] = from.token;
            future.memory_F[row] = row / beam;
        }
        future.assumed_FT = std::move(assumed);
        future.width = beam;
        step(latent, i + 1 == lag);
    }
    return future;
}

}  // namespace crsm::latent
