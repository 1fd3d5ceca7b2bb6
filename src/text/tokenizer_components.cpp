#include "tokenizer_components.hpp"

#include <map>
#include <utility>

namespace selm::text {
namespace {

constexpr int deepest = 8; ///< nested sequences

/// The steps of a Sequence.
template<typename Component>
std::vector<std::unique_ptr<Component>> read_steps(const Json& component, const char* key, std::string_view where,
                                                   int depth,
                                                   std::unique_ptr<Component> (*read)(const Json& step, int depth))
{
    if (depth >= deepest)
        throw config_error(cat("the entry ", where, " has sequences within more than ", deepest, " others"));
    std::vector<std::unique_ptr<Component>> steps;
    for (const Json& step : need_list(component, key, where))
        steps.push_back(read(step, depth + 1));
    return steps;
}

Replacer read_replacer(const Json& component, const std::string& where)
{
    const Json& pattern = need(component, "pattern", where);
    std::string content = need_string(component, "content", where);
    if (pattern.is_object() && pattern.contains("Regex"))
        return {Regex(need_string(pattern, "Regex", where + ".pattern")), std::move(content)};
    return {need_string(pattern, "String", where + ".pattern"), std::move(content)};
}

std::unique_ptr<Normalizer> read_normalizer(const Json& component, int depth)
{
    const std::string type = type_of(component, "normalizer");
    if (type == "Prepend")
        return std::make_unique<PrependNormalizer>(need_string(component, "prepend", "normalizer(Prepend)"));
    if (type == "Replace")
        return std::make_unique<ReplacingNormalizer>(read_replacer(component, "normalizer(Replace)"));
    if (type == "Sequence")
        return std::make_unique<SequenceNormalizer>(
            read_steps<Normalizer>(component, "normalizers", "normalizer(Sequence)", depth, read_normalizer));
    throw unsupported(cat("the normalizer ", type), "Prepend, Replace, Sequence, null");
}

std::string escape_regex(std::string_view literal)
{
    std::string out;
    for (const char c : literal) {
        if (std::string_view(R"(\^$.|?*+()[]{}-#&)").find(c) != std::string_view::npos)
            out += '\\';
        out += c;
    }
    return out;
}

std::unique_ptr<PreTokenizer> read_split(const Json& component)
{
    static const std::map<std::string, SplitBehavior> behaviors{
        {"Removed", SplitBehavior::removed},
        {"Isolated", SplitBehavior::isolated},
        {"MergedWithPrevious", SplitBehavior::merged_with_previous},
        {"MergedWithNext", SplitBehavior::merged_with_next},
        {"Contiguous", SplitBehavior::contiguous},
    };
    const Json& pattern = need(component, "pattern", "pre_tokenizer(Split)");
    std::string expression;
    if (pattern.contains("Regex"))
        expression = need_string(pattern, "Regex", "pre_tokenizer(Split).pattern");
    else
        expression = escape_regex(need_string(pattern, "String", "pre_tokenizer(Split).pattern"));
    const std::string behavior = need_string(component, "behavior", "pre_tokenizer(Split)");
    const auto found = behaviors.find(behavior);
    if (found == behaviors.end())
        throw config_error(cat("the behaviour ", behavior, " of the pre-tokenizer Split does not exist"));
    return std::make_unique<SplitPreTokenizer>(Regex(expression), found->second,
                                               flag(component, "invert", false, "pre_tokenizer(Split)"));
}

/// Older files have add_prefix_space beside it or in its place.
PrependScheme read_prepend_scheme(const Json& component, const std::string& where)
{
    static const std::map<std::string, PrependScheme> schemes{
        {"first", PrependScheme::first}, {"always", PrependScheme::always}, {"never", PrependScheme::never}};
    const std::string name =
        is_absent(component, "prepend_scheme") ? "always" : need_string(component, "prepend_scheme", where);
    const auto found = schemes.find(name);
    if (found == schemes.end())
        throw config_error(cat("the entry ", where, ".prepend_scheme is ", name, ", which does not exist"));
    if (!flag(component, "add_prefix_space", true, where) && found->second != PrependScheme::never)
        throw config_error(cat("the entry ", where, ".add_prefix_space contradicts prepend_scheme ", name));
    return found->second;
}

std::string read_replacement(const Json& component, const std::string& where)
{
    const std::string replacement = need_string(component, "replacement", where);
    if (replacement.empty())
        throw config_error(cat("the entry ", where, ".replacement is empty"));
    return replacement;
}

std::unique_ptr<PreTokenizer> read_pre_tokenizer(const Json& component, int depth)
{
    const std::string type = type_of(component, "pre_tokenizer");
    if (type == "ByteLevel")
        return std::make_unique<ByteLevelPreTokenizer>(
            flag(component, "add_prefix_space", true, "pre_tokenizer(ByteLevel)"),
            flag(component, "use_regex", true, "pre_tokenizer(ByteLevel)"));
    if (type == "Digits")
        return make_digits_pre_tokenizer(flag(component, "individual_digits", false, "pre_tokenizer(Digits)"));
    if (type == "Metaspace")
        return std::make_unique<MetaspacePreTokenizer>(read_replacement(component, "pre_tokenizer(Metaspace)"),
                                                       read_prepend_scheme(component, "pre_tokenizer(Metaspace)"),
                                                       flag(component, "split", true, "pre_tokenizer(Metaspace)"));
    if (type == "Split")
        return read_split(component);
    if (type == "Sequence")
        return std::make_unique<SequencePreTokenizer>(
            read_steps<PreTokenizer>(component, "pretokenizers", "pre_tokenizer(Sequence)", depth, read_pre_tokenizer));
    throw unsupported(cat("the pre-tokenizer ", type), "ByteLevel, Digits, Metaspace, Split, Sequence, null");
}

std::size_t read_count(const Json& component, const char* key)
{
    const Json& value = need(component, key, "decoder(Strip)");
    if (!value.is_number_unsigned())
        throw config_error(cat("the entry decoder(Strip).", key, " is not a number from 0 on"));
    return value.get<std::size_t>();
}

std::unique_ptr<TokenDecoder> read_decoder(const Json& component, int depth)
{
    const std::string type = type_of(component, "decoder");
    if (type == "ByteLevel")
        return std::make_unique<ByteLevelDecoder>();
    if (type == "ByteFallback")
        return std::make_unique<ByteFallbackDecoder>();
    if (type == "Fuse")
        return std::make_unique<FuseDecoder>();
    if (type == "Replace")
        return std::make_unique<ReplaceDecoder>(read_replacer(component, "decoder(Replace)"));
    if (type == "Strip")
        return std::make_unique<StripDecoder>(need_string(component, "content", "decoder(Strip)"),
                                              read_count(component, "start"), read_count(component, "stop"));
    if (type == "Metaspace")
        return std::make_unique<MetaspaceDecoder>(read_replacement(component, "decoder(Metaspace)"),
                                                  read_prepend_scheme(component, "decoder(Metaspace)") !=
                                                      PrependScheme::never);
    if (type == "Sequence")
        return std::make_unique<SequenceDecoder>(
            read_steps<TokenDecoder>(component, "decoders", "decoder(Sequence)", depth, read_decoder));
    throw unsupported(cat("the decoder ", type),
                      "ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Strip, Sequence, null");
}

/// The template for a single text: special tokens around $A.
TextFrame read_template(const Json& component)
{
    const std::string where = "post_processor(TemplateProcessing)";
    TextFrame frame;
    bool seen = false;
    for (const Json& piece : need_list(component, "single", where)) {
        if (piece.is_object() && piece.contains("Sequence")) {
            if (seen || need_string(piece["Sequence"], "id", where + ".Sequence") != "A")
                throw unsupported(cat("the template ", component["single"].dump(), " of the post-processor"),
                                  "special tokens around one sequence A");
            seen = true;
            continue;
        }
        const std::string name = need_string(need(piece, "SpecialToken", where), "id", where + ".SpecialToken");
        const Json& token = need(need(component, "special_tokens", where), name.c_str(), where + ".special_tokens");
        for (const Json& id : need_list(token, "ids", where + ".special_tokens"))
            (seen ? frame.after : frame.before).push_back(token_id(id, name));
    }
    if (!seen)
        throw unsupported("a template without $A in the post-processor", "special tokens around one sequence A");
    return frame;
}

/// Later processors put their tokens around those of earlier ones.
TextFrame read_post_processor(const Json& component, int depth)
{
    const std::string type = type_of(component, "post_processor");
    if (type == "ByteLevel") // it changes offsets alone
        return {};
    if (type == "TemplateProcessing")
        return read_template(component);
    if (type == "Sequence" && depth < deepest) {
        TextFrame frame;
        for (const Json& step : need_list(component, "processors", "post_processor(Sequence)")) {
            const TextFrame outer = read_post_processor(step, depth + 1);
            frame.before.insert(frame.before.begin(), outer.before.begin(), outer.before.end());
            frame.after.insert(frame.after.end(), outer.after.begin(), outer.after.end());
        }
        return frame;
    }
    throw unsupported(cat("the post-processor ", type), "ByteLevel, TemplateProcessing, Sequence");
}

} // namespace

std::unique_ptr<Normalizer> read_normalizer(const Json& component)
{
    return read_normalizer(component, 0);
}

std::unique_ptr<PreTokenizer> read_pre_tokenizer(const Json& component)
{
    return read_pre_tokenizer(component, 0);
}

std::unique_ptr<TokenDecoder> read_decoder(const Json& component)
{
    return read_decoder(component, 0);
}

TextFrame read_post_processor(const Json& component)
{
    return read_post_processor(component, 0);
}

} // namespace selm::text
