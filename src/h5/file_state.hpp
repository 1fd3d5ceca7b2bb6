#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "handles.hpp"
#include "selm/h5/file.hpp"

namespace selm::h5 {

/// What an open File holds, and the steps that reading and writing share.
struct File::State {
    struct OpenDataset {
        Id id;
        DatasetInfo info;
    };

    std::string path;
    Communicator* comm = nullptr; ///< created files only
    Id file;
    std::map<std::string, OpenDataset> open_datasets; ///< kept open: rows are read one by one
    TransferCount transfers;
    std::int64_t largest_size = 0; ///< an upper bound of the file's bytes (parallel HDF5 cannot tell them)
    std::int64_t reserved = 0;     ///< bytes of the file that have their place on disk
    bool failed = false;           ///< a write failed: the file will not be used

    State() = default;
    State(const State&) = delete;
    State& operator=(const State&) = delete;
    ~State();

    bool parallel() const { return comm != nullptr && comm->size() > 1; }
    ExitCode error_code() const { return comm != nullptr ? ExitCode::io : ExitCode::bad_data; }

    [[noreturn]] void fail(const std::string& what) const;

    /// In a created file: every rank learns of any rank's failure here.
    void together(const char* label, const std::function<void()>& body);

    /**
     * Makes sure that the file can grow by @p more bytes and some metadata before HDF5 is told to: it does not survive a
     * write that fails later (it would crash at its end). Collective, and apart from what it is for: every rank stops here.
     */
    void reserve(std::int64_t more);

    /// Gives back what was reserved beyond the file's end.
    void trim(std::int64_t size) const;

    OpenDataset& dataset(const std::string& name);            ///< from open_datasets, opened when it is not there
    OpenDataset open_dataset(const std::string& name) const;
    bool link_exists(const std::string& name) const;          ///< with all its parents
    Id open_object(const std::string& name) const;            ///< a group or dataset

    void count_transfer(hid_t transfer);
    /// One collective transfer of @p count rows (possibly none on this rank). Large blocks go to the file from where they lie;
    /// small ones MPI-IO collects first, so that few ranks write large pieces.
    void write_round(const std::string& name, OpenDataset& target, std::int64_t first, std::int64_t count, const void* values);
};

} // namespace selm::h5
