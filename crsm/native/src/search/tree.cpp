#include "search/tree.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "search/numerics.hpp"

namespace crsm::search {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Calls visit(name, dtype, bytes of an item, items of a tree, shape of a tree's part) for every field.
template <typename Visit>
void each_field(const TreeSizes& s, Visit&& visit) {
    const std::vector<int64_t> node{s.slots}, layer{s.slots, s.layers}, edge{s.slots, s.actions}, root{s.actions};
    visit("node_visits_BS", "int32", 4, node);
    visit("node_values_BSL", "float32", 4, layer);
    visit("node_consensus_BS", "float32", 4, node);
    visit("raw_values_BSL", "float32", 4, layer);
    visit("raw_consensus_BS", "float32", 4, node);
    visit("parents_BS", "int32", 4, node);
    visit("action_from_parent_BS", "int32", 4, node);
    visit("depth_BS", "int32", 4, node);
    visit("terminal_BS", "bool", 1, node);
    visit("children_index_BSA", "int32", 4, edge);
    visit("children_tokens_BSA", "int64", 8, edge);
    visit("children_prior_logits_BSA", "float32", 4, edge);
    visit("children_prior_probs_BSA", "float32", 4, edge);
    visit("children_visits_BSA", "int32", 4, edge);
    visit("children_values_BSA", "float32", 4, edge);
    visit("root_actions_BA", "bool", 1, root);
    visit("root_gumbel_BA", "float32", 4, root);
    visit("num_simulations_B", "int32", 4, {});
}

int64_t items(const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    return count;
}

}  // namespace

std::vector<TreeField> tree_fields(const TreeSizes& sizes) {
    std::vector<TreeField> fields;
    int64_t offset = 0;
    each_field(sizes, [&](const char* name, const char* dtype, int64_t bytes, const std::vector<int64_t>& shape) {
        std::vector<int64_t> batched{sizes.trees};
        batched.insert(batched.end(), shape.begin(), shape.end());
        fields.push_back({name, dtype, batched, offset});
        offset += aligned(bytes * items(batched));
    });
    return fields;
}

int64_t tree_bytes(const TreeSizes& sizes) {
    int64_t total = 0;
    each_field(sizes, [&](const char*, const char*, int64_t bytes, const std::vector<int64_t>& shape) {
        total += aligned(bytes * sizes.trees * items(shape));
    });
    return total;
}

int64_t bytes_per_tree(int64_t slots, int64_t actions, int64_t layers) {
    int64_t total = 0;
    each_field({1, slots, actions, layers},
               [&](const char*, const char*, int64_t bytes, const std::vector<int64_t>& shape) {
                   total += bytes * items(shape);
               });
    return total;
}

TreeView view_tree(uint8_t* block, const TreeSizes& s, int64_t tree) {
    TreeView view{};
    view.slots = s.slots, view.actions = s.actions, view.layers = s.layers;
    int64_t offset = 0;
    const auto place = [&]<typename T>(T*& pointer, int64_t count) {
        pointer = reinterpret_cast<T*>(block + offset) + tree * count;
        offset += aligned(static_cast<int64_t>(sizeof(T)) * s.trees * count);
    };
    const int64_t layered = s.slots * s.layers, edges = s.slots * s.actions;
    place(view.node_visits_S, s.slots);
    place(view.node_values_SL, layered);
    place(view.node_consensus_S, s.slots);
    place(view.raw_values_SL, layered);
    place(view.raw_consensus_S, s.slots);
    place(view.parents_S, s.slots);
    place(view.action_from_parent_S, s.slots);
    place(view.depth_S, s.slots);
    place(view.terminal_S, s.slots);
    place(view.children_index_SA, edges);
    place(view.children_tokens_SA, edges);
    place(view.children_prior_logits_SA, edges);
    place(view.children_prior_probs_SA, edges);
    place(view.children_visits_SA, edges);
    place(view.children_values_SA, edges);
    place(view.root_actions_A, s.actions);
    place(view.root_gumbel_A, s.actions);
    place(view.num_simulations, 1);
    return view;
}

void clear(const TreeView& t) {
    std::fill_n(t.parents_S, t.slots, kNoParent);
    std::fill_n(t.action_from_parent_S, t.slots, kNoParent);
    std::fill_n(t.children_index_SA, t.slots * t.actions, kUnvisited);
    std::fill_n(t.children_tokens_SA, t.slots * t.actions, kNoToken);
}

void check_links(const TreeView& t, int64_t filled_slots, int64_t index) {
    const auto refuse = [&](int64_t slot, const char* what, int64_t value) {
        throw std::invalid_argument("reuse: tree " + std::to_string(index) + ", slot " + std::to_string(slot) + ": " +
                                    what + " = " + std::to_string(value) + "; allowed: what a search has left");
    };
    for (int64_t slot = 0; slot < t.slots; ++slot) {
        const int64_t parent = t.parents_S[slot], action = t.action_from_parent_S[slot];
        const bool root = slot == kRoot, filled = t.node_visits_S[slot] != 0;
        if (filled && (t.node_visits_S[slot] < 0 || t.node_visits_S[slot] > t.node_visits_S[kRoot])) {
            refuse(slot, "visits", t.node_visits_S[slot]);
        }
        if ((root || filled) != (slot < filled_slots)) refuse(slot, "visits", t.node_visits_S[slot]);
        if (filled && !root && (parent < 0 || parent >= slot)) refuse(slot, "parent", parent);
        if (filled && !root && (action < 0 || action >= t.actions)) refuse(slot, "action", action);
        for (int64_t a = 0; a < t.actions; ++a) {
            const int64_t child = t.children_index_SA[slot * t.actions + a];
            if (child == kUnvisited) continue;
            if (!filled || child <= slot || child >= filled_slots) refuse(slot, "child", child);
        }
    }
}

namespace {

// What root and leaf have in common: values, consensus, children.
void enter_node(const TreeView& t, int64_t slot, const EvaluationRow& row, const Consensus& judge) {
    const int64_t edge = slot * t.actions;
    std::copy_n(row.values_L, t.layers, t.raw_values_SL + slot * t.layers);
    t.raw_consensus_S[slot] = consensus(row.values_L, judge.weights_L, t.layers, judge.penalty);
    std::copy_n(row.actions_A, t.actions, t.children_tokens_SA + edge);
    std::copy_n(row.prior_logits_A, t.actions, t.children_prior_logits_SA + edge);
}

}  // namespace

void enter_root(const TreeView& t, const EvaluationRow& row, const Consensus& judge) {
    enter_node(t, kRoot, row, judge);
    t.node_visits_S[kRoot] = 1;
    std::copy_n(row.values_L, t.layers, t.node_values_SL);
    t.node_consensus_S[kRoot] = t.raw_consensus_S[kRoot];
    for (int64_t a = 0; a < t.actions; ++a) {
        t.children_prior_probs_SA[a] = t.root_actions_A[a] ? row.prior_logits_A[a] : -INFINITY;
    }
    softmax(t.children_prior_probs_SA, t.actions, t.children_prior_probs_SA);
}

void enter_leaf(const TreeView& t, const Flight& flight, bool terminal, const EvaluationRow& row,
                const Consensus& judge) {
    const int64_t slot = flight.node;
    enter_node(t, slot, row, judge);
    softmax(row.prior_logits_A, t.actions, t.children_prior_probs_SA + slot * t.actions);
    t.parents_S[slot] = flight.parent;
    t.action_from_parent_S[slot] = flight.action;
    t.depth_S[slot] = flight.depth;
    t.terminal_S[slot] = terminal;
    t.children_index_SA[flight.parent * t.actions + flight.action] = flight.node;
}

void back_up(const TreeView& t, int32_t leaf, const Consensus& judge) {
    const float* leaf_values = t.raw_values_SL + leaf * t.layers;
    for (int32_t node = leaf;;) {
        const float visits = static_cast<float>(++t.node_visits_S[node]);
        float* mean = t.node_values_SL + node * t.layers;
        for (int64_t i = 0; i < t.layers; ++i) mean[i] = mean[i] + (leaf_values[i] - mean[i]) / visits;
        const float value = consensus(mean, judge.weights_L, t.layers, judge.penalty);
        t.node_consensus_S[node] = value;
        if (node == kRoot) break;
        const int32_t parent = t.parents_S[node];
        const int64_t edge = parent * t.actions + t.action_from_parent_S[node];
        ++t.children_visits_SA[edge];
        t.children_values_SA[edge] = value;
        node = parent;
    }
    ++*t.num_simulations;
}

}  // namespace crsm::search
