// An evaluator written in Python (the protocol of crsm/search/evaluator.py) as one for the native search.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "search/evaluator.hpp"

namespace crsm::search {

// Takes the GIL for each call. For several leaves of one tree it calls `expand_rows(tree_R, parent_R, action_R,
// node_R)` if there is such a method, else `expand` once for the first leaf of every tree, once for the second, and so
// on. What a call raises passes through as it is.
class CallbackEvaluator final : public Evaluator {
public:
    // `root_token_B`: the first token of every root, for a search that does not begin with `root`.
    explicit CallbackEvaluator(nanobind::object evaluator, std::vector<int64_t> root_token_B = {});

    int64_t num_trees() const override { return trees_; }
    int64_t num_actions() const override { return actions_; }
    int64_t num_layers() const override { return layers_; }
    void reserve(int64_t) override {}
    void root(const EvaluationRows& out) override;
    void expand(const Leaf* leaves, int64_t count, const EvaluationRows& out) override;
    // Calls `remap(new_from_old_BS, slots)`; raises ValueError if there is no such method.
    void remap(const int64_t* new_from_old_BS, int64_t old_slots, int64_t slots) override;
    int64_t bytes_per_tree(int64_t) const override { return 0; }

private:
    void expand_some(const Leaf* leaves, const std::vector<int64_t>& which, const EvaluationRows& out);
    void expand_rows(const Leaf* leaves, int64_t count, const EvaluationRows& out);
    // Copies row from[i] of an evaluation of `rows` rows to row to[i]; checks shapes and types.
    void take(nanobind::handle evaluation, int64_t rows, const std::vector<int64_t>& from,
              const std::vector<int64_t>& to, const EvaluationRows& out) const;

    nanobind::object evaluator_;
    int64_t trees_, actions_, layers_;
    // With these tokens, trees that rest are computed along.
    std::vector<int64_t> root_token_B_;
};

}  // namespace crsm::search
