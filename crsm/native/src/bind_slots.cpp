// The slots of crsm/native/slots.py. Its calls come once a token, so arguments are read without detours.
#include "bound_slots.hpp"

#include <cstring>

#include "bindings.hpp"

namespace crsm {
namespace {

size_t size(int64_t value) { return static_cast<size_t>(value); }

[[noreturn]] void refuse(const std::string& name, const std::string& found, const std::string& allowed) {
    throw std::invalid_argument(name + found + "; allowed: " + allowed);
}

// The memory of an array without gaps, while it is held.
class Held {
public:
    Held(nb::handle object, const char* name) {
        if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_FORMAT | PyBUF_ND) != 0) {
            PyErr_Clear();
            refuse(name, " is no array without gaps", "a contiguous numpy array");
        }
    }
    Held(Held&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
    Held(const Held&) = delete;
    ~Held() {
        if (view_.obj != nullptr) PyBuffer_Release(&view_);
    }

    const void* data() const { return view_.buf; }
    int ndim() const { return view_.ndim; }
    int64_t shape(int axis) const { return view_.shape[axis]; }
    int64_t count() const { return view_.len / view_.itemsize; }
    bool is(const char* formats, int64_t itemsize) const {
        return view_.itemsize == itemsize && view_.format != nullptr && view_.format[0] != '\0' &&
               view_.format[1] == '\0' && std::string(formats).find(view_.format[0]) != std::string::npos;
    }

private:
    Py_buffer view_{};
};

// Whole numbers: an int64 array, or any sequence of Python's own.
std::vector<int64_t> integers(nb::handle object, const char* name) {
    PyObject* sequence = object.ptr();
    if (!PyList_Check(sequence) && !PyTuple_Check(sequence) && PyObject_CheckBuffer(sequence)) {
        const Held held(object, name);
        if (held.ndim() != 1) refuse(name, " has " + std::to_string(held.ndim()) + " axes", "one");
        if (!held.is("lq", 8)) refuse(name, ": wrong dtype", "int64");
        const int64_t* data = static_cast<const int64_t*>(held.data());
        return {data, data + held.count()};
    }
    const nb::object items = nb::steal(PySequence_Fast(sequence, name));
    if (!items.is_valid()) throw nb::python_error();
    std::vector<int64_t> numbers(size(PySequence_Fast_GET_SIZE(items.ptr())));
    for (size_t i = 0; i < numbers.size(); ++i) {
        numbers[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i)));
        if (numbers[i] == -1 && PyErr_Occurred()) throw nb::python_error();
    }
    return numbers;
}

std::vector<char> truths(nb::handle object, const char* name) {
    const nb::object items = nb::steal(PySequence_Fast(object.ptr(), name));
    if (!items.is_valid()) throw nb::python_error();
    std::vector<char> values(size(PySequence_Fast_GET_SIZE(items.ptr())));
    for (size_t i = 0; i < values.size(); ++i) {
        const int truth = PyObject_IsTrue(PySequence_Fast_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i)));
        if (truth < 0) throw nb::python_error();
        values[i] = static_cast<char>(truth);
    }
    return values;
}

void check_length(const char* name, size_t found, size_t allowed) {
    if (found != allowed) {
        refuse(std::string(name) + " has ", std::to_string(found) + " entries",
               std::to_string(allowed) + ", one for each of slots");
    }
}

// One factor of a write, (L, R, width), in float32; `widened` keeps what had to be converted from bf16.
const float* factor(const Held& held, const char* name, int64_t layers, int64_t rank, int64_t width,
                    std::vector<std::vector<float>>& widened) {
    if (held.ndim() != 3 || held.shape(0) != layers || held.shape(1) != rank || held.shape(2) != width) {
        std::string found = " has shape (";
        for (int axis = 0; axis < held.ndim(); ++axis) found += (axis > 0 ? ", " : "") + std::to_string(held.shape(axis));
        refuse(name, found + ")", shape_text({layers, rank, width}));
    }
    if (held.is("f", 4)) return static_cast<const float*>(held.data());
    if (!held.is("H", 2)) refuse(name, ": wrong dtype", "float32, or bf16 as uint16");
    const uint16_t* from = static_cast<const uint16_t*>(held.data());
    std::vector<uint32_t> bits(from, from + held.count());
    std::vector<float> floats(bits.size());
    for (uint32_t& word : bits) word <<= 16;
    std::memcpy(floats.data(), bits.data(), bits.size() * sizeof(float));
    widened.push_back(std::move(floats));
    return widened.back().data();
}

std::vector<const float*> layers_of(const std::vector<AnyArray>& arrays, const char* name, int64_t layers,
                                    std::initializer_list<int64_t> shape) {
    if (static_cast<int64_t>(arrays.size()) != layers) {
        refuse("the state has ", std::to_string(arrays.size()) + " " + name, "one a layer, " + std::to_string(layers));
    }
    std::vector<const float*> data;
    for (const AnyArray& array : arrays) data.push_back(checked<const float>(array, name, shape));
    return data;
}

}  // namespace

void BoundSlots::check_slot(int64_t slot) const {
    if (slot < 0 || slot >= slots_->capacity()) {
        refuse("slot ", std::to_string(slot), "0 to " + std::to_string(slots_->capacity() - 1));
    }
}

std::vector<int64_t> BoundSlots::checked_slots(nb::handle slots) const {
    std::vector<int64_t> numbers = integers(slots, "slots");
    for (const int64_t slot : numbers) check_slot(slot);
    return numbers;
}

void BoundSlots::put(nb::handle slots, const std::vector<AnyArray>& conv, const std::vector<AnyArray>& ssm,
                     AnyArray hidden) {
    const DecodeSizes& s = slots_->sizes();
    const std::vector<int64_t> numbers = checked_slots(slots);
    const int64_t batch = static_cast<int64_t>(numbers.size());
    const auto conv_L = layers_of(conv, "conv_BCK", s.n_layer, {batch, s.conv_channels(), s.d_conv - 1});
    const auto ssm_L = layers_of(ssm, "ssm_BHPN", s.n_layer, {batch, s.n_heads, s.headdim, s.d_state});
    const float* hidden_BLD = checked<const float>(hidden, "hidden_BLD", {batch, s.n_layer, s.d_model});
    for (int64_t row = 0; row < batch; ++row) slots_->put(numbers[size(row)], conv_L, ssm_L, hidden_BLD, row);
}

void BoundSlots::restore(int64_t slot, const std::vector<AnyArray>& conv, const std::vector<AnyArray>& ssm,
                         AnyArray hidden, const std::vector<AnyArray>& delta, int64_t expires, AnyArray decays) {
    const DecodeSizes& s = slots_->sizes();
    check_slot(slot);
    const auto conv_L = layers_of(conv, "conv_BCK", s.n_layer, {1, s.conv_channels(), s.d_conv - 1});
    const auto ssm_L = layers_of(ssm, "ssm_BHPN", s.n_layer, {1, s.n_heads, s.headdim, s.d_state});
    const auto delta_L = layers_of(delta, "delta_BHPN", s.n_layer, {1, s.n_heads, s.headdim, s.d_state});
    const float* hidden_BLD = checked<const float>(hidden, "hidden_BLD", {1, s.n_layer, s.d_model});
    const float* decay_WLH = checked<const float>(decays, "decays_WLH", {-1, s.n_layer, s.n_heads});
    slots_->put(slot, conv_L, ssm_L, hidden_BLD, 0);
    slots_->set_steering(slot, delta_L, expires, decay_WLH, static_cast<int64_t>(decays.shape(0)));
}

nb::tuple BoundSlots::save(int64_t slot) {
    const DecodeSizes& s = slots_->sizes();
    check_slot(slot);
    const int64_t L = s.n_layer, C = s.conv_channels(), K = s.d_conv - 1, ssm_count = s.d_inner() * s.d_state;
    const int64_t depth = slots_->depth(slot);
    Buffer<float> conv(L * C * K), ssm(L * ssm_count), hidden(L * s.d_model), delta(L * ssm_count);
    Buffer<float> decays(depth * L * s.n_heads);
    for (int64_t layer = 0; layer < L; ++layer) {
        slots_->copy_conv(slot, layer, conv.data() + layer * C * K);
        slots_->copy_ssm(slot, layer, ssm.data() + layer * ssm_count);
        slots_->copy_delta(slot, layer, delta.data() + layer * ssm_count);
    }
    slots_->copy_hidden(slot, hidden.data());
    slots_->copy_decays(slot, decays.data());
    const size_t H = size(s.n_heads), P = size(s.headdim), N = size(s.d_state);
    return nb::make_tuple(to_numpy(std::move(conv), {size(L), 1, size(C), size(K)}),
                          to_numpy(std::move(ssm), {size(L), 1, H, P, N}),
                          to_numpy(std::move(hidden), {1, size(L), size(s.d_model)}),
                          to_numpy(std::move(delta), {size(L), 1, H, P, N}), slots_->expires(slot),
                          to_numpy(std::move(decays), {size(depth), size(L), 1, H}));
}

nb::tuple BoundSlots::read(nb::handle slots, nb::handle layers, bool conv) {
    const DecodeSizes& s = slots_->sizes();
    const std::vector<int64_t> numbers = checked_slots(slots), chosen = integers(layers, "layers");
    for (const int64_t layer : chosen) {
        if (layer < 0 || layer >= s.n_layer) {
            refuse("layer ", std::to_string(layer), "0 to " + std::to_string(s.n_layer - 1));
        }
    }
    const int64_t B = static_cast<int64_t>(numbers.size()), picked = static_cast<int64_t>(chosen.size());
    const int64_t L = s.n_layer, C = s.conv_channels(), K = s.d_conv - 1, ssm_count = s.d_inner() * s.d_state;
    Buffer<float> hidden(B * L * s.d_model), ssm(B * picked * ssm_count), windows(conv ? B * L * C * K : 0);
    {
        nb::gil_scoped_release release;
        for (int64_t row = 0; row < B; ++row) {
            const int64_t slot = numbers[size(row)];
            slots_->copy_hidden(slot, hidden.data() + row * L * s.d_model);
            for (int64_t i = 0; i < picked; ++i) {
                slots_->copy_ssm(slot, chosen[size(i)], ssm.data() + (row * picked + i) * ssm_count);
            }
            for (int64_t layer = 0; conv && layer < L; ++layer) {
                slots_->copy_conv(slot, layer, windows.data() + (row * L + layer) * C * K);
            }
        }
    }
    nb::object maybe = nb::none();
    if (conv) maybe = nb::cast(to_numpy(std::move(windows), {size(B), size(L), size(C), size(K)}));
    return nb::make_tuple(
        to_numpy(std::move(hidden), {size(B), size(L), size(s.d_model)}),
        to_numpy(std::move(ssm), {size(B), size(picked), size(s.n_heads), size(s.headdim), size(s.d_state)}), maybe);
}

// `writes`: (index into slots, u_LRE, b_LRN, alpha_L, late, expires) each.
void BoundSlots::steer(nb::handle slots, nb::handle positions, nb::handle tracked, nb::list writes, double largest) {
    const DecodeSizes& s = slots_->sizes();
    const std::vector<int64_t> numbers = checked_slots(slots), now = integers(positions, "positions");
    const std::vector<char> keep = truths(tracked, "tracked");
    check_length("positions", now.size(), numbers.size());
    check_length("tracked", keep.size(), numbers.size());
    std::vector<Held> held;
    std::vector<std::vector<float>> widened;
    std::vector<SlotWrite> parsed(nb::len(writes));
    held.reserve(2 * parsed.size());
    for (size_t i = 0; i < parsed.size(); ++i) {
        const nb::tuple item = nb::borrow<nb::tuple>(writes[i]);
        SlotWrite& write = parsed[i];
        write.index = nb::cast<int64_t>(item[0]);
        if (write.index < 0 || write.index >= static_cast<int64_t>(numbers.size())) {
            refuse("injections name index ", std::to_string(write.index), "an index into slots");
        }
        held.emplace_back(item[1], "write_u_LRE");
        held.emplace_back(item[2], "write_b_LRN");
        const Held &u = held[2 * i], &b = held[2 * i + 1];
        write.rank_R = u.ndim() == 3 ? u.shape(1) : -1;
        write.u_LRE = factor(u, "write_u_LRE", s.n_layer, write.rank_R, s.d_inner(), widened);
        write.b_LRN = factor(b, "write_b_LRN", s.n_layer, write.rank_R, s.d_state, widened);
        for (const nb::handle alpha : item[3]) write.alpha_L.push_back(nb::cast<double>(alpha));
        if (static_cast<int64_t>(write.alpha_L.size()) != s.n_layer) {
            refuse("alpha_L has ", std::to_string(write.alpha_L.size()) + " entries", std::to_string(s.n_layer));
        }
        write.late = nb::cast<int64_t>(item[4]);
        write.expires = nb::cast<int64_t>(item[5]);
    }
    nb::gil_scoped_release release;
    slots_->steer(numbers, now, keep, parsed, static_cast<float>(largest));
}

BoundSlots::Tokens BoundSlots::checked_tokens(nb::handle tokens, nb::handle slots, int64_t remember,
                                              const AnyArray& logits) const {
    const DecodeSizes& s = slots_->sizes();
    Tokens checked_ones{integers(tokens, "token_B"), checked_slots(slots), nullptr};
    const std::vector<int64_t>& said = checked_ones.said;
    check_length("token_B", said.size(), checked_ones.slots.size());
    for (size_t row = 0; row < said.size(); ++row) {
        if (said[row] < 0 || said[row] >= s.vocab_size) {
            refuse("token_B[" + std::to_string(row) + "] = ", std::to_string(said[row]),
                   "0 to " + std::to_string(s.vocab_size - 1));
        }
    }
    if (remember < 0) refuse("remember = ", std::to_string(remember), "at least 0");
    checked_ones.logits_BV = checked<float>(logits, "logits_BV", {static_cast<int64_t>(said.size()), s.vocab_size});
    return checked_ones;
}

void BoundSlots::step(nb::handle tokens, nb::handle slots, int64_t remember, AnyArray logits, int threads) {
    const Tokens named = checked_tokens(tokens, slots, remember, logits);
    nb::gil_scoped_release release;
    slots_->step(named.said, named.slots, remember, named.logits_BV, threads);
}

std::vector<int64_t> BoundSlots::step_log_probs(nb::handle tokens, nb::handle slots, int64_t remember,
                                                AnyArray log_probs, int threads) {
    const Tokens named = checked_tokens(tokens, slots, remember, log_probs);
    nb::gil_scoped_release release;
    return slots_->step_log_probs(named.said, named.slots, remember, named.logits_BV, threads);
}

void BoundSlots::free(int64_t slot) {
    check_slot(slot);
    slots_->forget(slot);
}

void bind_slots(nb::module_& m) {
    nb::class_<BoundSlots>(m, "Slots")
        .def_prop_ro("capacity", &BoundSlots::capacity)
        .def("grow", &BoundSlots::grow, nb::arg("capacity"))
        .def("put", &BoundSlots::put, nb::arg("slots"), nb::arg("conv"), nb::arg("ssm"), nb::arg("hidden"))
        .def("restore", &BoundSlots::restore, nb::arg("slot"), nb::arg("conv"), nb::arg("ssm"), nb::arg("hidden"),
             nb::arg("delta"), nb::arg("expires"), nb::arg("decays"))
        .def("save", &BoundSlots::save, nb::arg("slot"))
        .def("read", &BoundSlots::read, nb::arg("slots"), nb::arg("layers"), nb::arg("conv"))
        .def("steer", &BoundSlots::steer, nb::arg("slots"), nb::arg("positions"), nb::arg("tracked"),
             nb::arg("writes"), nb::arg("largest"))
        .def("step", &BoundSlots::step, nb::arg("tokens"), nb::arg("slots"), nb::arg("remember"), nb::arg("logits"),
             nb::arg("threads") = 0)
        .def("step_log_probs", &BoundSlots::step_log_probs, nb::arg("tokens"), nb::arg("slots"), nb::arg("remember"),
             nb::arg("log_probs"), nb::arg("threads") = 0)
        .def("free", &BoundSlots::free, nb::arg("slot"));
}

}  // namespace crsm
