// Arrays that cross from Python: checks that name the argument, and owned memory that goes back.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace crsm {

namespace nb = nanobind;

// Any array on the CPU that speaks DLPack or the buffer protocol; what it holds is checked by `checked`.
using AnyArray = nb::ndarray<nb::device::cpu>;

inline std::string shape_text(std::initializer_list<int64_t> shape) {
    std::string text = "(";
    for (const int64_t size : shape) {
        if (text.size() > 1) text += ", ";
        text += size < 0 ? "any" : std::to_string(size);
    }
    return text + ")";
}

template <typename Element>
const char* type_name() {
    using T = std::remove_const_t<Element>;
    if constexpr (std::is_same_v<T, float>) return "float32";
    if constexpr (std::is_same_v<T, double>) return "float64";
    if constexpr (std::is_same_v<T, int64_t>) return "int64";
    if constexpr (std::is_same_v<T, int32_t>) return "int32";
    if constexpr (std::is_same_v<T, uint8_t>) return "uint8";
    if constexpr (std::is_same_v<T, bool>) return "bool";
    return "unknown";
}

// The data of a contiguous array of the given type and shape (-1: any size).
// Raises ValueError naming the argument and what is allowed.
template <typename T>
T* checked(const AnyArray& array, const char* name, std::initializer_list<int64_t> shape) {
    if (array.dtype() != nb::dtype<T>()) {
        throw std::invalid_argument(std::string(name) + ": wrong dtype; allowed: " +
                                    type_name<std::remove_const_t<T>>());
    }
    bool fits = array.ndim() == shape.size();
    std::string found = "(";
    for (size_t axis = 0; axis < array.ndim(); ++axis) {
        found += (axis > 0 ? ", " : "") + std::to_string(array.shape(axis));
        if (fits && shape.begin()[axis] >= 0 && static_cast<int64_t>(array.shape(axis)) != shape.begin()[axis]) {
            fits = false;
        }
    }
    if (!fits) {
        throw std::invalid_argument(std::string(name) + " has shape " + found + "); allowed: " + shape_text(shape));
    }
    int64_t stride = 1;
    for (size_t axis = array.ndim(); axis-- > 0;) {
        if (array.shape(axis) != 1 && array.stride(axis) != stride && array.size() > 0) {
            throw std::invalid_argument(std::string(name) + ": not contiguous; allowed: row-major without gaps");
        }
        stride *= static_cast<int64_t>(array.shape(axis));
    }
    return static_cast<T*>(array.data());
}

// Memory aligned to 64 bytes, uninitialised; freed with its owner. Throws std::bad_alloc.
template <typename T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t count) : size_(count) {
        const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) throw std::bad_alloc();
    }
    Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
        other.data_ = nullptr;
        other.size_ = 0;
    }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Buffer() { std::free(data_); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    int64_t size() const { return size_; }
    T* release() {
        T* data = data_;
        data_ = nullptr;
        return data;
    }

private:
    T* data_ = nullptr;
    int64_t size_ = 0;
};

// Hands a buffer over to Python as a NumPy array of the given shape.
template <typename T>
nb::ndarray<nb::numpy, T> to_numpy(Buffer<T>&& buffer, std::initializer_list<size_t> shape) {
    T* data = buffer.release();
    nb::capsule owner(data, [](void* p) noexcept { std::free(p); });
    return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

}  // namespace crsm
