// The scoring rules of crsm/search/puct.py and gumbel.py, to the last bit, each with the choice of the best action.
#pragma once

#include <cstdint>
#include <vector>

namespace crsm::search {

enum class Policy { puct, gumbel };
enum class QTransform { raw, minmax };

struct RuleSettings {
    Policy policy;
    QTransform q_transform;
    const float* exploration;  // c(N)·sqrt(N) for every N that the search can reach.
    float value_scale;
    float maxvisit_init;
};

// What a rule looks at of a node with A children.
struct NodeStats {
    int64_t actions;
    int32_t node_visits;
    float node_consensus;
    float raw_consensus;
    const int32_t* visits_A;
    const float* values_A;
    const float* probs_A;
    const float* logits_A;
};

// What it looks at besides, at the root.
struct RootStats {
    const bool* considered_A;
    const float* gumbel_A;
    const int32_t* race_visits_A;  // Visits in the race of Sequential Halving.
    int32_t considered_visit;      // The count whose turn it is.
};

// The action of the highest score, the first among equals. `scratch_A`: two rows of A.
int64_t choose_interior(const RuleSettings& settings, const NodeStats& node, float* scratch_2A);
int64_t choose_root(const RuleSettings& settings, const NodeStats& node, const RootStats& root, float* scratch_2A);

// crsm/search/root_actions.py: the smallest set of actions whose probability reaches `mass`. Shape [A].
void keep_prior_mass(const float* logits_A, int64_t actions, double mass, bool* keep_A);

// crsm/search/seq_halving.py: the visit counts considered, simulation by simulation.
std::vector<int32_t> considered_visits(int64_t num_considered, int64_t num_simulations);

}  // namespace crsm::search
