#include "bpe.hpp"

#include <algorithm>
#include <bit>

#include "selm/base/error.hpp"
#include "selm/text/utf8.hpp"

namespace selm::text {
namespace {

constexpr std::size_t longest_cached_word = 256;   ///< bytes
constexpr std::size_t most_cached_words = 1 << 16; ///< then the cache stays as it is
constexpr char32_t low_characters = 0x180;         ///< covers the byte alphabet
constexpr std::string_view space_sign = "\u2581";   ///< SentencePiece's sign for a space

std::string byte_token(int byte)
{
    constexpr char digits[] = "0123456789ABCDEF";
    return std::string("<0x") + digits[byte / 16] + digits[byte % 16] + ">";
}

/// Where the next U+2581 behind another character is at or after @p position; the end where there is none.
std::size_t find_cut(std::string_view word, std::size_t position)
{
    while ((position = word.find(space_sign, position)) != std::string_view::npos) {
        if (position > 0 && !word.substr(0, position).ends_with(space_sign))
            return position;
        position += space_sign.size();
    }
    return word.size();
}

} // namespace

MergeTable::MergeTable(std::size_t merges)
    : keys_(std::bit_ceil(2 * merges + 2), empty_key), merges_(keys_.size()), mask_(keys_.size() - 1)
{
}

void MergeTable::put(std::int32_t left, std::int32_t right, Merge merge)
{
    const std::uint64_t key = make_key(left, right);
    std::size_t slot = hash(key) & mask_;
    while (keys_[slot] != empty_key && keys_[slot] != key)
        slot = (slot + 1) & mask_;
    keys_[slot] = key;
    merges_[slot] = merge; // a repeated pair has its last rank
}

Bpe::Bpe(BpeDefinition definition)
    : definition_(std::move(definition)), merges_(definition_.merges.size()),
      cuts_words_(never_merges_across_spaces()), low_character_ids_(low_characters, -1)
{
    const StringMap<std::int32_t>& vocabulary = definition_.vocabulary;
    const auto require = [&](const std::string& token) {
        const auto found = vocabulary.find(token);
        if (found == vocabulary.end())
            throw config_error(cat("a merge needs the token \"", token, "\", which the vocabulary does not have"));
        return found->second;
    };
    SELM_EXPECT(definition_.ranks.empty() || definition_.ranks.size() == definition_.merges.size());
    for (std::size_t i = 0; i < definition_.merges.size(); ++i) {
        const auto& [left, right] = definition_.merges[i];
        const std::int32_t rank = definition_.ranks.empty() ? static_cast<std::int32_t>(i) : definition_.ranks[i];
        merges_.put(require(left), require(right), {rank, require(left + right)});
    }
    definition_.merges = {};
    definition_.ranks = {};

    for (char32_t c = 0; c < low_characters; ++c) {
        std::string character;
        append_utf8(character, c);
        if (const auto found = vocabulary.find(character); found != vocabulary.end())
            low_character_ids_[c] = found->second;
    }
    if (definition_.unknown_token) {
        const auto found = vocabulary.find(*definition_.unknown_token);
        if (found == vocabulary.end())
            throw config_error(cat("the unknown token \"", *definition_.unknown_token, "\" is not in the vocabulary"));
        unknown_id_ = found->second;
    }
    if (definition_.byte_fallback) {
        byte_ids_.assign(256, -1);
        for (int byte = 0; byte < 256; ++byte)
            if (const auto found = vocabulary.find(byte_token(byte)); found != vocabulary.end())
                byte_ids_[static_cast<std::size_t>(byte)] = found->second;
    }
}

/// Whether no merge makes a token with U+2581 behind another character. Then the parts of a word that begin there merge
/// apart from each other, whatever the order, and a word's ids are those of its parts. (U+2581 itself must be a token,
/// or a run of unknown characters would go on across it; and no character may be dropped between two of them.)
bool Bpe::never_merges_across_spaces() const
{
    if (definition_.ignore_merges || !definition_.unknown_token || !definition_.vocabulary.contains(space_sign))
        return false;
    return std::all_of(definition_.merges.begin(), definition_.merges.end(), [](const auto& merge) {
        const std::string token = merge.first + merge.second;
        return find_cut(token, 0) == token.size();
    });
}

void Bpe::encode_word(std::string_view word, std::vector<std::int32_t>& ids, BpeScratch& scratch) const
{
    if (!cuts_words_)
        return encode_part(word, ids, scratch);
    for (std::size_t begin = 0; begin < word.size();) {
        const std::size_t end = find_cut(word, begin + 1);
        encode_part(word.substr(begin, end - begin), ids, scratch);
        begin = end;
    }
}

void Bpe::encode_part(std::string_view word, std::vector<std::int32_t>& ids, BpeScratch& scratch) const
{
    if (const auto cached = scratch.cache_.find(word); cached != scratch.cache_.end()) {
        const auto begin = scratch.cached_ids_.begin() + cached->second.begin;
        ids.insert(ids.end(), begin, begin + cached->second.count);
        return;
    }
    const std::size_t first = ids.size();
    if (const auto whole = definition_.ignore_merges ? definition_.vocabulary.find(word) : definition_.vocabulary.end();
        whole != definition_.vocabulary.end()) {
        ids.push_back(whole->second);
    } else {
        split_into_symbols(word, scratch);
        merge_symbols(scratch);
        for (const BpeScratch::Symbol& symbol : scratch.symbols_)
            if (symbol.alive)
                ids.push_back(symbol.id);
    }
    if (word.size() <= longest_cached_word && scratch.cache_.size() < most_cached_words) {
        scratch.cache_.emplace(word, BpeScratch::Cached{static_cast<std::uint32_t>(scratch.cached_ids_.size()),
                                                        static_cast<std::uint32_t>(ids.size() - first)});
        scratch.cached_ids_.insert(scratch.cached_ids_.end(), ids.begin() + static_cast<std::ptrdiff_t>(first),
                                   ids.end());
    }
}

std::optional<std::int32_t> Bpe::character_id(std::string_view character, char32_t code_point) const
{
    std::int32_t id = -1;
    if (code_point < low_characters)
        id = low_character_ids_[code_point];
    else if (const auto found = definition_.vocabulary.find(character); found != definition_.vocabulary.end())
        id = found->second;
    return id < 0 ? std::nullopt : std::optional(id);
}

bool Bpe::push_byte_tokens(std::string_view character, BpeScratch& scratch) const
{
    const auto id_of = [&](char byte) { return byte_ids_[static_cast<std::uint8_t>(byte)]; };
    if (byte_ids_.empty() || std::any_of(character.begin(), character.end(), [&](char b) { return id_of(b) < 0; }))
        return false;
    for (const char byte : character)
        scratch.symbols_.push_back({id_of(byte), -1, -1, true});
    return true;
}

void Bpe::split_into_symbols(std::string_view word, BpeScratch& scratch) const
{
    std::vector<BpeScratch::Symbol>& symbols = scratch.symbols_;
    symbols.clear();
    bool unknown_pending = false; // `tokenizers` adds an unknown token when the run of unknown characters ends
    for (std::size_t position = 0; position < word.size();) {
        const std::size_t begin = position;
        const char32_t code_point = next_code_point(word, position);
        const std::string_view character = word.substr(begin, position - begin);
        if (const std::optional<std::int32_t> id = character_id(character, code_point)) {
            if (unknown_pending)
                symbols.push_back({unknown_id_, -1, -1, true});
            unknown_pending = false;
            symbols.push_back({*id, -1, -1, true});
        } else if (!push_byte_tokens(character, scratch) && unknown_id_ >= 0) {
            if (unknown_pending && !definition_.fuse_unknown)
                symbols.push_back({unknown_id_, -1, -1, true});
            unknown_pending = true;
        }
    }
    if (unknown_pending)
        symbols.push_back({unknown_id_, -1, -1, true});
    const auto count = static_cast<std::int32_t>(symbols.size());
    for (std::int32_t i = 0; i < count; ++i) {
        symbols[static_cast<std::size_t>(i)].previous = i - 1;
        symbols[static_cast<std::size_t>(i)].next = i + 1 < count ? i + 1 : -1;
    }
}

void Bpe::push_candidate(std::int32_t position, BpeScratch& scratch) const
{
    const BpeScratch::Symbol& left = scratch.symbols_[static_cast<std::size_t>(position)];
    if (left.next < 0)
        return;
    if (const MergeTable::Merge* merge =
            merges_.find(left.id, scratch.symbols_[static_cast<std::size_t>(left.next)].id))
        scratch.queue_.push_back({merge->rank, position, merge->id});
}

/// Lowest rank first, leftmost among equals. A queued pair counts as long as the pair now at its place makes the same
/// token (`tokenizers` compares no more than that).
void Bpe::merge_symbols(BpeScratch& scratch) const
{
    std::vector<BpeScratch::Symbol>& symbols = scratch.symbols_;
    std::vector<BpeScratch::Candidate>& queue = scratch.queue_;
    const auto later = [](const BpeScratch::Candidate& a, const BpeScratch::Candidate& b) {
        return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
    };
    queue.clear();
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i)
        push_candidate(static_cast<std::int32_t>(i), scratch);
    std::make_heap(queue.begin(), queue.end(), later);
    const auto push = [&](std::int32_t position) {
        const std::size_t before = queue.size();
        push_candidate(position, scratch);
        if (queue.size() != before)
            std::push_heap(queue.begin(), queue.end(), later);
    };
    while (!queue.empty()) {
        std::pop_heap(queue.begin(), queue.end(), later);
        const BpeScratch::Candidate top = queue.back();
        queue.pop_back();
        BpeScratch::Symbol& left = symbols[static_cast<std::size_t>(top.position)];
        if (!left.alive || left.next < 0)
            continue;
        BpeScratch::Symbol& right = symbols[static_cast<std::size_t>(left.next)];
        const MergeTable::Merge* merge = merges_.find(left.id, right.id);
        if (merge == nullptr || merge->id != top.id)
            continue;
        left.id = top.id;
        left.next = right.next;
        right.alive = false;
        if (left.next >= 0)
            symbols[static_cast<std::size_t>(left.next)].previous = top.position;
        if (left.previous >= 0)
            push(left.previous);
        push(top.position);
    }
}

} // namespace selm::text
