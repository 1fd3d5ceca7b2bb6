#include "unigram_normalizer.hpp"

#include <cstring>
#include <optional>
#include <utility>

#include <pcre2.h>

#include "selm/base/error.hpp"
#include "selm/text/utf8.hpp"

namespace selm::text {
namespace {

bool is_white_space(char32_t c)
{
    return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

class StripNormalizer final : public UnigramNormalizer {
  public:
    StripNormalizer(bool left, bool right) : left_(left), right_(right) {}
    void apply(std::string& text, MatchScratch&) const override
    {
        std::size_t first = text.size(), last = 0; // of what is not whitespace
        for (std::size_t at = 0, next = 0; at < text.size(); at = next)
            if (!is_white_space(next_code_point(text, next))) {
                first = std::min(first, at);
                last = next;
            }
        if (right_)
            text.resize(last);
        if (left_)
            text.erase(0, std::min(first, text.size()));
    }

  private:
    bool left_, right_;
};

class ReplaceNormalizer final : public UnigramNormalizer {
  public:
    ReplaceNormalizer(Regex pattern, std::string content) : pattern_(std::move(pattern)), content_(std::move(content))
    {
    }
    void apply(std::string& text, MatchScratch& scratch) const override
    {
        std::string out;
        std::size_t done = 0;
        for (std::size_t start = 0; start <= text.size();) {
            const auto match = pattern_.find(text, start, scratch);
            if (!match)
                break;
            if (match->end == match->begin) { // an empty match replaces nothing
                if (match->begin >= text.size())
                    break;
                start = match->begin;
                next_code_point(text, start);
                continue;
            }
            out.append(text, done, match->begin - done).append(content_);
            start = done = match->end;
        }
        if (done > 0)
            text = out.append(text, done);
    }

  private:
    Regex pattern_;
    std::string content_;
};

/// Finds ends of extended grapheme clusters (PCRE2's \X).
class GraphemeBreaker {
  public:
    GraphemeBreaker()
    {
        int error = 0;
        PCRE2_SIZE offset = 0;
        code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>("\\X"), 2, PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
        SELM_ENSURE(code_ != nullptr);
    }
    ~GraphemeBreaker() { pcre2_code_free(code_); }
    GraphemeBreaker(const GraphemeBreaker&) = delete;
    GraphemeBreaker& operator=(const GraphemeBreaker&) = delete;

    /// End of the cluster that begins at @p begin, which is the begin of one.
    std::size_t end_of_cluster(std::string_view text, std::size_t begin, pcre2_match_data* data) const
    {
        const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
        if (byte(begin) < 0x80 && byte(begin) != '\r' && (begin + 1 == text.size() || byte(begin + 1) < 0x80))
            return begin + 1; // nothing in ASCII but \r\n is longer than one character
        const int code = pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), begin,
                                     PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, data, nullptr);
        SELM_ENSURE(code > 0);
        return pcre2_get_ovector_pointer(data)[1];
    }

  private:
    pcre2_code* code_ = nullptr;
};

class CharsmapNormalizer final : public UnigramNormalizer {
  public:
    explicit CharsmapNormalizer(std::string_view table)
    {
        std::uint32_t bytes = 0;
        const bool has_size = table.size() >= sizeof bytes;
        if (has_size)
            std::memcpy(&bytes, table.data(), sizeof bytes);
        SELM_VALIDATE(has_size && bytes > 0 && bytes % sizeof(std::uint32_t) == 0 &&
                          bytes <= table.size() - sizeof bytes,
                      ExitCode::configuration,
                      "its table of characters is malformed (precompiled_charsmap of " << table.size() << " bytes)");
        units_.resize(bytes / sizeof(std::uint32_t));
        std::memcpy(units_.data(), table.data() + sizeof bytes, bytes);
        replacements_ = table.substr(sizeof bytes + bytes);
    }

    void apply(std::string& text, MatchScratch&) const override
    {
        const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(pcre2_match_data_create(1, nullptr),
                                                                                  pcre2_match_data_free);
        std::string out;
        out.reserve(text.size());
        for (std::size_t begin = 0, end = 0; begin < text.size(); begin = end) {
            end = graphemes_.end_of_cluster(text, begin, data.get());
            const std::string_view cluster = std::string_view(text).substr(begin, end - begin);
            if (cluster.size() < longest_cluster)
                if (const auto replacement = look_up(cluster)) {
                    out += *replacement;
                    continue;
                }
            for (std::size_t at = 0, next = 0; at < cluster.size(); at = next) {
                next_code_point(cluster, next);
                const std::string_view character = cluster.substr(at, next - at);
                out += look_up(character).value_or(character);
            }
        }
        text = std::move(out);
    }

  private:
    static constexpr std::size_t longest_cluster = 6;

    // A unit of the double array (Darts-clone): bits 0-7 label, 8 has a leaf, 9 scale of the offset, 10-30 offset; of a
    // leaf bits 0-30 are the value.
    static std::size_t offset(std::uint32_t unit)
    {
        return static_cast<std::size_t>(unit >> 10) << ((unit & (1U << 9)) >> 6);
    }
    std::uint32_t unit(std::size_t index) const
    {
        SELM_VALIDATE(index < units_.size(), ExitCode::configuration,
                      "the tokenizer's table of characters is damaged (precompiled_charsmap)");
        return units_[index];
    }

    /// The replacement of the shortest prefix of @p key that the table holds.
    std::optional<std::string_view> look_up(std::string_view key) const
    {
        std::size_t node = offset(unit(0));
        for (const char c : key) {
            const auto byte = static_cast<unsigned char>(c);
            if (byte == 0)
                break;
            node ^= byte;
            const std::uint32_t found = unit(node);
            if ((found & ((1U << 31) | 0xFF)) != byte)
                break;
            node ^= offset(found);
            if ((found >> 8 & 1) != 0) {
                const std::size_t begin = unit(node) & ((1U << 31) - 1);
                SELM_VALIDATE(begin <= replacements_.size(), ExitCode::configuration,
                              "the tokenizer's table of characters is damaged (precompiled_charsmap)");
                const std::size_t end = std::min(replacements_.find('\0', begin), replacements_.size());
                return std::string_view(replacements_).substr(begin, end - begin);
            }
        }
        return std::nullopt;
    }

    std::vector<std::uint32_t> units_;
    std::string replacements_;
    GraphemeBreaker graphemes_;
};

} // namespace

std::unique_ptr<UnigramNormalizer> make_strip_normalizer(bool left, bool right)
{
    return std::make_unique<StripNormalizer>(left, right);
}

std::unique_ptr<UnigramNormalizer> make_replace_normalizer(Regex pattern, std::string content)
{
    return std::make_unique<ReplaceNormalizer>(std::move(pattern), std::move(content));
}

std::unique_ptr<UnigramNormalizer> make_charsmap_normalizer(std::string_view table)
{
    return std::make_unique<CharsmapNormalizer>(table);
}

} // namespace selm::text
