#include "selm/comm/agree.hpp"

#include <exception>
#include <new>
#include <optional>

namespace selm {

namespace {

std::optional<Error> error_of(const std::function<void()>& body, std::string_view label)
{
    try {
        body();
    } catch (const Error& error) {
        return error;
    } catch (const std::bad_alloc&) {
        return internal_error(cat(label, ": out of memory. Use fewer ranks on a node or fewer slots"));
    } catch (const std::exception& error) {
        return internal_error(cat(label, ": ", error.what()));
    } catch (...) {
        return internal_error(cat(label, ": unknown exception"));
    }
    return std::nullopt;
}

} // namespace

void agree(Communicator& comm, std::string_view label, const std::function<void()>& body)
{
    const std::optional<Error> own = error_of(body, label);
    const std::int64_t first_failing = all_reduce_value(
        comm, static_cast<std::int64_t>(own ? comm.rank() : comm.size()), ReduceOp::min, label);
    if (first_failing == comm.size())
        return;
    const int root = static_cast<int>(first_failing);
    int code = own ? static_cast<int>(own->code()) : 0;
    std::string message = own ? own->what() : "";
    broadcast_value(comm, code, root, label);
    broadcast_string(comm, message, root, label);
    throw Error(static_cast<ExitCode>(code), message);
}

std::string root_string(Communicator& comm, std::string_view label, const std::function<std::string()>& body)
{
    std::string value;
    agree(comm, label, [&] {
        if (comm.is_root())
            value = body();
    });
    broadcast_string(comm, value, 0, label);
    return value;
}

} // namespace selm
