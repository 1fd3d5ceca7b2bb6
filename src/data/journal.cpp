#include "selm/data/journal.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <tuple>

#include <fcntl.h>
#include <unistd.h>

#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"

namespace selm {

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr std::array<char, 8> file_magic{'S', 'E', 'L', 'M', 'J', 'R', 'N', '1'};
constexpr std::uint64_t record_magic = 0x64726f6365725351ULL;
constexpr double sync_every_s = 3.0;
constexpr const char* suffix = ".journal";

struct RecordHead {
    std::uint64_t magic = record_magic;
    std::int64_t row = 0;
    std::int64_t bytes = 0;
};

std::string directory_of(const std::string& output)
{
    return output + suffix;
}

std::string file_name(std::int64_t attempt, int rank)
{
    std::array<char, 64> name{};
    std::snprintf(name.data(), name.size(), "attempt-%06lld-rank-%06d.log", static_cast<long long>(attempt), rank);
    return name.data();
}

/// Attempt number of a journal file's name; 0 for other files.
std::int64_t attempt_of(const std::string& name)
{
    long long attempt = 0;
    int rank = 0;
    int length = 0;
    if (std::sscanf(name.c_str(), "attempt-%lld-rank-%d.log%n", &attempt, &rank, &length) != 2
        || static_cast<std::size_t>(length) != name.size())
        return 0;
    return attempt;
}

std::vector<std::string> journal_files(const std::string& directory)
{
    std::vector<std::string> names;
    std::error_code error;
    for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error))
        if (attempt_of(entry->path().filename().string()) > 0)
            names.push_back(entry->path().filename().string());
    if (error && error != std::errc::no_such_file_or_directory)
        throw io_error(cat(directory, " cannot be read (", error.message(), "). Check its permissions"));
    std::sort(names.begin(), names.end());
    return names;
}

void delete_directory(const std::string& directory)
{
    std::error_code ignored;
    for (const std::string& name : journal_files(directory))
        fs::remove(fs::path(directory) / name, ignored);
    fs::remove(directory, ignored); // stays when somebody put other files there
}

std::vector<std::byte> header_bytes(const JournalBinding& binding)
{
    PayloadWriter body;
    body.value(static_cast<std::int64_t>(binding.size()));
    for (const auto& [name, value] : binding) {
        body.text(name);
        body.text(value);
    }
    PayloadWriter header;
    header.value(file_magic);
    header.array(std::span<const std::byte>(body.bytes()));
    header.value(hash64(body.bytes().data(), body.bytes().size()));
    return header.bytes();
}

std::vector<std::byte> record_bytes(std::int64_t row, std::span<const std::byte> payload)
{
    PayloadWriter out;
    out.value(RecordHead{.row = row, .bytes = static_cast<std::int64_t>(payload.size())});
    std::vector<std::byte> bytes = out.bytes();
    bytes.insert(bytes.end(), payload.begin(), payload.end());
    const std::uint64_t checksum = hash64(bytes.data(), bytes.size());
    const auto* raw = reinterpret_cast<const std::byte*>(&checksum);
    bytes.insert(bytes.end(), raw, raw + sizeof checksum);
    return bytes;
}

/// Binding of a journal file; nothing where the header is torn (the process died while it made the file).
bool take_header(std::span<const std::byte>& bytes, JournalBinding& binding)
{
    try {
        PayloadReader in(bytes);
        if (in.value<std::array<char, 8>>() != file_magic)
            return false;
        const auto body = in.array<std::byte>();
        if (in.value<std::uint64_t>() != hash64(body.data(), body.size()))
            return false;
        PayloadReader fields(body);
        const auto count = fields.value<std::int64_t>();
        for (std::int64_t i = 0; i < count; ++i) {
            std::string name = fields.text();
            binding.emplace_back(std::move(name), fields.text());
        }
        bytes = bytes.subspan(file_magic.size() + 2 * sizeof(std::int64_t) + body.size());
        return true;
    } catch (const Error&) {
        return false;
    }
}

/// The next whole record; false at the end or at a torn tail.
bool take_record(std::span<const std::byte>& bytes, Journal::Record& record)
{
    RecordHead head;
    if (bytes.size() < sizeof head)
        return false;
    std::memcpy(&head, bytes.data(), sizeof head);
    const std::size_t rest = bytes.size() - sizeof head;
    if (head.magic != record_magic || head.bytes < 0 || rest < sizeof(std::uint64_t)
        || static_cast<std::uint64_t>(head.bytes) > rest - sizeof(std::uint64_t))
        return false;
    const std::size_t size = sizeof head + static_cast<std::size_t>(head.bytes);
    std::uint64_t checksum = 0;
    std::memcpy(&checksum, bytes.data() + size, sizeof checksum);
    if (checksum != hash64(bytes.data(), size))
        return false;
    record.row = head.row;
    record.payload.assign(bytes.begin() + sizeof head, bytes.begin() + static_cast<std::ptrdiff_t>(size));
    bytes = bytes.subspan(size + sizeof checksum);
    return true;
}

void check_binding(const std::string& directory, const JournalBinding& found, const JournalBinding& expected)
{
    std::string differences;
    const std::map<std::string, std::string> there(found.begin(), found.end());
    const std::map<std::string, std::string> here(expected.begin(), expected.end());
    const auto add = [&](const std::string& text) { differences += (differences.empty() ? "" : "; ") + text; };
    for (const auto& [name, value] : here) {
        const auto other = there.find(name);
        if (other == there.end())
            add(cat("the ", name, " is not recorded there"));
        else if (other->second != value)
            add(cat("the ", name, " was ", other->second, " and is ", value, " now"));
    }
    for (const auto& [name, value] : there)
        if (!here.contains(name))
            add(cat("the ", name, " ", value, " is recorded there alone"));
    if (!differences.empty())
        throw data_error(cat(directory, " holds finished rows of another run: ", differences, " (rows of both cannot be mixed). "
                             "Run with what it was made with, or remove that directory to start anew"));
}

/// A file that may grow or vanish while it is read.
class GrowingFile {
  public:
    explicit GrowingFile(const std::string& path) : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
    ~GrowingFile()
    {
        if (descriptor_ >= 0)
            ::close(descriptor_);
    }
    GrowingFile(const GrowingFile&) = delete;
    GrowingFile& operator=(const GrowingFile&) = delete;

    /// False where it ends before the value does.
    template<typename T>
    bool read(std::int64_t at, T& value) const
    {
        return descriptor_ >= 0 && ::pread(descriptor_, &value, sizeof value, at) == static_cast<ssize_t>(sizeof value);
    }
    bool has(std::int64_t bytes) const
    {
        char last = 0;
        return bytes == 0 || read(bytes - 1, last);
    }

  private:
    int descriptor_;
};

/// Rows of a journal file's whole records, by their heads. @return false where something else stands instead of a record.
bool rows_of_file(const std::string& path, std::vector<std::int64_t>& rows)
{
    const GrowingFile file(path);
    std::array<char, 8> magic{};
    std::int64_t size = 0;
    if (!file.read(0, magic) || !file.read(sizeof magic, size))
        return true; // its maker has not come further
    if (magic != file_magic || size < 0)
        return false;
    auto at = static_cast<std::int64_t>(sizeof magic + sizeof size + sizeof(std::uint64_t)) + size;
    for (RecordHead head; file.read(at, head);) {
        if (head.magic != record_magic || head.bytes < 0)
            return false;
        at += static_cast<std::int64_t>(sizeof head + sizeof(std::uint64_t)) + head.bytes;
        if (!file.has(at))
            break;
        rows.push_back(head.row);
    }
    return true;
}

/// Where a record lies: orders duplicates.
struct Place {
    std::int64_t row, file, index;
};

} // namespace

struct Journal::State {
    std::string directory;
    JournalBinding binding;
    Communicator* comm = nullptr;
    std::int64_t attempt = 1;
    std::vector<std::int64_t> done;
    std::vector<Record> recovered;
    int descriptor = -1;
    std::int64_t size = 0; ///< bytes of whole records in the file of this rank
    std::int64_t appended = 0;
    bool dirty = false;
    Clock::time_point last_sync = Clock::now();

    ~State()
    {
        if (descriptor >= 0) {
            ::fdatasync(descriptor);
            ::close(descriptor);
        }
    }

    std::string own_path() const { return directory + "/" + file_name(attempt, comm->rank()); }

    void write_all(std::span<const std::byte> bytes)
    {
        std::size_t written = 0;
        while (written < bytes.size()) {
            const ssize_t count = ::write(descriptor, bytes.data() + written, bytes.size() - written);
            if (count < 0 && errno == EINTR)
                continue;
            if (count <= 0) {
                const std::string reason = std::strerror(errno);
                // A torn record would hide the ones that may follow it.
                [[maybe_unused]] const int status = ::ftruncate(descriptor, size);
                throw io_error(cat(own_path(), ": writing failed (", reason, "). Check the free space and the quota of its file system"));
            }
            written += static_cast<std::size_t>(count);
        }
        size += static_cast<std::int64_t>(bytes.size());
    }

    void make_file()
    {
        // Another copy of this program may have made a file of that name since this one listed them.
        while ((descriptor = ::open(own_path().c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666)) < 0 && errno == EEXIST)
            ++attempt;
        const std::string path = own_path();
        if (descriptor < 0)
            throw io_error(cat(path, " cannot be created (", std::strerror(errno), "). Check the directory and its permissions"));
        write_all(header_bytes(binding));
        sync_path(directory);
    }

    /// Reads every np-th file. Local.
    std::vector<std::pair<Place, Record>> read_files(const std::vector<std::string>& names) const
    {
        std::vector<std::pair<Place, Record>> found;
        const auto np = static_cast<std::size_t>(comm->size());
        for (auto i = static_cast<std::size_t>(comm->rank()); i < names.size(); i += np) {
            const std::string content = read_file(directory + "/" + names[i]);
            std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(content.data()), content.size());
            JournalBinding there;
            if (!take_header(bytes, there))
                continue;
            check_binding(directory, there, binding);
            Record record;
            for (std::int64_t index = 0; take_record(bytes, record); ++index)
                found.emplace_back(Place{record.row, static_cast<std::int64_t>(i), index}, std::move(record));
        }
        return found;
    }

    /// Decides for all ranks alike which record of a row counts. Collective.
    void keep_first(std::vector<std::pair<Place, Record>> found)
    {
        std::vector<Place> places;
        places.reserve(found.size());
        for (const auto& [place, record] : found)
            places.push_back(place);
        const auto all = comm->all_gather_ragged(std::as_bytes(std::span<const Place>(places)), "rows of the journal");
        std::map<std::int64_t, std::pair<std::int64_t, std::int64_t>> first;
        for (const auto& bytes : all) {
            std::vector<Place> theirs(bytes.size() / sizeof(Place));
            if (!theirs.empty())
                std::memcpy(theirs.data(), bytes.data(), bytes.size());
            for (const Place& place : theirs) {
                const std::pair key{place.file, place.index};
                const auto [entry, is_new] = first.emplace(place.row, key);
                if (!is_new)
                    entry->second = std::min(entry->second, key);
            }
        }
        for (const auto& [row, key] : first)
            done.push_back(row);
        for (auto& [place, record] : found)
            if (first.at(place.row) == std::pair{place.file, place.index})
                recovered.push_back(std::move(record));
    }
};

Journal::Journal(const std::string& output, const JournalBinding& binding, Communicator& comm) : state_(std::make_unique<State>())
{
    state_->directory = directory_of(output);
    state_->binding = binding;
    state_->comm = &comm;
    const std::string listing = root_string(comm, "listing the journal", [&] {
        std::error_code error;
        fs::create_directory(state_->directory, error);
        if (error)
            throw io_error(cat(state_->directory, " cannot be created (", error.message(), "). Check the directory and its permissions"));
        std::string joined;
        for (const std::string& name : journal_files(state_->directory))
            joined += name + "\n";
        return joined;
    });
    std::vector<std::string> names;
    for (std::size_t begin = 0; begin < listing.size();) {
        const std::size_t end = listing.find('\n', begin);
        names.push_back(listing.substr(begin, end - begin));
        begin = end + 1;
    }
    for (const std::string& name : names)
        state_->attempt = std::max(state_->attempt, attempt_of(name) + 1);
    std::vector<std::pair<Place, Record>> found;
    agree(comm, "reading the journal", [&] { found = state_->read_files(names); });
    state_->keep_first(std::move(found));
}

Journal::~Journal() = default;

const std::string& Journal::directory() const noexcept { return state_->directory; }
const std::vector<std::int64_t>& Journal::done_rows() const noexcept { return state_->done; }
const std::vector<Journal::Record>& Journal::recovered() const noexcept { return state_->recovered; }
std::vector<Journal::Record> Journal::take_recovered() { return std::move(state_->recovered); }
std::int64_t Journal::appended() const noexcept { return state_->appended; }

bool Journal::is_done(std::int64_t row) const
{
    return std::binary_search(state_->done.begin(), state_->done.end(), row);
}

void Journal::append(std::int64_t row, std::span<const std::byte> payload)
{
    State& state = *state_;
    if (state.descriptor < 0)
        state.make_file();
    state.write_all(record_bytes(row, payload));
    state.dirty = true;
    ++state.appended;
    if (std::chrono::duration<double>(Clock::now() - state.last_sync).count() > sync_every_s)
        sync();
}

void Journal::sync()
{
    State& state = *state_;
    if (state.dirty && ::fdatasync(state.descriptor) != 0)
        throw io_error(cat(state.own_path(), ": writing to disk failed (", std::strerror(errno), "). Check its file system"));
    state.dirty = false;
    state.last_sync = Clock::now();
}

void Journal::remove()
{
    if (state_->descriptor >= 0) {
        ::close(state_->descriptor);
        state_->descriptor = -1;
    }
    state_->dirty = false;
    state_->comm->barrier("end of the journal");
    if (state_->comm->is_root())
        delete_directory(state_->directory);
}

void Journal::remove_leftover(const std::string& output)
{
    delete_directory(directory_of(output));
}

bool Journal::exists(const std::string& output)
{
    return !journal_files(directory_of(output)).empty();
}

JournalSurvey Journal::survey(const std::string& output)
{
    JournalSurvey found;
    std::vector<std::int64_t> rows;
    for (const std::string& name : journal_files(directory_of(output))) {
        const std::string path = directory_of(output) + "/" + name;
        if (attempt_of(name) > found.attempt) {
            found.attempt = attempt_of(name);
            found.attempt_rows = 0;
            found.attempt_files.clear();
        }
        const std::size_t before = rows.size();
        if (!rows_of_file(path, rows))
            found.damaged.push_back(path);
        found.attempt_rows += static_cast<std::int64_t>(rows.size() - before); // sorted by name: attempts ascend
        found.attempt_files.push_back(path);
    }
    std::sort(rows.begin(), rows.end());
    found.rows = std::unique(rows.begin(), rows.end()) - rows.begin();
    return found;
}

void PayloadWriter::raw(const void* data, std::size_t size)
{
    const auto* bytes = static_cast<const std::byte*>(data);
    bytes_.insert(bytes_.end(), bytes, bytes + size);
}

void PayloadReader::check(std::int64_t count, std::size_t element_bytes) const
{
    if (count < 0 || static_cast<std::uint64_t>(count) > bytes_.size() / element_bytes)
        throw data_error(cat("a record ends early (", bytes_.size(), " bytes are left for ", count, " elements)"));
}

void PayloadReader::raw(void* data, std::size_t size)
{
    if (size > bytes_.size())
        throw data_error(cat("a record ends early (", bytes_.size(), " bytes are left, ", size, " are needed)"));
    if (size > 0)
        std::memcpy(data, bytes_.data(), size);
    bytes_ = bytes_.subspan(size);
}

} // namespace selm
