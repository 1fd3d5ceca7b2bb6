#include "tokenizer_reader.hpp"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "tokenizer_components.hpp"
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

/// An added token has the id of the vocabulary, where it is there too, or one that the vocabulary does not use.
void check_ids(const TokenizerParts& parts)
{
    const StringMap<std::int32_t>& vocabulary = parts.model->vocabulary();
    std::unordered_set<std::int32_t> used;
    for (const auto& [token, id] : vocabulary)
        used.insert(id);
    for (const AddedToken& token : parts.added_tokens) {
        const auto found = vocabulary.find(token.content);
        if (found == vocabulary.end() ? used.contains(token.id) : found->second != token.id)
            throw config_error(cat("the added token \"", token.content, "\" has the id ", token.id,
                                   ", but in the model's vocabulary ",
                                   found == vocabulary.end() ? "another token has it" : cat("it is ", found->second)));
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
            TokenizerParts parts;
            parts.added_tokens = read_added_tokens(root);
            if (!is_absent(root, "normalizer"))
                parts.normalizer = read_normalizer(root["normalizer"]);
            if (!is_absent(root, "pre_tokenizer"))
                parts.pre_tokenizer = read_pre_tokenizer(root["pre_tokenizer"]);
            parts.model = read_model(root);
            parts.decoder = is_absent(root, "decoder") ? std::make_unique<SpaceJoinDecoder>()
                                                       : read_decoder(root["decoder"]);
            if (!is_absent(root, "post_processor"))
                parts.frame = read_post_processor(root["post_processor"]);
            check_ids(parts);
            return parts;
        } catch (const Json::exception& error) {
            throw config_error(cat("cannot be read as a tokenizer (", error.what(), "). Is the file damaged?"));
        }
    });
}

void add_tokens(TokenizerParts& parts, const std::vector<AddedToken>& tokens)
{
    for (const AddedToken& token : tokens) {
        const auto same = std::find_if(parts.added_tokens.begin(), parts.added_tokens.end(),
                                       [&](const AddedToken& other) { return other.content == token.content; });
        if (same == parts.added_tokens.end())
            parts.added_tokens.push_back(token);
        else if (same->id == token.id)
            *same = token;
        else
            throw config_error(cat("the added token \"", token.content, "\" has the id ", token.id,
                                   ", but the tokenizer gives it ", same->id,
                                   " (the files do not belong together). Use a complete model directory"));
    }
    check_ids(parts);
}

} // namespace selm::text
