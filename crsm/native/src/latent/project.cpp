#include "project.hpp"

#include <algorithm>
#include <cstring>

#include "../beam.hpp"
#include "network.hpp"

namespace crsm::latent {

Future project(const Weights& w, const Memory& memory, const float* hidden_BLD, const int64_t* known_B, int64_t lag,
               int64_t hypotheses, int threads) {
    const int64_t batch = memory.count(), G = w.width_G;
    const int64_t keep = lag > 0 ? std::min(hypotheses, w.vocab_V) : 0;
    Chunks chunks(w, keep, threads);

    // One step of all futures: `latent_RG` in; the new latents, their hidden and their best tokens out.
    Beam beam(known_B, batch);
    Future future;
    std::vector<int64_t> best_tokens;
    std::vector<float> best_log_probs;
    const auto step = [&](const Buffer<float>& latent_RG, bool last) {
        const int64_t rows = beam.futures();
        future.latent_FG = Buffer<float>(rows * G);
        future.hidden_FLD = Buffer<float>(rows * w.hidden_size());
        best_tokens.resize(static_cast<size_t>(rows * keep));
        best_log_probs.resize(static_cast<size_t>(rows * keep));
        chunks.run(rows, [&](int64_t begin, int64_t end, Workspace& work, int inner) {
            const int64_t count = end - begin;
            std::memcpy(work.latent_RG.data(), latent_RG.data() + begin * G,
                        static_cast<size_t>(count * G) * sizeof(float));
            std::copy_n(beam.request_F.begin() + begin, count, work.memory_R.begin());
            std::copy_n(beam.token_F.begin() + begin, count, work.token_R.begin());
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

    Buffer<float> latent(batch * G);
    begin(w, hidden_BLD, batch, latent.data(), threads);
    step(latent, lag == 0);
    for (int64_t i = 0; i < lag; ++i) {
        const std::vector<int64_t> parent_F =
            beam.follow(hypotheses, w.vocab_V, best_tokens.data(), best_log_probs.data());
        latent = Buffer<float>(beam.futures() * G);
        for (int64_t row = 0; row < beam.futures(); ++row) {
            std::memcpy(latent.data() + row * G, future.latent_FG.data() + parent_F[static_cast<size_t>(row)] * G,
                        static_cast<size_t>(G) * sizeof(float));
        }
        step(latent, i + 1 == lag);
    }
    future.memory_F = std::move(beam.request_F);
    future.assumed_FT = std::move(beam.assumed_FT);
    return future;
}

}  // namespace crsm::latent
