#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace selm::text {

/// Lets string keys be looked up by string_view.
struct StringHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>{}(text); }
};
template<typename Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

/// What the `model` entry of a tokenizer.json says.
struct BpeDefinition {
    StringMap<std::int32_t> vocabulary;
    std::vector<std::pair<std::string, std::string>> merges; ///< in order of their rank
    std::vector<std::int32_t> ranks;                         ///< of the merges; empty: their order. Lower goes first
    std::optional<std::string> unknown_token;
    bool fuse_unknown = false;
    bool byte_fallback = false;
    bool ignore_merges = false;
};

/// Pair of ids -> (rank, id of the merged token): open addressing, built once.
class MergeTable {
  public:
    struct Merge {
        std::int32_t rank;
        std::int32_t id;
    };
    explicit MergeTable(std::size_t merges);
    void put(std::int32_t left, std::int32_t right, Merge merge);
    const Merge* find(std::int32_t left, std::int32_t right) const
    {
        const std::uint64_t key = make_key(left, right);
        for (std::size_t slot = hash(key) & mask_;; slot = (slot + 1) & mask_) {
            if (keys_[slot] == key)
                return &merges_[slot];
            if (keys_[slot] == empty_key)
                return nullptr;
        }
    }

  private:
    static constexpr std::uint64_t empty_key = ~std::uint64_t{0}; ///< ids are not negative
    static std::uint64_t make_key(std::int32_t left, std::int32_t right)
    {
        return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
    }
    static std::size_t hash(std::uint64_t key) { return (key * 0x9E3779B97F4A7C15u) >> 20; }

    std::vector<std::uint64_t> keys_;
    std::vector<Merge> merges_;
    std::size_t mask_;
};

/// Memory that the model reuses from word to word, and the words it has seen; one per thread and model.
class BpeScratch {
  private:
    friend class Bpe;
    struct Symbol {
        std::int32_t id;
        std::int32_t previous; ///< index of the neighbour, -1 where there is none
        std::int32_t next;
        bool alive;
    };
    struct Candidate {
        std::int32_t rank;
        std::int32_t position;
        std::int32_t id;
    };
    struct Cached {
        std::uint32_t begin;
        std::uint32_t count;
    };
    std::vector<Symbol> symbols_;
    std::vector<Candidate> queue_;
    StringMap<Cached> cache_;
    std::vector<std::int32_t> cached_ids_;
};

/// Byte-pair encoding as the `tokenizers` library does it. Immutable, shared by threads.
class Bpe {
  public:
    /// @throws Error configuration when a merge makes a token that is not in the vocabulary.
    explicit Bpe(BpeDefinition definition);

    /// Appends the ids of one word. Characters without a token, without byte fallback and unknown token, are dropped.
    void encode_word(std::string_view word, std::vector<std::int32_t>& ids, BpeScratch& scratch) const;

    const StringMap<std::int32_t>& vocabulary() const { return definition_.vocabulary; }

  private:
    void encode_part(std::string_view part, std::vector<std::int32_t>& ids, BpeScratch& scratch) const;
    bool never_merges_across_spaces() const;
    void split_into_symbols(std::string_view word, BpeScratch& scratch) const;
    void merge_symbols(BpeScratch& scratch) const;
    void push_candidate(std::int32_t position, BpeScratch& scratch) const;
    std::optional<std::int32_t> character_id(std::string_view character, char32_t code_point) const;
    bool push_byte_tokens(std::string_view character, BpeScratch& scratch) const;

    BpeDefinition definition_;
    MergeTable merges_;
    bool cuts_words_; ///< a word is encoded in parts that begin at U+2581
    std::vector<std::int32_t> low_character_ids_; ///< by code point below its size; -1 where there is no token
    std::int32_t unknown_id_ = -1;
    std::vector<std::int32_t> byte_ids_; ///< of <0x00>...<0xFF>, -1 where there is none; empty without byte fallback
};

} // namespace selm::text
