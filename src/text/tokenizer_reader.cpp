#include "tokenizer_reader.hpp"

#include <algorithm>
#include <utility>
#include <vector>

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
std::pair<std::string, std::string> read_merge(Json& entry)
{
    if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string())
        return {std::move(entry[0].get_ref<std::string&>()), std::move(entry[1].get_ref<std::string&>())};
    if (entry.is_string()) {
        const auto& text = entry.get_ref<const std::string&>();
        const std::size_t space = text.find(' ');
        if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos)
            return {text.substr(0, space), text.substr(space + 1)};
    }
    throw config_error(cat("the entry model.merges has ", entry.dump(), " where two tokens are expected"));
}

/// model.vocab and model.merges, nearly all of a tokenizer.json, taken while it is parsed: the document is left with empty
/// ones. Making objects of all their entries first takes twice as long, in every process that starts.
class ModelTables {
  public:
    BpeDefinition definition;

    explicit ModelTables(std::size_t json_bytes) { definition.vocabulary.reserve(json_bytes / 32); }

    /// nlohmann's parser callback: whether @p value is kept in the document.
    bool take(int depth, Json::parse_event_t event, Json& value)
    {
        using Event = Json::parse_event_t;
        if (event == Event::key) {
            if (depth == 1) {
                in_model_ = value == "model";
                table_ = Table::none;
            }
            if (depth == 2)
                table_ = !in_model_ ? Table::none : value == "vocab" ? Table::vocabulary : value == "merges" ? Table::merges : Table::none;
            if (depth == 3 && table_ == Table::vocabulary) {
                token_ = std::move(value.get_ref<std::string&>());
                has_token_ = true;
                return false;
            }
            return true;
        }
        if (depth != entry_depth)
            return true;
        if (table_ == Table::vocabulary && has_token_) { // a list or a table in the place of an id comes with its beginning, and is no number
            has_token_ = false;
            const std::int32_t id = token_id(value, token_);
            definition.vocabulary.insert_or_assign(std::move(token_), id);
            return false;
        }
        if (table_ == Table::merges && (event == Event::value || event == Event::array_end || event == Event::object_end)) {
            definition.merges.push_back(read_merge(value));
            return false;
        }
        return true;
    }

  private:
    enum class Table { none, vocabulary, merges };
    static constexpr int entry_depth = 3;
    bool in_model_ = false;
    bool has_token_ = false;
    Table table_ = Table::none;
    std::string token_;
};

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

std::unique_ptr<Bpe> read_model(const Json& root, BpeDefinition definition)
{
    const Json& model = need(root, "model", "tokenizer");
    if (!model.is_object())
        throw config_error("the entry model is not an object");
    check_model_options(model);
    if (!need(model, "vocab", "model").is_object() || definition.vocabulary.empty() || !need(model, "merges", "model").is_array())
        throw config_error("the entry model.vocab is not a table of tokens, or model.merges not a list");
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
    std::vector<bool> used;
    const auto mark = [&](std::size_t id) {
        if (used.size() <= id)
            used.resize(id + 1);
        used[id] = true;
    };
    for (const auto& [token, id] : vocabulary)
        mark(static_cast<std::size_t>(id));
    for (const AddedToken& token : parts.added_tokens) {
        const auto found = vocabulary.find(token.content);
        const auto id = static_cast<std::size_t>(token.id);
        if (found == vocabulary.end() ? id < used.size() && used[id] : found->second != token.id)
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
            ModelTables tables(json.size());
            const Json root = Json::parse(json, [&](int depth, Json::parse_event_t event, Json& value) { return tables.take(depth, event, value); });
            if (!root.is_object())
                throw config_error("is not a JSON object. Is it a tokenizer.json?");
            TokenizerParts parts;
            parts.added_tokens = read_added_tokens(root);
            if (!is_absent(root, "normalizer"))
                parts.normalizer = read_normalizer(root["normalizer"]);
            if (!is_absent(root, "pre_tokenizer"))
                parts.pre_tokenizer = read_pre_tokenizer(root["pre_tokenizer"]);
            parts.model = read_model(root, std::move(tables.definition));
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
