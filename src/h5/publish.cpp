#include "selm/h5/publish.hpp"

#include <filesystem>

#include <unistd.h>

#include "disk_space.hpp"
#include "selm/base/attempt.hpp"
#include "selm/base/files.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"

namespace selm::h5 {

namespace {

void remove_partial(Communicator& comm, const std::string& partial)
{
    if (comm.is_root())
        ::unlink(partial.c_str());
}

/// Those of attempts that were killed, or are cut off and may not publish any more.
void remove_partials_of_others(const std::string& path)
{
    const std::filesystem::path whole(path);
    const std::filesystem::path parent = whole.parent_path().empty() ? "." : whole.parent_path();
    std::error_code ignored; // what cannot be removed does no harm
    for (const auto& entry : std::filesystem::directory_iterator(parent, ignored))
        if (entry.path().filename().string().starts_with(whole.filename().string() + ".partial-"))
            std::filesystem::remove(entry.path(), ignored);
}

} // namespace

void write_and_publish(const std::string& path, Communicator& comm, const std::function<void(File&)>& write,
                       const std::function<void(const File&)>& inspect)
{
    const std::string tag = root_string(comm, "name of a partial file", [] { return process_tag(); });
    const std::string partial = path + ".partial-" + tag;
    try {
        File file = File::create(partial, comm);
        // The ranks meet here whatever happened: an error after the last collective write of one rank reaches all.
        std::exception_ptr failure;
        try {
            write(file);
        } catch (...) {
            failure = std::current_exception();
        }
        agree(comm, "writing " + path, [&] {
            if (failure)
                std::rethrow_exception(failure);
        });
        const TransferCount transfers = file.transfers();
        if (transfers.fallbacks > 0)
            SELM_LOG(warning, path << ": " << transfers.fallbacks << " of " << transfers.fallbacks + transfers.collective
                                   << " writes were not collective (" << transfers.cause << ")");
        file.close();
    } catch (...) {
        remove_partial(comm, partial);
        throw;
    }
    agree(comm, "publishing " + path, [&] {
        if (!comm.is_root())
            return;
        try {
            start_writing_back(partial);
            const File whole = File::open(partial);
            (void)whole.datasets();
            if (inspect)
                inspect(whole);
            publish_file(partial, path);
            remove_partials_of_others(path);
        } catch (const Error& error) {
            ::unlink(partial.c_str());
            if (error.code() == ExitCode::stopped)
                throw;
            throw io_error(cat(path, " could not be completed: ", error.what()));
        }
    });
}

} // namespace selm::h5
