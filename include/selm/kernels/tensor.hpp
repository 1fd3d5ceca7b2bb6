#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "selm/base/error.hpp"

namespace selm {

enum class DType { f32, bf16 };
enum class Device { cpu, cuda };

inline std::size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

/**
 * @brief A matrix [rows, columns] with a row stride (in elements), on one device: a cheap handle that shares ownership of
 * its storage (or borrows it when storage is empty). Vectors are [1, n].
 */
struct Tensor {
    std::shared_ptr<void> storage;
    void* data = nullptr;
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::int64_t stride = 0;
    DType dtype = DType::f32;
    Device device = Device::cpu;

    bool empty() const { return rows == 0 || columns == 0; }
    float* f32() const
    {
        SELM_EXPECT(dtype == DType::f32);
        return static_cast<float*>(data);
    }
    float* row_f32(std::int64_t row) const { return f32() + row * stride; }
    std::uint16_t* bf16() const
    {
        SELM_EXPECT(dtype == DType::bf16);
        return static_cast<std::uint16_t*>(data);
    }
    Tensor slice_rows(std::int64_t begin, std::int64_t count) const
    {
        SELM_EXPECT(begin >= 0 && count >= 0 && begin + count <= rows);
        Tensor out = *this;
        out.data = static_cast<char*>(data) + static_cast<std::size_t>(begin * stride) * size_of(dtype);
        out.rows = count;
        return out;
    }
    Tensor slice_columns(std::int64_t begin, std::int64_t count) const
    {
        SELM_EXPECT(begin >= 0 && count >= 0 && begin + count <= columns);
        Tensor out = *this;
        out.data = static_cast<char*>(data) + static_cast<std::size_t>(begin) * size_of(dtype);
        out.columns = count;
        return out;
    }
};

/// Borrowed view of host memory, contiguous [rows, columns].
inline Tensor borrow_f32(float* data, std::int64_t rows, std::int64_t columns)
{
    return {nullptr, data, rows, columns, columns, DType::f32, Device::cpu};
}

} // namespace selm
