// The search's view of the network: what crsm/search/evaluator.py is in Python, by rows instead of one leaf per tree.
//
// B trees, A children per node, L layers, S node slots, R rows of a call. The tree holds statistics only; what the
// network remembers of a node stays with the evaluator, in a store indexed by (tree, node slot).
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

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

    // Takes over the latents of a tree that is used again. Slot `old` of tree b moves to slot
    // new_from_old_BS[b · old_slots + old], which is never higher; -1: it is dropped. Afterwards there is room for
    // `slots` nodes per tree. Called instead of `reserve` and `root`.
    virtual void remap(const int64_t* new_from_old_BS, int64_t old_slots, int64_t slots) {
        (void)new_from_old_BS, (void)old_slots, (void)slots;
        throw std::invalid_argument("evaluator: it cannot move its latents; allowed: a search without `reuse`");
    }

    // Bytes that the latents of one tree take with that many slots.
    virtual int64_t bytes_per_tree(int64_t slots) const = 0;

    // Set by the search while it runs. `expand` may look at it between parts of a long batch and return early: what it
    // wrote is then not used.
    const std::atomic<bool>* cancel_flag = nullptr;
    bool cancelled() const { return cancel_flag != nullptr && cancel_flag->load(std::memory_order_relaxed); }
};

// Throws std::invalid_argument naming the evaluator and what of the leaf is out of range.
inline void check_leaf(const char* evaluator, const Leaf& leaf, int64_t trees, int64_t slots, int64_t vocab) {
    const auto within = [evaluator](const char* name, int64_t value, int64_t size) {
        if (value >= 0 && value < size) return;
        throw std::invalid_argument(std::string(evaluator) + ": " + name + " = " + std::to_string(value) +
                                    "; allowed: 0 to " + std::to_string(size - 1));
    };
    within("tree", leaf.tree, trees);
    within("parent", leaf.parent, slots);
    within("node", leaf.node, slots);
    within("token", leaf.token, vocab);
}

// Which tokens of the vocabulary are among `tokens`; those beyond it are never generated.
inline std::vector<uint8_t> marked(const std::vector<int64_t>& tokens, int64_t vocab) {
    std::vector<uint8_t> found(static_cast<size_t>(vocab), 0);
    for (const int64_t token : tokens) {
        if (token >= 0 && token < vocab) found[static_cast<size_t>(token)] = 1;
    }
    return found;
}

}  // namespace crsm::search
