#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <hdf5.h>

#include "selm/h5/file.hpp"

namespace selm::h5 {

/// Owner of one HDF5 identifier.
class Id {
  public:
    using Closer = herr_t (*)(hid_t);
    Id() = default;
    Id(hid_t id, Closer closer) : id_(id), closer_(closer) {}
    Id(Id&& other) noexcept : id_(std::exchange(other.id_, H5I_INVALID_HID)), closer_(other.closer_) {}
    Id& operator=(Id&& other) noexcept
    {
        std::swap(id_, other.id_);
        std::swap(closer_, other.closer_);
        return *this;
    }
    ~Id()
    {
        if (id_ >= 0)
            closer_(id_);
    }
    hid_t get() const noexcept { return id_; }
    bool valid() const noexcept { return id_ >= 0; }
    hid_t release() noexcept { return std::exchange(id_, H5I_INVALID_HID); }

  private:
    hid_t id_ = H5I_INVALID_HID;
    Closer closer_ = nullptr;
};

/// HDF5 prints nothing itself: its messages go into selm::Error.
void silence_error_stack();
/// The innermost message of HDF5's error stack, which is cleared.
std::string hdf5_reason();

hid_t memory_type(ElementType type);
hid_t stored_type(ElementType type);
std::optional<ElementType> known_type(hid_t type); ///< nullopt: not one of SELM's

std::vector<hsize_t> dimensions(const std::vector<std::int64_t>& shape);
/// A memory space of @p elements, of which all are selected; nothing is when there are none.
Id memory_space(std::int64_t elements);
/// Selects rows [first, first + count) of a dataset's space.
Id row_selection(hid_t dataset, const DatasetInfo& info, std::int64_t first, std::int64_t count);
/// HDF5's reasons (H5D_MPIO_*) for not transferring collectively, in words.
std::string words_of_cause(std::uint32_t cause);

// Paths inside a file.
std::string parent_of(const std::string& path);
std::string join(const std::string& group, const std::string& name);

} // namespace selm::h5
