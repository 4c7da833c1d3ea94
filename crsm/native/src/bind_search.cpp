// The tree search and its evaluators. crsm/search/native.py is the caller and has checked what it hands over; what is
// checked here keeps any other caller from a crash.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "arrays.hpp"
#include "bindings.hpp"
#include "search/callback_evaluator.hpp"
#include "search/search.hpp"
#include "search/table_evaluator.hpp"

namespace crsm {
namespace {

using namespace search;
using std::chrono::duration_cast;

constexpr auto kInterruptInterval = std::chrono::milliseconds(50);

void require(bool holds, const char* name, int64_t value, const char* allowed) {
    if (!holds) {
        throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) + "; allowed: " + allowed);
    }
}

TreeSizes sizes_of(int64_t trees, int64_t slots, int64_t actions, int64_t layers) {
    require(trees >= 1, "trees", trees, "at least 1");
    require(slots >= 1 && slots < (1 << 30), "slots", slots, "1 to 2^30");
    require(actions >= 1, "actions", actions, "at least 1");
    require(layers >= 1, "layers", layers, "at least 1");
    // Edges are counted in 64 bits; their bytes must be too.
    require(trees <= (int64_t{1} << 56) / (slots * (actions * 32 + layers * 8 + 64)), "trees", trees,
            "a tree that fits into memory");
    return {trees, slots, actions, layers};
}

// The bytes of the block, and name, type, shape and offset of every array in it.
nb::tuple tree_layout(int64_t trees, int64_t slots, int64_t actions, int64_t layers) {
    const TreeSizes sizes = sizes_of(trees, slots, actions, layers);
    nb::list fields;
    for (const TreeField& field : tree_fields(sizes)) {
        nb::list shape;
        for (const int64_t size : field.shape) shape.append(size);
        fields.append(nb::make_tuple(field.name, field.dtype, nb::tuple(shape), field.offset));
    }
    return nb::make_tuple(tree_bytes(sizes), fields);
}

template <typename T>
std::vector<T> copy_of(const AnyArray& array, const char* name, std::initializer_list<int64_t> shape) {
    const T* data = checked<const T>(array, name, shape);
    return std::vector<T>(data, data + array.size());
}

// An evaluation as three arrays, for callers in Python.
struct EvaluationArrays {
    Buffer<int64_t> actions;
    Buffer<float> logits, values;
    size_t rows, num_actions, num_layers;

    EvaluationArrays(const Evaluator& evaluator, int64_t count)
        : actions(count * evaluator.num_actions()), logits(count * evaluator.num_actions()),
          values(count * evaluator.num_layers()), rows(size_t(count)), num_actions(size_t(evaluator.num_actions())),
          num_layers(size_t(evaluator.num_layers())) {}
    EvaluationRows out() { return {actions.data(), logits.data(), values.data()}; }
    nb::tuple to_tuple() {
        return nb::make_tuple(to_numpy(std::move(actions), {rows, num_actions}),
                              to_numpy(std::move(logits), {rows, num_actions}),
                              to_numpy(std::move(values), {rows, num_layers}));
    }
};

nb::tuple evaluate_roots(Evaluator& evaluator, int64_t slots) {
    require(slots >= 1, "slots", slots, "at least 1");
    EvaluationArrays arrays(evaluator, evaluator.num_trees());
    {
        nb::gil_scoped_release release;
        evaluator.reserve(slots);
        evaluator.root(arrays.out());
    }
    return arrays.to_tuple();
}

nb::tuple evaluate_leaves(Evaluator& evaluator, AnyArray tree_R, AnyArray parent_R, AnyArray action_R,
                          AnyArray node_R) {
    const int64_t* trees = checked<const int64_t>(tree_R, "tree_R", {-1});
    const int64_t count = int64_t(tree_R.shape(0));
    const int64_t* parents = checked<const int64_t>(parent_R, "parent_R", {count});
    const int64_t* actions = checked<const int64_t>(action_R, "action_R", {count});
    const int64_t* nodes = checked<const int64_t>(node_R, "node_R", {count});
    std::vector<Leaf> leaves;
    for (int64_t i = 0; i < count; ++i) {
        require(trees[i] >= 0 && trees[i] < evaluator.num_trees(), "tree_R", trees[i], "a tree of the evaluator");
        leaves.push_back({trees[i], parents[i], actions[i], nodes[i]});
    }
    EvaluationArrays arrays(evaluator, count);
    if (count > 0) {
        nb::gil_scoped_release release;
        evaluator.expand(leaves.data(), count, arrays.out());
    }
    return arrays.to_tuple();
}

std::string describe(const BadEvaluation& bad) {
    const std::string where = "evaluator: tree " + std::to_string(bad.tree);
    if (bad.layer >= 0) {
        return where + ", layer " + std::to_string(bad.layer) + ": value = " +
               nb::str(nb::float_(static_cast<double>(bad.value))).c_str() + "; allowed: [0, 1]";
    }
    nb::list logits;
    for (const float logit : bad.logits_A) logits.append(static_cast<double>(logit));
    return where + ": prior logits = " + nb::str(logits).c_str() +
           "; allowed: log-probabilities, at least one finite";
}

void run_search(Evaluator& evaluator, AnyArray block, int64_t slots, bool gumbel, bool minmax, AnyArray exploration,
                double value_scale, double maxvisit_init, AnyArray weights_L, double penalty, double root_prior_mass,
                int64_t max_considered, int64_t max_depth, AnyArray budget_B, AnyArray terminal_tokens, int64_t leaves,
                int64_t virtual_loss, std::optional<AnyArray> first_slot_B, std::optional<AnyArray> new_from_old_BS,
                const CancelToken* cancel, std::optional<double> microseconds, nb::object ask, double ask_interval,
                bool interruptible, int threads) {
    const TreeSizes sizes =
        sizes_of(evaluator.num_trees(), slots, evaluator.num_actions(), evaluator.num_layers());
    uint8_t* memory = checked<uint8_t>(block, "block", {tree_bytes(sizes)});
    SearchSettings settings{};
    settings.rules.policy = gumbel ? Policy::gumbel : Policy::puct;
    settings.rules.q_transform = minmax ? QTransform::minmax : QTransform::raw;
    settings.rules.exploration = checked<const float>(exploration, "exploration", {-1});
    settings.rules.value_scale = static_cast<float>(value_scale);
    settings.rules.maxvisit_init = static_cast<float>(maxvisit_init);
    settings.judge = {checked<const float>(weights_L, "weights_L", {sizes.layers}), static_cast<float>(penalty)};
    settings.root_prior_mass = root_prior_mass;
    settings.max_considered = max_considered;
    settings.max_depth = max_depth;
    settings.budget_B = checked<const int64_t>(budget_B, "budget_B", {sizes.trees});
    settings.terminal_tokens = copy_of<int64_t>(terminal_tokens, "terminal_tokens", {-1});
    settings.leaves = leaves;
    settings.virtual_loss = static_cast<int32_t>(virtual_loss);
    settings.threads = threads;
    require(max_considered >= 1, "max_considered", max_considered, "at least 1");
    require(max_depth >= 1, "max_depth", max_depth, "at least 1");
    require(leaves >= 1 && leaves <= 1 << 16, "leaves", leaves, "1 to 65536");
    require(virtual_loss >= 0 && virtual_loss <= 1 << 10, "virtual_loss", virtual_loss, "0 to 1024");
    if (first_slot_B.has_value() != new_from_old_BS.has_value()) {
        throw std::invalid_argument("first_slot_B, new_from_old_BS: one of them is None; allowed: both or neither");
    }
    if (first_slot_B) {
        settings.first_slot_B = checked<const int64_t>(*first_slot_B, "first_slot_B", {sizes.trees});
        settings.new_from_old_BS = checked<const int64_t>(*new_from_old_BS, "new_from_old_BS", {sizes.trees, -1});
        settings.old_slots = int64_t(new_from_old_BS->shape(1));
    }
    int64_t most_visits = 1;
    for (int64_t b = 0; b < sizes.trees; ++b) {
        const int64_t first = settings.first_slot_B != nullptr ? settings.first_slot_B[b] : 1;
        require(first >= 1 && first <= slots, "first_slot_B", first, "1 to the slots of a tree");
        require(settings.budget_B[b] >= 0 && settings.budget_B[b] <= slots - first, "budget_B", settings.budget_B[b],
                "0 to the free slots of the tree");
        const int64_t before =
            settings.first_slot_B != nullptr ? view_tree(memory, sizes, b).node_visits_S[kRoot] : int64_t{1};
        most_visits = std::max(most_visits, before + settings.budget_B[b]);
    }
    const int64_t table = int64_t(exploration.shape(0));
    require(gumbel || table > most_visits + leaves * virtual_loss, "exploration: entries", table,
            "one for every visit count that the search can reach");

    StopRule stop;
    stop.cancel = cancel;
    const StopRule::Clock::time_point now = StopRule::Clock::now();
    // A year is as good as for ever, and does not overflow.
    if (microseconds && *microseconds < 3e13) {
        stop.deadline = now + duration_cast<StopRule::Clock::duration>(
                                  std::chrono::duration<double, std::micro>(std::max(*microseconds, 0.0)));
    }
    if (!ask.is_none()) {
        stop.ask = [&ask] {
            nb::gil_scoped_acquire gil;
            return nb::cast<bool>(ask());
        };
        stop.interval = std::chrono::microseconds(static_cast<int64_t>(ask_interval));
    } else if (interruptible) {
        stop.ask = []() -> bool {
            nb::gil_scoped_acquire gil;
            if (PyErr_CheckSignals() != 0) throw nb::python_error();
            return false;
        };
        stop.interval = kInterruptInterval;
        stop.next = now + kInterruptInterval;
    }
    try {
        nb::gil_scoped_release release;
        search::search(evaluator, settings, memory, sizes, stop);
    } catch (const BadEvaluation& bad) {
        throw std::invalid_argument(describe(bad));
    }
}

}  // namespace

void bind_search(nb::module_& m) {
    m.def("tree_layout", &tree_layout, nb::arg("trees"), nb::arg("slots"), nb::arg("actions"), nb::arg("layers"));
    m.def(
        "bytes_per_tree",
        [](int64_t slots, int64_t actions, int64_t layers) {
            sizes_of(1, slots, actions, layers);
            return bytes_per_tree(slots, actions, layers);
        },
        nb::arg("slots"), nb::arg("actions"), nb::arg("layers"));

    nb::class_<CancelToken>(m, "CancelToken", "Ends searches from another thread.")
        .def(nb::init<>())
        .def("cancel", [](CancelToken& token) { token.flag.store(true, std::memory_order_relaxed); })
        .def_prop_ro("cancelled", [](const CancelToken& token) { return token.flag.load(std::memory_order_relaxed); });

    nb::class_<Evaluator>(m, "Evaluator", "A network that evaluates leaves of B trees; search takes any.")
        .def_prop_ro("num_trees", &Evaluator::num_trees)
        .def_prop_ro("num_actions", &Evaluator::num_actions)
        .def_prop_ro("num_layers", &Evaluator::num_layers)
        .def("bytes_per_tree", &Evaluator::bytes_per_tree, nb::arg("slots"))
        .def("evaluate_roots", &evaluate_roots, nb::arg("slots"),
             "Makes room for `slots` nodes per tree and evaluates the roots: tokens, logits, values.")
        .def("evaluate_leaves", &evaluate_leaves, nb::arg("tree_R"), nb::arg("parent_R"), nb::arg("action_R"),
             nb::arg("node_R"), "Evaluates leaves: tokens, logits, values.");

    nb::class_<TableEvaluator, Evaluator>(m, "TableEvaluator", "A finite decision process, for tests.")
        .def(
            "__init__",
            [](TableEvaluator* self, AnyArray roots, AnyArray next_state, AnyArray prior_logits, AnyArray values) {
                auto next = copy_of<int64_t>(next_state, "next_state_ZA", {-1, -1});
                const int64_t states = int64_t(next_state.shape(0)), actions = int64_t(next_state.shape(1));
                auto logits = copy_of<float>(prior_logits, "prior_logits_ZA", {states, actions});
                auto worth = copy_of<float>(values, "values_ZL", {states, -1});
                require(states >= 1, "states", states, "at least 1");
                require(actions >= 1, "actions", actions, "at least 1");
                require(values.shape(1) >= 1, "layers", int64_t(values.shape(1)), "at least 1");
                new (self) TableEvaluator(copy_of<int64_t>(roots, "roots_B", {-1}), std::move(next), std::move(logits),
                                          std::move(worth), actions, int64_t(values.shape(1)));
            },
            nb::arg("roots_B"), nb::arg("next_state_ZA"), nb::arg("prior_logits_ZA"), nb::arg("values_ZL"));

    nb::class_<CallbackEvaluator, Evaluator>(m, "CallbackEvaluator", "An evaluator written in Python.")
        .def(nb::init<nb::object, std::vector<int64_t>>(), nb::arg("evaluator"),
             nb::arg("root_token_B") = std::vector<int64_t>());

    m.def("search", &run_search, nb::arg("evaluator"), nb::kw_only(), nb::arg("block"), nb::arg("slots"),
          nb::arg("gumbel"), nb::arg("minmax"), nb::arg("exploration"), nb::arg("value_scale"),
          nb::arg("maxvisit_init"), nb::arg("weights_L"), nb::arg("penalty"), nb::arg("root_prior_mass"),
          nb::arg("max_considered"), nb::arg("max_depth"), nb::arg("budget_B"), nb::arg("terminal_tokens"),
          nb::arg("leaves"), nb::arg("virtual_loss"), nb::arg("first_slot_B").none(), nb::arg("new_from_old_BS").none(),
          nb::arg("cancel").none(), nb::arg("microseconds").none(), nb::arg("ask").none(), nb::arg("ask_interval"),
          nb::arg("interruptible"), nb::arg("threads"));
}

}  // namespace crsm
