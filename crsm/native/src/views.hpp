// Arrays whose rows are contiguous, but may lie apart: slices of a wider buffer, used in place.
#pragma once

#include <nanobind/stl/optional.h>

#include <optional>

#include "arrays.hpp"
#include "scan.hpp"

namespace crsm {

using MaybeArray = std::optional<AnyArray>;

// A (batch, length, width) array with contiguous rows. Raises ValueError naming the argument and what is allowed.
template <typename T>
Rows<T> checked_rows(const AnyArray& array, const char* name, int64_t batch, int64_t length, int64_t width) {
    if (array.dtype() != nb::dtype<std::remove_const_t<T>>()) {
        throw std::invalid_argument(std::string(name) + ": wrong dtype; allowed: " +
                                    type_name<T>());
    }
    const int64_t want[3] = {batch, length, width};
    std::string found = "(";
    bool fits = array.ndim() == 3;
    for (size_t axis = 0; axis < array.ndim(); ++axis) {
        found += (axis > 0 ? ", " : "") + std::to_string(array.shape(axis));
        if (fits && want[axis] >= 0 && static_cast<int64_t>(array.shape(axis)) != want[axis]) fits = false;
    }
    if (!fits) {
        throw std::invalid_argument(std::string(name) + " has shape " + found + "); allowed: " +
                                    shape_text({batch, length, width}));
    }
    if (array.shape(2) > 1 && array.stride(2) != 1) {
        throw std::invalid_argument(std::string(name) + ": last axis has stride " + std::to_string(array.stride(2)) +
                                    "; allowed: 1");
    }
    return {static_cast<T*>(array.data()), array.stride(0), array.stride(1)};
}

// Null where the argument is None.
template <typename T>
T* checked_optional(const MaybeArray& array, const char* name, std::initializer_list<int64_t> shape) {
    return array.has_value() ? checked<T>(*array, name, shape) : nullptr;
}

// Calls function.operator()<float>() or <double>() by the array's dtype. Raises ValueError for any other.
template <typename F>
void by_dtype(const AnyArray& array, const char* name, F&& function) {
    if (array.dtype() == nb::dtype<float>()) return function.template operator()<float>();
    if (array.dtype() == nb::dtype<double>()) return function.template operator()<double>();
    throw std::invalid_argument(std::string(name) + ": wrong dtype; allowed: float32, float64");
}

}  // namespace crsm
