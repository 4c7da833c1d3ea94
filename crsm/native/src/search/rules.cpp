#include "search/rules.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>

#include "search/numerics.hpp"

namespace crsm::search {
namespace {

constexpr float kMinRange = static_cast<float>(1e-8);
constexpr float kLowScore = static_cast<float>(-1e9);

float larger(float a, float b) { return a > b ? a : b; }

int64_t first_highest(const float* scores, int64_t count) {
    const float best = highest(scores, count);
    for (int64_t a = 0; a < count; ++a) {
        if (scores[a] == best) return a;
    }
    return 0;
}

void puct_scores(const RuleSettings& settings, const NodeStats& node, float* scores) {
    const int64_t actions = node.actions;
    const float exploration = settings.exploration[node.node_visits];
    if (settings.q_transform == QTransform::raw) {
        for (int64_t a = 0; a < actions; ++a) {
            scores[a] = node.visits_A[a] > 0 ? node.values_A[a] : node.node_consensus;
        }
    } else {
        float least = node.node_consensus, most = node.node_consensus;
        for (int64_t a = 0; a < actions; ++a) {
            const float known = node.visits_A[a] > 0 ? node.values_A[a] : node.node_consensus;
            least = known < least ? known : least;
            most = known > most ? known : most;
        }
        const float range = larger(most - least, kMinRange);
        for (int64_t a = 0; a < actions; ++a) {
            scores[a] = ((node.visits_A[a] > 0 ? node.values_A[a] : least) - least) / range;
        }
    }
    for (int64_t a = 0; a < actions; ++a) {
        scores[a] = scores[a] + exploration * node.probs_A[a] / static_cast<float>(node.visits_A[a] + 1);
    }
}

// Also the sum of the children's visits.
int32_t completed_values(const RuleSettings& settings, const NodeStats& node, float* completed) {
    const int64_t actions = node.actions;
    int32_t total_visits = 0, most_visits = 0;
    for (int64_t a = 0; a < actions; ++a) {
        total_visits += node.visits_A[a];
        most_visits = std::max(most_visits, node.visits_A[a]);
        completed[a] = node.visits_A[a] > 0 ? larger(FLT_MIN, node.probs_A[a]) : 0.0f;
    }
    const float total_probs = sum(completed, actions);
    const float divisor = total_probs > 0.0f ? total_probs : 1.0f;
    for (int64_t a = 0; a < actions; ++a) completed[a] = completed[a] * node.values_A[a] / divisor;
    const float weighted = sum(completed, actions);
    const float count = static_cast<float>(total_visits);
    const float mixed = (node.raw_consensus + count * weighted) / (count + 1.0f);

    for (int64_t a = 0; a < actions; ++a) completed[a] = node.visits_A[a] > 0 ? node.values_A[a] : mixed;
    float least = completed[0], most = completed[0];
    for (int64_t a = 1; a < actions; ++a) {
        least = completed[a] < least ? completed[a] : least;
        most = completed[a] > most ? completed[a] : most;
    }
    const float range = larger(most - least, kMinRange);
    const float scale = (settings.maxvisit_init + static_cast<float>(most_visits)) * settings.value_scale;
    for (int64_t a = 0; a < actions; ++a) completed[a] = scale * ((completed[a] - least) / range);
    return total_visits;
}

}  // namespace

int64_t choose_interior(const RuleSettings& settings, const NodeStats& node, float* scores) {
    if (settings.policy == Policy::puct) {
        puct_scores(settings, node, scores);
        return first_highest(scores, node.actions);
    }
    const int32_t visits = completed_values(settings, node, scores);
    for (int64_t a = 0; a < node.actions; ++a) scores[a] = node.logits_A[a] + scores[a];
    softmax(scores, node.actions, scores);
    const float total = static_cast<float>(visits + 1);
    for (int64_t a = 0; a < node.actions; ++a) {
        scores[a] = scores[a] - static_cast<float>(node.visits_A[a]) / total;
    }
    return first_highest(scores, node.actions);
}

int64_t choose_root(const RuleSettings& settings, const NodeStats& node, const RootStats& root, float* scores) {
    const int64_t actions = node.actions;
    if (settings.policy == Policy::puct) {
        puct_scores(settings, node, scores);
        for (int64_t a = 0; a < actions; ++a) scores[a] = root.considered_A[a] ? scores[a] : -INFINITY;
        return first_highest(scores, actions);
    }
    float* logits = scores + actions;
    completed_values(settings, node, scores);
    for (int64_t a = 0; a < actions; ++a) logits[a] = root.considered_A[a] ? node.logits_A[a] : -INFINITY;
    const float most = highest(logits, actions);
    for (int64_t a = 0; a < actions; ++a) {
        const float score = larger(kLowScore, root.gumbel_A[a] + (logits[a] - most) + scores[a]);
        const bool turn = root.considered_A[a] && root.race_visits_A[a] == root.considered_visit;
        scores[a] = turn ? score : -INFINITY;
    }
    return first_highest(scores, actions);
}

void keep_prior_mass(const float* logits, int64_t actions, double mass, bool* keep) {
    std::fill_n(keep, actions, true);
    if (mass >= 1.0) return;
    std::vector<int64_t> order(static_cast<size_t>(actions));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
    float gathered = 0.0f;
    for (const int64_t a : order) {
        keep[a] = gathered < static_cast<float>(mass);
        gathered = gathered + exp_nonpositive(logits[a] < 0.0f ? logits[a] : 0.0f);
    }
}

std::vector<int32_t> considered_visits(int64_t num_considered, int64_t num_simulations) {
    std::vector<int32_t> sequence;
    sequence.reserve(static_cast<size_t>(num_simulations));
    if (num_considered <= 1) {
        for (int64_t i = 0; i < num_simulations; ++i) sequence.push_back(static_cast<int32_t>(i));
        return sequence;
    }
    const int64_t rounds = std::bit_width(static_cast<uint64_t>(num_considered - 1));
    int32_t visits = 0;
    int64_t racing = num_considered;
    while (static_cast<int64_t>(sequence.size()) < num_simulations) {
        const int64_t repeats = std::max<int64_t>(1, num_simulations / (rounds * racing));
        for (int64_t i = 0; i < repeats; ++i, ++visits) {
            for (int64_t a = 0; a < racing && static_cast<int64_t>(sequence.size()) < num_simulations; ++a) {
                sequence.push_back(visits);
            }
        }
        racing = std::max<int64_t>(2, racing / 2);
    }
    return sequence;
}

}  // namespace crsm::search
