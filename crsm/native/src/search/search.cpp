#include "search/search.hpp"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <utility>

#include "arrays.hpp"
#include "search/numerics.hpp"
#include "threads.hpp"

namespace crsm::search {
namespace {

// A step of all trees is shared out if it takes this long, in nanoseconds: handing work to a thread that has gone to
// sleep costs tens of microseconds, once per step.
constexpr int64_t kNanosecondsPerTask = 40'000;

// About what one step of one tree takes, in nanoseconds.
int64_t step_cost(const RuleSettings& rules, int64_t actions, int64_t leaves) {
    return (rules.policy == Policy::gumbel ? 250 + 25 * actions : 150 + 12 * actions) * leaves;
}

// What the search knows of a tree beside its arrays.
struct Progress {
    TreeView tree;
    int64_t budget = 0;
    int64_t first_slot = 1;
    int64_t begun = 0;
    int64_t in_flight = 0;
    Flight* flights = nullptr;              // [leaves]
    const int32_t* considered = nullptr;    // [budget], Sequential Halving.
    const int32_t* visits_before_A = nullptr;  // Null: none.
    int32_t* pending_SA = nullptr;          // Leaves in flight below each edge; null if there can be no other.
};

// A row of what the evaluator said, and the tree that it is about.
struct Row {
    int64_t tree = -1;
    int64_t index = -1;
};

// Neighbouring trees that one thread takes a step further.
struct Task {
    int64_t begin = 0, end = 0;
    std::vector<Leaf> leaves;
    int64_t first_row = 0;
    bool more = false;
    Row bad_values, bad_logits;
    std::vector<float> scores_2A, values_A;
    std::vector<int32_t> visits_A, race_A;
};

bool values_valid(const float* values, int64_t layers) {
    bool valid = true;
    for (int64_t i = 0; i < layers; ++i) valid &= values[i] >= 0.0f && values[i] <= 1.0f;
    return valid;
}

bool logits_valid(const float* logits, int64_t actions) {
    bool nan = false;
    float best = -INFINITY;
    for (int64_t a = 0; a < actions; ++a) {
        nan |= logits[a] != logits[a];
        best = logits[a] > best ? logits[a] : best;
    }
    return !nan && best > -INFINITY && best < INFINITY;
}

class Run {
public:
    Run(Evaluator& evaluator, const SearchSettings& settings, uint8_t* block, const TreeSizes& sizes, StopRule& stop)
        : evaluator_(evaluator), settings_(bounded(settings, sizes)), sizes_(sizes), stop_(stop),
          trees_(size_t(sizes.trees)), flights_(rows()), actions_(rows() * sizes.actions),
          logits_(rows() * sizes.actions), values_(rows() * sizes.layers) {
        std::sort(settings_.terminal_tokens.begin(), settings_.terminal_tokens.end());
        for (int64_t b = 0; b < sizes.trees; ++b) {
            Progress& tree = trees_[size_t(b)];
            tree.tree = view_tree(block, sizes, b);
            tree.budget = settings.budget_B[b];
            tree.flights = flights_.data() + b * settings_.leaves;
            if (settings.first_slot_B != nullptr) tree.first_slot = settings.first_slot_B[b];
        }
        if (settings_.leaves > 1) {
            const int64_t edges = sizes.slots * sizes.actions;
            // calloc leaves pages that no search comes to untouched.
            pending_.reset(static_cast<int32_t*>(std::calloc(size_t(sizes.trees * edges), sizeof(int32_t))));
            if (pending_ == nullptr) throw std::bad_alloc();
            for (int64_t b = 0; b < sizes.trees; ++b) trees_[size_t(b)].pending_SA = pending_.get() + b * edges;
        }
        const int64_t threads = settings.threads > 0 ? settings.threads : num_threads();
        const int64_t cost = sizes.trees * step_cost(settings.rules, sizes.actions, settings_.leaves);
        const int64_t tasks = std::clamp<int64_t>(cost / kNanosecondsPerTask, 1, std::min(threads, sizes.trees));
        tasks_.resize(size_t(tasks));
        for (int64_t i = 0; i < tasks; ++i) {
            Task& task = tasks_[size_t(i)];
            task.begin = i * sizes.trees / tasks, task.end = (i + 1) * sizes.trees / tasks;
            task.leaves.reserve(size_t((task.end - task.begin) * settings_.leaves));
            task.scores_2A.resize(size_t(2 * sizes.actions));
            task.values_A.resize(size_t(sizes.actions));
            task.visits_A.resize(size_t(sizes.actions));
            task.race_A.resize(size_t(sizes.actions));
        }
        if (tasks > 1) leaves_.resize(size_t(rows()));
    }

    void run() {
        begin();
        bool go_on = most_simulations(settings_, sizes_) > 0 && !stop_();
        step(go_on);
        while (go_on && !stop_.cancelled()) {
            const int64_t leaves = gather();
            if (leaves > 0) {
                const Leaf* first = tasks_.size() > 1 ? leaves_.data() : tasks_[0].leaves.data();
                evaluator_.expand(first, leaves, rows_out());
                // The evaluator may have returned early; and no one waits for the rest.
                if (stop_.cancelled()) break;
            }
            const bool more = std::any_of(tasks_.begin(), tasks_.end(), [](const Task& task) { return task.more; });
            go_on = more && !stop_();
            step(go_on);
            for (const Task& task : tasks_) refuse_values(task.bad_values);
            for (const Task& task : tasks_) refuse_logits(task.bad_logits);
        }
    }

private:
    static int64_t most_simulations(const SearchSettings& settings, const TreeSizes& sizes) {
        return *std::max_element(settings.budget_B, settings.budget_B + sizes.trees);
    }

    // No room for more leaves than there are simulations.
    static SearchSettings bounded(SearchSettings settings, const TreeSizes& sizes) {
        settings.leaves = std::clamp<int64_t>(most_simulations(settings, sizes), 1, settings.leaves);
        return settings;
    }

    int64_t rows() const { return sizes_.trees * settings_.leaves; }
    EvaluationRows rows_out() { return {actions_.data(), logits_.data(), values_.data()}; }
    EvaluationRow row(int64_t index) const {
        return {actions_.data() + index * sizes_.actions, logits_.data() + index * sizes_.actions,
                values_.data() + index * sizes_.layers};
    }

    template <typename F>
    void each_task(F&& body) {
        parallel_for(int64_t(tasks_.size()), settings_.threads, [&](int64_t i) { body(tasks_[size_t(i)]); });
    }

    // Roots, new or used again.
    void begin() {
        if (settings_.first_slot_B == nullptr) {
            each_task([this](Task& task) {
                for (int64_t b = task.begin; b < task.end; ++b) clear(trees_[size_t(b)].tree);
            });
            evaluator_.reserve(sizes_.slots);
            evaluator_.root(rows_out());
            for (int64_t b = 0; b < sizes_.trees; ++b) {
                if (!values_valid(row(b).values_L, sizes_.layers)) refuse_values({b, b});
            }
            for (int64_t b = 0; b < sizes_.trees; ++b) {
                if (!logits_valid(row(b).prior_logits_A, sizes_.actions)) refuse_logits({b, b});
            }
            for (int64_t b = 0; b < sizes_.trees; ++b) {
                const TreeView& tree = trees_[size_t(b)].tree;
                keep_prior_mass(row(b).prior_logits_A, sizes_.actions, settings_.root_prior_mass, tree.root_actions_A);
                enter_root(tree, row(b), settings_.judge);
            }
            return set_races();
        }
        for (int64_t b = 0; b < sizes_.trees; ++b) {
            check_links(trees_[size_t(b)].tree, trees_[size_t(b)].first_slot, b);
        }
        evaluator_.remap(settings_.new_from_old_BS, settings_.old_slots, sizes_.slots);
        if (settings_.rules.policy == Policy::gumbel) {
            visits_before_.resize(size_t(sizes_.trees * sizes_.actions));
            for (int64_t b = 0; b < sizes_.trees; ++b) {
                int32_t* before = visits_before_.data() + b * sizes_.actions;
                std::copy_n(trees_[size_t(b)].tree.children_visits_SA, sizes_.actions, before);
                trees_[size_t(b)].visits_before_A = before;
            }
        }
        set_races();
    }

    void set_races() {
        if (settings_.rules.policy != Policy::gumbel) return;
        for (Progress& tree : trees_) {
            const int64_t kept = std::count(tree.tree.root_actions_A, tree.tree.root_actions_A + sizes_.actions, true);
            const std::pair<int64_t, int64_t> race{std::min(kept, settings_.max_considered), tree.budget};
            auto found = races_.find(race);
            if (found == races_.end()) found = races_.emplace(race, considered_visits(race.first, race.second)).first;
            tree.considered = found->second.data();
        }
    }

    // Brings the leaves in flight home and, if the search goes on, sends out the next ones.
    void step(bool go_on) {
        each_task([this, go_on](Task& task) {
            task.leaves.clear();
            task.more = false;
            for (int64_t b = task.begin; b < task.end; ++b) {
                Progress& tree = trees_[size_t(b)];
                land(task, tree, b);
                if (!go_on) continue;
                send(task, tree, b);
                task.more |= tree.begun < tree.budget;
            }
        });
    }

    void land(Task& task, Progress& tree, int64_t b) {
        for (int64_t i = 0; i < tree.in_flight; ++i) {
            const Flight& flight = tree.flights[i];
            if (tree.pending_SA != nullptr) count_pending(tree, flight, -1);
            if (flight.expands) {
                const int64_t index = task.first_row + flight.row;
                const EvaluationRow said = row(index);
                const bool good_values = values_valid(said.values_L, sizes_.layers);
                const bool good_logits = logits_valid(said.prior_logits_A, sizes_.actions);
                if (!good_values && task.bad_values.index < 0) task.bad_values = {b, index};
                if (!good_logits && task.bad_logits.index < 0) task.bad_logits = {b, index};
                if (!good_values || !good_logits) continue;
                const int64_t edge = flight.parent * sizes_.actions + flight.action;
                enter_leaf(tree.tree, flight, ends_text(tree.tree.children_tokens_SA[edge]), said, settings_.judge);
            }
            back_up(tree.tree, flight.node, settings_.judge);
        }
        tree.in_flight = 0;
    }

    void send(Task& task, Progress& tree, int64_t index) {
        while (tree.in_flight < settings_.leaves && tree.begun < tree.budget && !stop_.cancelled()) {
            Flight& flight = tree.flights[tree.in_flight];
            flight.node = static_cast<int32_t>(tree.first_slot + tree.begun);
            if (tree.pending_SA == nullptr) {
                descend<false>(task, tree, flight);
            } else {
                // At an edge that another leaf is about to fill: enough for this round.
                if (!descend<true>(task, tree, flight)) return;
                count_pending(tree, flight, 1);
            }
            if (flight.expands) {
                const int64_t edge = flight.parent * sizes_.actions + flight.action;
                flight.row = int64_t(task.leaves.size());
                task.leaves.push_back({index, flight.parent, tree.tree.children_tokens_SA[edge], flight.node});
            }
            ++tree.in_flight;
            ++tree.begun;
        }
    }

    // From the root to an unvisited action, a terminal node or the depth cap. `flight.node` comes in as the slot of a
    // new leaf. False: the leaf is in flight already.
    template <bool kPending>
    bool descend(Task& task, const Progress& progress, Flight& flight) {
        const TreeView& tree = progress.tree;
        int32_t node = kRoot;
        int64_t pending = progress.in_flight;
        for (int32_t depth = 1;; ++depth) {
            const int64_t action = choose<kPending>(task, progress, node, pending);
            const int64_t edge = node * sizes_.actions + action;
            const int32_t child = tree.children_index_SA[edge];
            flight.parent = node, flight.action = static_cast<int32_t>(action), flight.depth = depth;
            if constexpr (kPending) pending = progress.pending_SA[edge];
            if (child == kUnvisited) {
                flight.expands = true;
                return !(kPending && pending > 0);
            }
            if (tree.terminal_S[child] || depth >= settings_.max_depth) {
                flight.expands = false;
                flight.node = child;
                return true;
            }
            node = child;
        }
    }

    template <bool kPending>
    int64_t choose(Task& task, const Progress& progress, int32_t node, int64_t pending) {
        const TreeView& tree = progress.tree;
        const int64_t edge = node * sizes_.actions, actions = sizes_.actions;
        const RuleSettings& rules = settings_.rules;
        NodeStats stats{actions, tree.node_visits_S[node], tree.node_consensus_S[node], tree.raw_consensus_S[node],
                        tree.children_visits_SA + edge, tree.children_values_SA + edge,
                        tree.children_prior_probs_SA + edge, tree.children_prior_logits_SA + edge};
        const bool race = node == kRoot && rules.policy == Policy::gumbel;
        if constexpr (kPending) {
            // The race judges by what is known; everyone else takes what is in flight for lost.
            if (!race) add_virtual_losses(task, progress, edge, pending, stats);
        }
        if (node != kRoot) return choose_interior(rules, stats, task.scores_2A.data());
        RootStats root{tree.root_actions_A, tree.root_gumbel_A, stats.visits_A, 0};
        if (race) {
            root.considered_visit = progress.considered[progress.begun];
            if (kPending || progress.visits_before_A != nullptr) {
                for (int64_t a = 0; a < actions; ++a) {
                    const int32_t before = progress.visits_before_A != nullptr ? progress.visits_before_A[a] : 0;
                    task.race_A[size_t(a)] = stats.visits_A[a] - before + (kPending ? progress.pending_SA[a] : 0);
                }
                root.race_visits_A = task.race_A.data();
            }
        }
        return choose_root(rules, stats, root, task.scores_2A.data());
    }

    void add_virtual_losses(Task& task, const Progress& progress, int64_t edge, int64_t pending, NodeStats& stats) {
        if (pending == 0) return;
        stats.node_visits += static_cast<int32_t>(pending) * settings_.virtual_loss;
        for (int64_t a = 0; a < sizes_.actions; ++a) {
            const int32_t visits = stats.visits_A[a];
            const int32_t lost = progress.pending_SA[edge + a] * settings_.virtual_loss;
            task.visits_A[size_t(a)] = visits + lost;
            task.values_A[size_t(a)] = lost == 0 ? stats.values_A[a]
                                                 : stats.values_A[a] * static_cast<float>(visits) /
                                                       static_cast<float>(visits + lost);
        }
        stats.visits_A = task.visits_A.data();
        stats.values_A = task.values_A.data();
    }

    // Enters a leaf in flight on its way, or takes it off.
    void count_pending(Progress& tree, const Flight& flight, int32_t change) {
        int32_t node = flight.parent;
        tree.pending_SA[node * sizes_.actions + flight.action] += change;
        while (node != kRoot) {
            const int32_t parent = tree.tree.parents_S[node];
            tree.pending_SA[parent * sizes_.actions + tree.tree.action_from_parent_S[node]] += change;
            node = parent;
        }
    }

    // Puts the leaves of all tasks in one row; their number.
    int64_t gather() {
        int64_t count = 0;
        for (Task& task : tasks_) {
            task.first_row = count;
            if (tasks_.size() > 1) std::copy(task.leaves.begin(), task.leaves.end(), leaves_.begin() + count);
            count += int64_t(task.leaves.size());
        }
        return count;
    }

    bool ends_text(int64_t token) const {
        return std::binary_search(settings_.terminal_tokens.begin(), settings_.terminal_tokens.end(), token);
    }

    void refuse_values(const Row& bad) const {
        if (bad.index < 0) return;
        BadEvaluation error;
        error.tree = bad.tree;
        const float* values = row(bad.index).values_L;
        for (error.layer = 0; values_valid(values + error.layer, 1);) ++error.layer;
        error.value = values[error.layer];
        throw error;
    }

    void refuse_logits(const Row& bad) const {
        if (bad.index < 0) return;
        BadEvaluation error;
        error.tree = bad.tree;
        const float* logits = row(bad.index).prior_logits_A;
        error.logits_A.assign(logits, logits + sizes_.actions);
        throw error;
    }

    Evaluator& evaluator_;
    SearchSettings settings_;
    const TreeSizes sizes_;
    StopRule& stop_;
    std::vector<Progress> trees_;
    Buffer<Flight> flights_;
    Buffer<int64_t> actions_;
    Buffer<float> logits_, values_;
    std::unique_ptr<int32_t, decltype(&std::free)> pending_{nullptr, std::free};
    std::vector<int32_t> visits_before_;
    std::map<std::pair<int64_t, int64_t>, std::vector<int32_t>> races_;
    std::vector<Task> tasks_;
    std::vector<Leaf> leaves_;
};

}  // namespace

void search(Evaluator& evaluator, const SearchSettings& settings, uint8_t* block, const TreeSizes& sizes,
            StopRule& stop) {
    struct Flag {
        Evaluator& evaluator;
        ~Flag() { evaluator.cancel_flag = nullptr; }
    } flag{evaluator};
    evaluator.cancel_flag = stop.cancel != nullptr ? &stop.cancel->flag : nullptr;
    Run(evaluator, settings, block, sizes, stop).run();
}

}  // namespace crsm::search
