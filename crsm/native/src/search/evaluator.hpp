// The search's view of the network: what crsm/search/evaluator.py is in Python, by rows instead of one leaf per tree.
//
// B trees, A children per node, L layers, R rows of a call. The tree holds statistics only; what the network remembers
// of a node stays with the evaluator, in a store indexed by (tree, node slot).
#pragma once

#include <cstdint>

namespace crsm::search {

// A leaf to evaluate: take `token` from the evaluated node `parent` of `tree`, keep the new latent in slot `node`.
struct Leaf {
    int64_t tree;
    int64_t parent;
    int64_t token;
    int64_t node;
};

// Where an evaluator writes, row by row: [R, A], [R, A], [R, L], contiguous. Rows are trees for `root`, leaves for
// `expand`. Children come the most likely first; values lie in [0, 1].
struct EvaluationRows {
    int64_t* actions_RA;
    float* prior_logits_RA;
    float* values_RL;
};

class Evaluator {
public:
    virtual ~Evaluator() = default;

    virtual int64_t num_trees() const = 0;
    virtual int64_t num_actions() const = 0;
    virtual int64_t num_layers() const = 0;

    // Makes room for the latents of `slots` nodes per tree; called before `root`.
    virtual void reserve(int64_t slots) = 0;

    // Evaluates the root of every tree, and keeps its latent in slot 0.
    virtual void root(const EvaluationRows& out) = 0;

    // Evaluates `count` ≥ 1 leaves. Several may belong to one tree; none is another one's parent.
    virtual void expand(const Leaf* leaves, int64_t count, const EvaluationRows& out) = 0;

    // Bytes that the latents of one tree take with that many slots.
    virtual int64_t bytes_per_tree(int64_t slots) const = 0;
};

}  // namespace crsm::search
