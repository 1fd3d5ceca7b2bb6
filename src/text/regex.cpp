#include "regex.hpp"

#include <cstdint>
#include <new>
#include <utility>

#include <pcre2.h>

#include "selm/base/error.hpp"

namespace selm::text {
namespace {

std::string pcre2_message(int code)
{
    PCRE2_UCHAR buffer[256] = {};
    pcre2_get_error_message(code, buffer, sizeof buffer);
    return reinterpret_cast<const char*>(buffer);
}

Error unsupported(std::string_view pattern, std::string_view what)
{
    return config_error(cat("the regular expression ", pattern, " contains ", what,
                            ", which is not supported (PCRE2 reads it otherwise than Hugging Face's library)"));
}

/// Oniguruma's \s is the property White_Space; PCRE2's also has U+180E.
std::string translate(std::string_view pattern)
{
    std::string out;
    bool in_class = false;
    for (std::size_t i = 0; i < pattern.size(); ++i) {
        const char c = pattern[i];
        if (c == '\\' && i + 1 < pattern.size()) {
            const char escaped = pattern[++i];
            if (escaped == 's')
                out += "\\p{White_Space}";
            else if (escaped == 'S')
                out += "\\P{White_Space}";
            else if (std::string_view("hHwWbBRXKGzZAQEcC").find(escaped) != std::string_view::npos)
                throw unsupported(pattern, std::string("\\") + escaped);
            else
                (out += c) += escaped;
            continue;
        }
        if (in_class && (c == '[' || pattern.substr(i, 2) == "&&"))
            throw unsupported(pattern, "a nested or intersected character class");
        if (!in_class && pattern.substr(i, 2) == "{,")
            throw unsupported(pattern, "{,n}");
        if (c == '[' && !in_class) {
            in_class = true;
            out += c;
            if (i + 1 < pattern.size() && pattern[i + 1] == '^')
                out += pattern[++i];
            if (i + 1 < pattern.size() && pattern[i + 1] == ']') // a first ] stands for itself
                (out += '\\') += pattern[++i];
            continue;
        }
        if (c == ']')
            in_class = false;
        out += c;
    }
    return out;
}

} // namespace

struct MatchScratch::State {
    pcre2_match_data* data = nullptr;
    ~State() { pcre2_match_data_free(data); }
};

MatchScratch::MatchScratch() : state_(std::make_unique<State>())
{
    state_->data = pcre2_match_data_create(1, nullptr); // the whole match alone is of interest
    if (state_->data == nullptr)
        throw std::bad_alloc();
}
MatchScratch::~MatchScratch() = default;
MatchScratch::MatchScratch(MatchScratch&&) noexcept = default;
MatchScratch& MatchScratch::operator=(MatchScratch&&) noexcept = default;

struct Regex::State {
    std::string pattern;
    pcre2_code* code = nullptr;
    ~State() { pcre2_code_free(code); }
};

Regex::Regex(std::string_view pattern) : state_(std::make_unique<State>())
{
    state_->pattern = pattern;
    const std::string translated = translate(pattern);
    int error = 0;
    PCRE2_SIZE offset = 0;
    // In Ruby's syntax ^ and $ always match at line ends.
    const std::uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
    state_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(), options, &error,
                                 &offset, nullptr);
    if (state_->code == nullptr)
        throw config_error(cat("the regular expression ", pattern, " cannot be used: ", pcre2_message(error)));
    pcre2_jit_compile(state_->code, PCRE2_JIT_COMPLETE); // without it PCRE2 interprets: slower, same matches
}
Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

std::optional<Match> Regex::find(std::string_view subject, std::size_t start, MatchScratch& scratch) const
{
    pcre2_match_data* data = scratch.state_->data;
    const auto* bytes = reinterpret_cast<PCRE2_SPTR>(subject.data());
    int code = pcre2_match(state_->code, bytes, subject.size(), start, PCRE2_NO_UTF_CHECK, data, nullptr);
    if (code == PCRE2_ERROR_JIT_STACKLIMIT) // the interpreter keeps its stack on the heap
        code =
            pcre2_match(state_->code, bytes, subject.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, nullptr);
    if (code == PCRE2_ERROR_NOMATCH)
        return std::nullopt;
    if (code < 0)
        throw data_error(cat("a text of ", subject.size(), " bytes could not be tokenised with the regular expression ",
                             state_->pattern, ": ", pcre2_message(code)));
    const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(data);
    return Match{offsets[0], offsets[1]};
}

} // namespace selm::text
