#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/kernels/tensor.hpp"

namespace selm {

/// Bytes of data from which on a model is cut into several files.
inline constexpr std::int64_t default_max_shard_bytes = 5'000'000'000;

struct SafetensorSpec {
    std::string name;
    std::vector<std::int64_t> shape;
};

/**
 * @brief Writes the weights of a model by pieces, in any order and from any number of processes: model.safetensors, or
 * model-NNNNN-of-NNNNN.safetensors and model.safetensors.index.json where there are more than max_shard_bytes, with the
 * metadata {"format": "pt"} that transformers asks for.
 *
 * Where every element stands follows from the constructor's arguments alone, so processes that pass the same ones write
 * the same files. One of them calls create(), then all write() and finish(), then one calls publish(); between these steps
 * the caller lets the processes meet (shard/model_writer.hpp does it with ranks). Until publish() the files are called
 * NAME.partial-ATTEMPT.
 *
 * All methods throw Error io, naming the file.
 */
class SafetensorsWriter {
  public:
    /// @param tensors in the order of the file. @param dtype of the file, f32 or bf16 (rounded to nearest even).
    /// @param attempt distinguishes writers that are at work at the same time.
    SafetensorsWriter(std::string directory, const std::vector<SafetensorSpec>& tensors, DType dtype, std::string attempt,
                      std::int64_t max_shard_bytes = default_max_shard_bytes);
    ~SafetensorsWriter(); ///< closes what is open; the files stay as they are
    SafetensorsWriter(const SafetensorsWriter&) = delete;
    SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

    std::int64_t elements() const { return elements_; }        ///< of all tensors
    std::int64_t elements_written() const { return written_; } ///< by this writer so far

    /// Makes the files with headers and in full size: a disk that is too small is heard of before anything is written.
    void create();
    /// Elements [begin, begin + values.size()) of a tensor, in C order.
    void write(std::string_view tensor, std::int64_t begin, std::span<const float> values);
    /// What this writer wrote is on the disk; closes its files.
    void finish();
    /// Gives the files their names, the index last, and removes weights of an earlier model from the directory.
    void publish();
    /// Removes the partial files, as far as they are there.
    void discard() noexcept;

  private:
    struct File {
        std::string name;
        std::string header; ///< with the length in front
        std::int64_t bytes = 0;
        int descriptor = -1;
    };
    struct Place {
        std::size_t file = 0;
        std::int64_t offset = 0; ///< in the file
        std::int64_t elements = 0;
    };

    std::string path(const File& file) const { return directory_ + "/" + file.name; }
    std::string partial(const File& file) const { return path(file) + ".partial-" + attempt_; }
    void open(File& file, int flags);
    void write_at(const File& file, std::int64_t offset, const void* data, std::size_t bytes) const;
    void reserve(const File& file) const;

    std::string directory_;
    std::string attempt_;
    DType dtype_;
    std::vector<File> files_;
    std::map<std::string, Place, std::less<>> places_;
    std::string index_; ///< empty for a single file
    std::int64_t elements_ = 0, written_ = 0;
    std::vector<std::uint16_t> rounded_;
};

} // namespace selm
