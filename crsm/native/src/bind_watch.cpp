// Notices that a model's parameters have changed, as crsm/native/decoder.py promises: before every token, so in C++.
#include <vector>

#include "arrays.hpp"
#include "bindings.hpp"

namespace crsm {
namespace {

class Watch {
public:
    // The tensor that `holder[key]` is now, its version (None: it does not count) and the address of its data.
    void add(nb::dict holder, nb::str key, nb::object tensor, nb::object version, int64_t place) {
        // Looked up once, in the class: as descriptors, which take the tensor.
        const nb::handle type = tensor.type();
        Watched one{holder, key, tensor, type.attr("data_ptr"), nb::object(), place, 0};
        if (!version.is_none()) {
            one.get_version = type.attr("_version");
            one.version = nb::cast<int64_t>(version);
            if (Py_TYPE(one.get_version.ptr())->tp_descr_get == nullptr) {
                throw std::invalid_argument("_version is no property of " + nb::cast<std::string>(nb::repr(type)) +
                                            "; allowed: PyTorch's tensors");
            }
        }
        watched_.push_back(std::move(one));
    }

    // Whether one of them was replaced, written to, or given other memory.
    bool changed() const {
        for (const Watched& one : watched_) {
            PyObject* now = PyDict_GetItemWithError(one.holder.ptr(), one.key.ptr());  // borrowed
            if (now != one.tensor.ptr()) {
                if (now == nullptr && PyErr_Occurred()) throw nb::python_error();
                return true;
            }
            if (number(PyObject_CallOneArg(one.data_ptr.ptr(), now)) != one.place) return true;
            if (!one.get_version.is_valid()) continue;
            PyObject* getter = one.get_version.ptr();
            PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(now));
            if (number(Py_TYPE(getter)->tp_descr_get(getter, now, type)) != one.version) return true;
        }
        return false;
    }

private:
    struct Watched {
        nb::dict holder;
        nb::str key;
        nb::object tensor, data_ptr, get_version;  // the last is nothing for a tensor that does not count
        int64_t place, version;
    };

    // Takes the reference over.
    static int64_t number(PyObject* found) {
        if (found == nullptr) throw nb::python_error();
        const int64_t value = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(found));
        Py_DECREF(found);
        return value;
    }

    std::vector<Watched> watched_;
};

}  // namespace

void bind_watch(nb::module_& m) {
    nb::class_<Watch>(m, "Watch")
        .def(nb::init<>())
        .def("add", &Watch::add, nb::arg("holder"), nb::arg("key"), nb::arg("tensor"), nb::arg("version").none(),
             nb::arg("place"))
        .def("changed", &Watch::changed);
}

}  // namespace crsm
