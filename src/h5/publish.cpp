#include "selm/h5/publish.hpp"

#include <chrono>

#include <unistd.h>

#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/base/provenance.hpp"
#include "selm/comm/agree.hpp"

namespace selm::h5 {

namespace {

std::string new_attempt_name()
{
    const auto now = std::chrono::system_clock::now().time_since_epoch().count();
    return hash_hex(cat(host_name(), ' ', ::getpid(), ' ', now)).substr(0, 12);
}

void remove_partial(Communicator& comm, const std::string& partial)
{
    if (comm.is_root())
        ::unlink(partial.c_str());
}

} // namespace

void write_and_publish(const std::string& path, Communicator& comm, const std::string& attempt,
                       const std::function<void(File&)>& write)
{
    const std::string tag =
        root_string(comm, "name of an attempt", [&] { return attempt.empty() ? new_attempt_name() : attempt; });
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
            (void)File::open(partial).datasets();
            publish_file(partial, path);
        } catch (const Error& error) {
            ::unlink(partial.c_str());
            throw io_error(cat(path, " could not be completed: ", error.what()));
        }
    });
}

} // namespace selm::h5
