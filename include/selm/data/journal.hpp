#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "selm/comm/communicator.hpp"

namespace selm {

/// What a journal belongs to, as (name in words, value) pairs: {"recipe", hash}, {"policy", digest}, {"input", digest}.
using JournalBinding = std::vector<std::pair<std::string, std::string>>;

/// What a journal holds at one moment, while others may be writing it.
struct JournalSurvey {
    std::int64_t rows = 0;                  ///< distinct rows of whole records, over all attempts
    std::int64_t attempt = 0;               ///< the newest that has a file; 0: none
    std::int64_t attempt_rows = 0;          ///< whole records of the newest attempt
    std::vector<std::string> attempt_files; ///< paths of its files
    std::vector<std::string> damaged;       ///< paths of files with other bytes where a record should begin (a torn end is no damage)
};

/**
 * @brief Finished rows of a long phase, kept in the directory "<output>.journal/" until the output is published: killing any
 * rank at any moment loses at most rows in flight, and a rerun on any number of ranks continues.
 *
 * One append-only file per (attempt, rank), made at the first row. Record: magic, row, payload length, payload, checksum. A
 * torn tail is ignored. Where a row was recorded twice the first record (by attempt, rank, place) wins.
 */
class Journal {
  public:
    struct Record {
        std::int64_t row = 0;
        std::vector<std::byte> payload;
    };

    /**
     * @brief Opens the journal of @p output and reads what earlier attempts left: rank r reads every np-th file. Collective.
     * @throws Error bad_data on every rank: a journal of another binding; says what differs and what to do. io: not readable.
     */
    Journal(const std::string& output, const JournalBinding& binding, Communicator& comm);
    ~Journal();
    Journal(const Journal&) = delete;
    Journal& operator=(const Journal&) = delete;

    const std::string& directory() const noexcept;
    /// Rows done by earlier attempts, ascending; the same on every rank.
    const std::vector<std::int64_t>& done_rows() const noexcept;
    bool is_done(std::int64_t row) const;
    /// The records that this rank read; over all ranks one per done row. Each is somewhere, not at any given rank.
    const std::vector<Record>& recovered() const noexcept;
    std::vector<Record> take_recovered();

    /// Records a finished row; synced to disk when the last sync is more than 3 s ago. Not collective. @throws Error io.
    void append(std::int64_t row, std::span<const std::byte> payload);
    /// Puts all appended rows on disk (fdatasync). Not collective. @throws Error io.
    void sync();
    std::int64_t appended() const noexcept; ///< rows appended by this rank in this attempt

    /// Deletes the journal; call it once the output is published. Collective.
    void remove();
    /// Deletes what a run left that was killed between publishing and remove(). Not collective (one rank does it).
    static void remove_leftover(const std::string& output);
    /// True when "<output>.journal" holds records of an unfinished run. Not collective.
    static bool exists(const std::string& output);
    /// Counts what is in "<output>.journal" by the heads of its records, without reading payloads; writes nothing. Not collective.
    static JournalSurvey survey(const std::string& output);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

/// Builds a payload of trivially copyable values, vectors and strings.
class PayloadWriter {
  public:
    template<typename T>
    void value(const T& item)
    {
        static_assert(std::is_trivially_copyable_v<T>);
        raw(&item, sizeof(T));
    }
    template<typename T>
    void array(std::span<const T> items)
    {
        static_assert(std::is_trivially_copyable_v<T>);
        value(static_cast<std::int64_t>(items.size()));
        raw(items.data(), items.size_bytes());
    }
    void text(const std::string& item) { array(std::span<const char>(item.data(), item.size())); }
    const std::vector<std::byte>& bytes() const noexcept { return bytes_; }

  private:
    void raw(const void* data, std::size_t size);
    std::vector<std::byte> bytes_;
};

/// Reads it back. @throws Error bad_data when the payload is too short.
class PayloadReader {
  public:
    explicit PayloadReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
    template<typename T>
    T value()
    {
        static_assert(std::is_trivially_copyable_v<T>);
        T item;
        raw(&item, sizeof(T));
        return item;
    }
    template<typename T>
    std::vector<T> array()
    {
        const std::int64_t count = value<std::int64_t>();
        check(count, sizeof(T));
        std::vector<T> items(static_cast<std::size_t>(count));
        raw(items.data(), items.size() * sizeof(T));
        return items;
    }
    std::string text()
    {
        const std::vector<char> items = array<char>();
        return {items.begin(), items.end()};
    }
    bool at_end() const noexcept { return bytes_.empty(); }

  private:
    void check(std::int64_t count, std::size_t element_bytes) const;
    void raw(void* data, std::size_t size);
    std::span<const std::byte> bytes_;
};

} // namespace selm
