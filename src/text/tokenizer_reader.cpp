#include "tokenizer_reader.hpp"

#include <map>
#include <utility>

#include "tokenizer_json.hpp"

namespace selm::text {
namespace {

std::vector<AddedToken> read_added_tokens(const Json& root)
{
    std::vector<AddedToken> tokens;
    if (is_absent(root, "added_tokens"))
        return tokens;
    const Json& list = root["added_tokens"];
    if (!list.is_array())
        throw config_error("the entry added_tokens is not a list");
    for (const Json& entry : list) {
        AddedToken token = read_added_token(entry, "added_tokens[]");
        token.id = token_id(need(entry, "id", "added_tokens[]"), token.content);
        if (!token.content.empty()) // `tokenizers` leaves these out
            tokens.push_back(std::move(token));
    }
    return tokens;
}

void check_normalizer(const Json& root)
{
    if (is_absent(root, "normalizer"))
        return;
    const Json& normalizer = root["normalizer"];
    const std::string type = type_of(normalizer, "normalizer");
    if (type == "Sequence" && need(normalizer, "normalizers", "normalizer").empty())
        return;
    throw unsupported(cat("the normalizer ", type), "null");
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

std::unique_ptr<PreTokenizer> read_pre_tokenizer(const Json& component, int depth)
{
    const std::string type = type_of(component, "pre_tokenizer");
    if (type == "ByteLevel")
        return std::make_unique<ByteLevelPreTokenizer>(
            flag(component, "add_prefix_space", true, "pre_tokenizer(ByteLevel)"),
            flag(component, "use_regex", true, "pre_tokenizer(ByteLevel)"));
    if (type == "Digits")
        return make_digits_pre_tokenizer(flag(component, "individual_digits", false, "pre_tokenizer(Digits)"));
    if (type == "Split")
        return read_split(component);
    if (type == "Sequence" && depth < 8) {
        std::vector<std::unique_ptr<PreTokenizer>> steps;
        for (const Json& step : need(component, "pretokenizers", "pre_tokenizer(Sequence)"))
            steps.push_back(read_pre_tokenizer(step, depth + 1));
        return std::make_unique<SequencePreTokenizer>(std::move(steps));
    }
    throw unsupported(cat("the pre-tokenizer ", type), "ByteLevel, Digits, Split, Sequence");
}

std::unique_ptr<TokenDecoder> read_decoder(const Json& root)
{
    if (is_absent(root, "decoder"))
        return std::make_unique<SpaceJoinDecoder>();
    const Json* component = &root["decoder"];
    std::string type = type_of(*component, "decoder");
    if (type == "Sequence" && need(*component, "decoders", "decoder").size() == 1) {
        component = &(*component)["decoders"][0];
        type = type_of(*component, "decoder");
    }
    if (type == "ByteLevel")
        return std::make_unique<ByteLevelDecoder>();
    throw unsupported(cat("the decoder ", type), "ByteLevel, null");
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
    if (type == "Sequence" && depth < 8) {
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

/// "left right" (older files) or ["left", "right"].
std::pair<std::string, std::string> read_merge(const Json& entry)
{
    if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string())
        return {entry[0].get<std::string>(), entry[1].get<std::string>()};
    if (entry.is_string()) {
        const std::string text = entry.get<std::string>();
        const std::size_t space = text.find(' ');
        if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos)
            return {text.substr(0, space), text.substr(space + 1)};
    }
    throw config_error(cat("the entry model.merges has ", entry.dump(), " where two tokens are expected"));
}

void check_model_options(const Json& model)
{
    const std::string type = is_absent(model, "type") && model.contains("merges") ? "BPE" : type_of(model, "model");
    if (type != "BPE")
        throw unsupported(cat("the model ", type), "BPE");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
        if (!is_absent(model, key) && model[key] != "")
            throw unsupported(cat("model.", key, " = ", model[key].dump()), "null");
    if (!is_absent(model, "dropout") && model["dropout"] != 0.0)
        throw unsupported(cat("model.dropout = ", model["dropout"].dump()), "null");
}

std::unique_ptr<Bpe> read_model(const Json& root)
{
    const Json& model = need(root, "model", "tokenizer");
    if (!model.is_object())
        throw config_error("the entry model is not an object");
    check_model_options(model);
    BpeDefinition definition;
    const Json& vocabulary = need(model, "vocab", "model");
    const Json& merges = need(model, "merges", "model");
    if (!vocabulary.is_object() || vocabulary.empty() || !merges.is_array())
        throw config_error("the entry model.vocab is not a table of tokens, or model.merges not a list");
    definition.vocabulary.reserve(vocabulary.size());
    for (const auto& [token, id] : vocabulary.items())
        definition.vocabulary.emplace(token, token_id(id, token));
    definition.merges.reserve(merges.size());
    for (const Json& merge : merges)
        definition.merges.push_back(read_merge(merge));
    if (!is_absent(model, "unk_token"))
        definition.unknown_token = need_string(model, "unk_token", "model");
    definition.fuse_unknown = flag(model, "fuse_unk", false, "model");
    definition.byte_fallback = flag(model, "byte_fallback", false, "model");
    definition.ignore_merges = flag(model, "ignore_merges", false, "model");
    return std::make_unique<Bpe>(std::move(definition));
}

void check_ids(const TokenizerParts& parts)
{
    for (const AddedToken& token : parts.added_tokens) {
        const auto found = parts.model->vocabulary().find(token.content);
        if (found != parts.model->vocabulary().end() && found->second != token.id)
            throw config_error(cat("the added token \"", token.content, "\" has the id ", token.id,
                                   ", but the model's vocabulary gives it ", found->second));
    }
}

} // namespace

TokenizerParts read_tokenizer_json(std::string_view json, const std::string& name)
{
    return with_context(name, [&] {
        try {
            const Json root = Json::parse(json);
            if (!root.is_object())
                throw config_error("is not a JSON object. Is it a tokenizer.json?");
            check_normalizer(root);
            TokenizerParts parts;
            parts.added_tokens = read_added_tokens(root);
            if (!is_absent(root, "pre_tokenizer"))
                parts.pre_tokenizer = read_pre_tokenizer(root["pre_tokenizer"], 0);
            parts.model = read_model(root);
            parts.decoder = read_decoder(root);
            if (!is_absent(root, "post_processor"))
                parts.frame = read_post_processor(root["post_processor"], 0);
            check_ids(parts);
            return parts;
        } catch (const Json::exception& error) {
            throw config_error(cat("cannot be read as a tokenizer (", error.what(), "). Is the file damaged?"));
        }
    });
}

} // namespace selm::text
