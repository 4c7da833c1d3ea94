#include "search/callback_evaluator.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "arrays.hpp"
#include "search/tree.hpp"

namespace crsm::search {
namespace {

nb::object numpy_vector(const std::vector<int64_t>& values) {
    Buffer<int64_t> buffer(int64_t(values.size()));
    std::copy(values.begin(), values.end(), buffer.data());
    return nb::cast(to_numpy(std::move(buffer), {values.size()}));
}

// A buffer of a Python object, given back at the end of the scope.
class BufferView {
public:
    explicit BufferView(nb::handle object) {
        ok_ = PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDES | PyBUF_FORMAT) == 0;
        if (!ok_) PyErr_Clear();
    }
    BufferView(const BufferView&) = delete;
    BufferView& operator=(const BufferView&) = delete;
    ~BufferView() {
        if (ok_) PyBuffer_Release(&view_);
    }

    template <typename T>
    bool holds(int64_t rows, int64_t columns) const {
        if (!ok_ || view_.ndim != 2 || view_.shape[0] != rows || view_.shape[1] != columns) return false;
        if (view_.itemsize != sizeof(T) || view_.format == nullptr || std::strlen(view_.format) != 1) return false;
        return std::strchr(std::is_same_v<T, float> ? "f" : "lq", view_.format[0]) != nullptr;
    }

    template <typename T>
    void copy_row(int64_t row, int64_t columns, T* out) const {
        const char* data = static_cast<const char*>(view_.buf) + row * view_.strides[0];
        if (view_.strides[1] == sizeof(T)) {
            std::memcpy(out, data, size_t(columns) * sizeof(T));
            return;
        }
        for (int64_t i = 0; i < columns; ++i) std::memcpy(out + i, data + i * view_.strides[1], sizeof(T));
    }

private:
    Py_buffer view_{};
    bool ok_ = false;
};

template <typename T>
void copy_rows(nb::handle evaluation, const std::string& name, const char* dtype, int64_t rows, int64_t columns,
               const std::vector<int64_t>& from, const std::vector<int64_t>& to, T* out) {
    const nb::object array = evaluation.attr(name.c_str());
    const BufferView view(array);
    if (!view.holds<T>(rows, columns)) {
        const nb::object found_shape = array.attr("shape"), found_dtype = array.attr("dtype");
        throw std::invalid_argument("evaluator: " + name + " is " + nb::str(found_dtype).c_str() +
                                    nb::str(nb::list(found_shape)).c_str() + "; allowed: " + dtype + "[" +
                                    std::to_string(rows) + ", " + std::to_string(columns) + "]");
    }
    for (size_t i = 0; i < from.size(); ++i) view.copy_row(from[i], columns, out + to[i] * columns);
}

std::vector<int64_t> counting(int64_t count) {
    std::vector<int64_t> numbers(static_cast<size_t>(count));
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
}

}  // namespace

CallbackEvaluator::CallbackEvaluator(nb::object evaluator, std::vector<int64_t> root_token_B)
    : evaluator_(std::move(evaluator)), trees_(nb::cast<int64_t>(evaluator_.attr("num_trees"))),
      actions_(nb::cast<int64_t>(evaluator_.attr("num_actions"))),
      layers_(nb::cast<int64_t>(evaluator_.attr("num_layers"))), root_token_B_(std::move(root_token_B)) {
    root_token_B_.resize(size_t(trees_));
}

void CallbackEvaluator::root(const EvaluationRows& out) {
    nb::gil_scoped_acquire gil;
    const nb::object evaluation = evaluator_.attr("root")();
    const std::vector<int64_t> rows = counting(trees_);
    take(evaluation, trees_, rows, rows, out);
    for (int64_t b = 0; b < trees_; ++b) root_token_B_[size_t(b)] = out.actions_RA[b * actions_];
}

void CallbackEvaluator::expand(const Leaf* leaves, int64_t count, const EvaluationRows& out) {
    nb::gil_scoped_acquire gil;
    bool several = false;
    for (int64_t i = 1; i < count; ++i) several |= leaves[i].tree == leaves[i - 1].tree;
    if (several && nb::hasattr(evaluator_, "expand_rows")) {
        expand_rows(leaves, count, out);
        return;
    }
    // Leaves of one tree are neighbours: its n-th leaf takes part in the n-th call.
    std::vector<std::vector<int64_t>> calls;
    size_t rank = 0;
    for (int64_t i = 0; i < count; ++i) {
        rank = i > 0 && leaves[i].tree == leaves[i - 1].tree ? rank + 1 : 0;
        if (calls.size() == rank) calls.emplace_back();
        calls[rank].push_back(i);
    }
    for (const std::vector<int64_t>& which : calls) {
        if (!cancelled()) expand_some(leaves, which, out);
    }
}

void CallbackEvaluator::expand_some(const Leaf* leaves, const std::vector<int64_t>& which, const EvaluationRows& out) {
    // Trees that rest hold the root and one of its tokens.
    std::vector<int64_t> parent_B(size_t(trees_), kRoot), node_B(size_t(trees_), leaves[which[0]].node), trees;
    std::vector<int64_t> action_B = root_token_B_;
    Buffer<bool> active_B(trees_);
    std::fill_n(active_B.data(), trees_, false);
    for (const int64_t i : which) {
        const size_t b = size_t(leaves[i].tree);
        parent_B[b] = leaves[i].parent, action_B[b] = leaves[i].token, node_B[b] = leaves[i].node;
        active_B.data()[b] = true;
        trees.push_back(leaves[i].tree);
    }
    const nb::object active = nb::cast(to_numpy(std::move(active_B), {size_t(trees_)}));
    const nb::object evaluation = evaluator_.attr("expand")(numpy_vector(parent_B), numpy_vector(action_B),
                                                            numpy_vector(node_B), active);
    take(evaluation, trees_, trees, which, out);
}

void CallbackEvaluator::expand_rows(const Leaf* leaves, int64_t count, const EvaluationRows& out) {
    std::vector<int64_t> tree_R, parent_R, action_R, node_R;
    for (int64_t i = 0; i < count; ++i) {
        tree_R.push_back(leaves[i].tree);
        parent_R.push_back(leaves[i].parent);
        action_R.push_back(leaves[i].token);
        node_R.push_back(leaves[i].node);
    }
    const nb::object evaluation = evaluator_.attr("expand_rows")(numpy_vector(tree_R), numpy_vector(parent_R),
                                                                 numpy_vector(action_R), numpy_vector(node_R));
    const std::vector<int64_t> rows = counting(count);
    take(evaluation, count, rows, rows, out);
}

void CallbackEvaluator::remap(const int64_t* new_from_old_BS, int64_t old_slots, int64_t slots) {
    nb::gil_scoped_acquire gil;
    if (!nb::hasattr(evaluator_, "remap")) return Evaluator::remap(new_from_old_BS, old_slots, slots);
    Buffer<int64_t> map(trees_ * old_slots);
    std::copy_n(new_from_old_BS, trees_ * old_slots, map.data());
    const nb::object array = nb::cast(to_numpy(std::move(map), {size_t(trees_), size_t(old_slots)}));
    evaluator_.attr("remap")(array, slots);
}

void CallbackEvaluator::take(nb::handle evaluation, int64_t rows, const std::vector<int64_t>& from,
                             const std::vector<int64_t>& to, const EvaluationRows& out) const {
    // The fields of an Evaluation keep their names whatever the rows are.
    copy_rows(evaluation, "actions_BA", "int64", rows, actions_, from, to, out.actions_RA);
    copy_rows(evaluation, "prior_logits_BA", "float32", rows, actions_, from, to, out.prior_logits_RA);
    copy_rows(evaluation, "values_BL", "float32", rows, layers_, from, to, out.values_RL);
}

}  // namespace crsm::search
