#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "selm/base/error.hpp"
#include "selm/comm/communicator.hpp"

namespace selm::h5 {

/// The element types of SELM's files (little endian).
enum class ElementType { uint8, int32, int64, float32, float64 };

const char* name_of(ElementType type) noexcept;   ///< "uint8", "int32", ...
std::size_t bytes_of(ElementType type) noexcept;  ///< bytes of one element

template<typename T>
constexpr ElementType element_type() noexcept
{
    if constexpr (std::is_same_v<T, std::uint8_t>)
        return ElementType::uint8;
    else if constexpr (std::is_same_v<T, std::int32_t>)
        return ElementType::int32;
    else if constexpr (std::is_same_v<T, std::int64_t>)
        return ElementType::int64;
    else if constexpr (std::is_same_v<T, float>)
        return ElementType::float32;
    else {
        static_assert(std::is_same_v<T, double>, "uint8, int32, int64, float or double");
        return ElementType::float64;
    }
}

struct DatasetInfo {
    ElementType type = ElementType::uint8;
    std::vector<std::int64_t> shape; ///< at least one dimension

    std::int64_t rows() const { return shape.front(); }
    std::int64_t row_elements() const; ///< product of the dimensions after the first
    std::int64_t elements() const { return rows() * row_elements(); }
};

using AttributeValue = std::variant<std::string, std::int64_t, double>;
using Attributes = std::map<std::string, AttributeValue>;

/// How the collective writes of a file went; a fallback to independent transfer is correct but slow on many ranks.
struct TransferCount {
    std::int64_t collective = 0; ///< dataset writes that MPI-IO really did collectively
    std::int64_t fallbacks = 0;  ///< dataset writes that HDF5 broke into independent ones
    std::string cause;           ///< HDF5's reason of the first fallback, in words
};

/**
 * @brief An HDF5 file: read by any rank alone, or created by all ranks of a communicator together.
 *
 * Paths are absolute ("/prompts/text"). HDF5's error stack is silenced and folded into one selm::Error: bad_data while
 * reading, io while writing. Not for use from several threads at a time.
 */
class File {
  public:
    /// Opens for reading by this rank alone (no locks, no communication).
    /// @throws Error bad_data: missing, a directory, unreadable, not HDF5, truncated; each says so.
    static File open(const std::string& path);

    /**
     * @brief Creates (or overwrites) a file for writing. Collective over @p comm, which must outlive the File; with one
     * rank no MPI is needed. Metadata reads and writes are collective.
     * @throws Error io on every rank when it cannot be created.
     */
    static File create(const std::string& path, Communicator& comm);

    File(File&& other) noexcept;
    File& operator=(File&& other) noexcept;
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    /// Closes; collective for a created file (so let all ranks leave together). Errors are lost: call close() to hear of them.
    ~File();

    /// Flushes and closes; collective for a created file. @throws Error io on every rank when any rank's close failed.
    void close();

    const std::string& path() const noexcept;

    // --- what is in it (not collective for an open()ed file, collective for a created one)
    bool exists(const std::string& path) const;     ///< a group or dataset
    bool is_group(const std::string& path) const;
    std::vector<std::string> children(const std::string& group) const; ///< names, sorted
    std::vector<std::string> datasets(const std::string& group = "/") const; ///< full paths of all below, sorted
    DatasetInfo info(const std::string& dataset) const; ///< @throws Error bad_data: missing, or of another type
    /// Where the elements of a contiguous dataset lie in the file, as (first byte, bytes); 0 bytes when it has none there.
    std::pair<std::int64_t, std::int64_t> extent(const std::string& dataset) const;

    // --- reading. The stored type must be exactly T (@throws Error bad_data names path, found and expected type).
    /// All elements in C order.
    template<typename T>
    std::vector<T> read(const std::string& dataset) const
    {
        const DatasetInfo found = info(dataset);
        return read_rows<T>(dataset, 0, found.rows());
    }
    /// Rows [first, first + count) of the first dimension, all trailing dimensions. @throws Error bad_data outside the range.
    template<typename T>
    std::vector<T> read_rows(const std::string& dataset, std::int64_t first, std::int64_t count) const
    {
        const DatasetInfo found = info(dataset);
        SELM_VALIDATE(first >= 0 && count >= 0 && first <= found.rows() && count <= found.rows() - first, ExitCode::bad_data,
                      this->path() << ": rows " << first << " to " << first + count << " of " << dataset << " do not exist (it has "
                                   << found.rows() << "). The file is damaged; make it anew");
        std::vector<T> values(static_cast<std::size_t>(count * found.row_elements()));
        read_into(dataset, element_type<T>(), first, count, values.data());
        return values;
    }
    /// Bytes [first, first + count) of a one-dimensional uint8 dataset as text.
    std::string read_text(const std::string& dataset, std::int64_t first, std::int64_t count) const;
    /// As read_rows, into memory of the caller (count rows of @p type).
    void read_into(const std::string& dataset, ElementType type, std::int64_t first, std::int64_t count, void* values) const;

    // --- attributes; @p object is a group or dataset ("/" for the file)
    std::optional<AttributeValue> attribute(const std::string& object, const std::string& name) const;
    std::string string_attribute(const std::string& object, const std::string& name) const;  ///< @throws Error bad_data: none, other type
    std::int64_t int_attribute(const std::string& object, const std::string& name) const;    ///< @throws Error bad_data
    double double_attribute(const std::string& object, const std::string& name) const;       ///< @throws Error bad_data
    Attributes attributes(const std::string& object) const;

    // --- writing (created files). All collective; every rank passes the same path, shape and attribute.
    void set_attribute(const std::string& object, const std::string& name, const AttributeValue& value); ///< creates or replaces
    void set_attributes(const std::string& object, const Attributes& values);
    void create_group(const std::string& path); ///< with its parents; an existing group is fine

    /// Creates a contiguous dataset (parents too); nothing is written to it.
    void create_dataset(const std::string& path, ElementType type, const std::vector<std::int64_t>& shape);
    /// Writes rows [first_row, first_row + n) of an existing dataset; ranks may pass nothing and take part all the same.
    /// Transfers are split so that no rank moves more than 256 MiB at a time.
    template<typename T>
    void write_slab(const std::string& path, std::int64_t first_row, std::span<const T> values)
    {
        write_from(path, element_type<T>(), first_row, static_cast<std::int64_t>(values.size()), values.data());
    }
    /**
     * @brief Creates a dataset [N, row_shape...] of the ranks' blocks in rank order: N = sum over ranks of
     * mine.size() / product(row_shape).
     */
    template<typename T>
    void write_blocks(const std::string& path, std::span<const T> mine, const std::vector<std::int64_t>& row_shape = {})
    {
        write_blocks_from(path, element_type<T>(), static_cast<std::int64_t>(mine.size()), mine.data(), row_shape);
    }
    template<typename T>
    void write_blocks(const std::string& path, const std::vector<T>& mine, const std::vector<std::int64_t>& row_shape = {})
    {
        write_blocks(path, std::span<const T>(mine), row_shape);
    }
    /// Offsets of ragged rows: int64 [N + 1], the exclusive scan over ranks and rows of @p lengths, then the total.
    void write_offsets(const std::string& path, std::span<const std::int64_t> lengths);
    /// Texts in rank order: @p path (uint8) and @p path + "_offsets" (int64 [N + 1]).
    void write_texts(const std::string& path, std::span<const std::string> mine);

    /**
     * @brief Copies @p path ("/" for everything) of @p source with its attributes and all below into this file: by slabs,
     * every rank its part, types preserved. Paths in @p except (and all below them) are left out.
     * @param source the same file on every rank, opened by each alone.
     */
    void copy_tree(const File& source, const std::string& path, const std::vector<std::string>& except = {});

    const TransferCount& transfers() const noexcept;

  private:
    struct State;
    explicit File(std::unique_ptr<State> state);
    void write_from(const std::string& path, ElementType type, std::int64_t first_row, std::int64_t elements, const void* values);
    void write_blocks_from(const std::string& path, ElementType type, std::int64_t elements, const void* values,
                           const std::vector<std::int64_t>& row_shape);
    std::unique_ptr<State> state_;
};

} // namespace selm::h5
