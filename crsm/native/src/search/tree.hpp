// The search tree: the arrays of crsm/search/tree.py in one block of memory, field by field, each tree's part of a
// field contiguous, so that NumPy sees them without a copy. The meaning of the fields is written there.
//
// B trees, S node slots, A children per node, L layers.
#pragma once

#include <cstdint>
#include <vector>

namespace crsm::search {

inline constexpr int32_t kRoot = 0, kNoParent = -1, kUnvisited = -1;
inline constexpr int64_t kNoToken = -1;

struct TreeSizes {
    int64_t trees, slots, actions, layers;
};

// One array of the block.
struct TreeField {
    const char* name;
    const char* dtype;
    std::vector<int64_t> shape;
    int64_t offset;
};

// All of them, in the order of the Python class.
std::vector<TreeField> tree_fields(const TreeSizes& sizes);

// Bytes of the block.
int64_t tree_bytes(const TreeSizes& sizes);

// Bytes of the arrays' rows of one tree.
int64_t bytes_per_tree(int64_t slots, int64_t actions, int64_t layers);

// The rows of one tree.
struct TreeView {
    int64_t slots, actions, layers;
    int32_t* node_visits_S;
    float* node_values_SL;
    float* node_consensus_S;
    float* raw_values_SL;
    float* raw_consensus_S;
    int32_t* parents_S;
    int32_t* action_from_parent_S;
    int32_t* depth_S;
    bool* terminal_S;
    int32_t* children_index_SA;
    int64_t* children_tokens_SA;
    float* children_prior_logits_SA;
    float* children_prior_probs_SA;
    int32_t* children_visits_SA;
    float* children_values_SA;
    bool* root_actions_A;
    float* root_gumbel_A;
    int32_t* num_simulations;
};

TreeView view_tree(uint8_t* block, const TreeSizes& sizes, int64_t tree);

// How a vector of values is judged.
struct Consensus {
    const float* weights_L;
    float penalty;
};

// What an evaluator said of one node.
struct EvaluationRow {
    const int64_t* actions_A;
    const float* prior_logits_A;
    const float* values_L;
};

// Where a simulation ended: at a new node, or at one that was there.
struct Flight {
    int32_t parent;
    int32_t action;
    int32_t node;
    int32_t depth;
    bool expands;
    int64_t row;
};

// Makes all slots empty, in memory that is zero.
void clear(const TreeView& tree);

// Refuses a tree that did not come from a search, where it could lead astray: a slot or an action out of range, a child
// that does not follow its parent, a node with more visits than the root. Throws std::invalid_argument.
void check_links(const TreeView& tree, int64_t filled_slots, int64_t index);

// Fills in the root; root_actions_A and root_gumbel_A must be there.
void enter_root(const TreeView& tree, const EvaluationRow& row, const Consensus& judge);

// Fills in the empty slot of a new leaf, as yet without a visit.
void enter_leaf(const TreeView& tree, const Flight& flight, bool terminal, const EvaluationRow& row,
                const Consensus& judge);

// Adds the evaluation of `leaf` to all nodes and edges from there to the root, and counts the simulation.
void back_up(const TreeView& tree, int32_t leaf, const Consensus& judge);

}  // namespace crsm::search
