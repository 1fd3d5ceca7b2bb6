#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "selm/kernels/tensor.hpp"

namespace selm {

struct SafetensorInfo {
    std::string dtype; ///< "F32", "BF16", "F16"
    std::vector<std::int64_t> shape;
    std::string file;
    std::int64_t elements() const;
};

/**
 * @brief Read-only view of a model directory's weights: model.safetensors, or shards with model.safetensors.index.json.
 * Files are memory-mapped: pages are shared by all ranks of a node. Headers are checked on opening: header length, JSON,
 * offsets in range, not overlapping and without holes, sizes = dtype x shape, index and files agree.
 * @throws Error configuration (missing model) or bad_data (malformed), naming file and tensor.
 */
class SafetensorsReader {
  public:
    explicit SafetensorsReader(const std::string& directory);
    ~SafetensorsReader();
    SafetensorsReader(SafetensorsReader&&) noexcept;
    const std::map<std::string, SafetensorInfo>& tensors() const;
    bool has(const std::string& name) const;
    /// Reads elements [begin, begin+count) of a tensor as f32 (BF16/F16 widened). @param shape expected shape, checked.
    /// @throws Error bad_data naming the tensor when missing, of another shape or dtype.
    void read_f32(const std::string& name, const std::vector<std::int64_t>& shape, std::int64_t begin, std::span<float> out) const;
    /// The tensor where it lies in the mapped file, f32 or bf16 [rows, columns] (or [1, columns]): read-only, alive with the
    /// reader. Empty where it must be converted (F16) or lies at an odd address. @throws as read_f32().
    Tensor view(const std::string& name, const std::vector<std::int64_t>& shape) const;
    /// Digest over names, dtypes, shapes and bytes of all tensors, sorted by name: equal weights give equal digests however
    /// they are sharded into files. Computed once per call (reads everything).
    std::string digest() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

/// One tensor to be written by one process (several: safetensors_writer.hpp); `read` fills f32 elements [begin, begin+out.size()) when asked, so no full copy is needed.
struct SafetensorSource {
    std::string name;
    std::vector<std::int64_t> shape;
    std::function<void(std::int64_t begin, std::span<float> out)> read;
};

/**
 * @brief Writes model.safetensors (or shards and model.safetensors.index.json over max_shard_bytes) into @p directory with
 * metadata {"format": "pt"}; dtype F32 or BF16 (round to nearest even). Files appear under their names only when whole.
 * @throws Error io.
 */
void write_safetensors(const std::string& directory, const std::vector<SafetensorSource>& tensors, DType dtype,
                       std::int64_t max_shard_bytes = 5'000'000'000);

} // namespace selm
