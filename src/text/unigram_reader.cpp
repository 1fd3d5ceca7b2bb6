#include "unigram_reader.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/text/utf8.hpp"

namespace selm::text {
namespace {

using Json = nlohmann::json;

constexpr std::string_view space_mark = "\u2581";
constexpr std::string_view mask_token = "[MASK]";
constexpr std::int64_t most_ids = 1 << 24; ///< guards memory against an absurd id

Error unsupported(std::string_view what, std::string_view supported)
{
    return config_error(
        cat(what, " is not supported (the ids would differ from Hugging Face's). Supported: ", supported));
}

const Json& need(const Json& object, const char* key, std::string_view where)
{
    const auto found = object.find(key);
    if (!object.is_object() || found == object.end())
        throw config_error(cat("the entry ", where, key, " is missing"));
    return *found;
}

std::string need_string(const Json& object, const char* key, std::string_view where)
{
    const Json& value = need(object, key, where);
    if (!value.is_string())
        throw config_error(cat("the entry ", where, key, " is not a string"));
    return value.get<std::string>();
}

bool flag(const Json& object, const char* key, bool missing)
{
    const auto found = object.find(key);
    if (found == object.end() || found->is_null())
        return missing;
    if (!found->is_boolean())
        throw config_error(cat("the entry ", key, " is neither true nor false"));
    return found->get<bool>();
}

std::int32_t token_id(const Json& value, std::string_view token)
{
    if (!value.is_number_integer() || value.get<std::int64_t>() < 0 || value.get<std::int64_t>() >= most_ids)
        throw config_error(cat("the id of the token \"", token, "\" is not a number from 0 to ", most_ids - 1));
    return static_cast<std::int32_t>(value.get<std::int64_t>());
}

std::string decode_base64(const std::string& text)
{
    constexpr std::string_view alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::array<int, 256> values;
    values.fill(-1);
    for (std::size_t i = 0; i < alphabet.size(); ++i)
        values[static_cast<unsigned char>(alphabet[i])] = static_cast<int>(i);
    std::string bytes;
    unsigned bits = 0;
    int count = 0;
    for (const char c : text) {
        if (c == '=')
            break;
        const int value = values[static_cast<unsigned char>(c)];
        if (value < 0)
            throw config_error("the entry precompiled_charsmap is not base64");
        bits = bits << 6 | static_cast<unsigned>(value);
        count += 6;
        if (count >= 8) {
            count -= 8;
            bytes.push_back(static_cast<char>(bits >> count & 0xFF));
        }
    }
    return bytes;
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

void read_normalizer(const Json& component, int depth, std::vector<std::unique_ptr<UnigramNormalizer>>& out)
{
    const std::string type = need_string(component, "type", "normalizer.");
    if (type == "Sequence" && depth < 8) {
        for (const Json& step : need(component, "normalizers", "normalizer."))
            read_normalizer(step, depth + 1, out);
    } else if (type == "Strip") {
        out.push_back(make_strip_normalizer(flag(component, "strip_left", true), flag(component, "strip_right", true)));
    } else if (type == "Precompiled") {
        const Json& table = need(component, "precompiled_charsmap", "normalizer.");
        if (table.is_string()) // null: no table
            out.push_back(make_charsmap_normalizer(decode_base64(table.get<std::string>())));
    } else if (type == "Replace") {
        const Json& pattern = need(component, "pattern", "normalizer.");
        const bool regex = pattern.is_object() && pattern.contains("Regex");
        const std::string text = need_string(pattern, regex ? "Regex" : "String", "normalizer.pattern.");
        out.push_back(make_replace_normalizer(Regex(regex ? text : escape_regex(text)),
                                              need_string(component, "content", "normalizer.")));
    } else {
        throw unsupported(cat("the normalizer ", type), "Strip, Precompiled, Replace and Sequence of these");
    }
}

void read_pre_tokenizer(const Json& component, int depth, UnigramParts& parts)
{
    const std::string type = need_string(component, "type", "pre_tokenizer.");
    if (type == "Sequence" && depth < 8 && need(component, "pretokenizers", "pre_tokenizer.").size() == 1)
        return read_pre_tokenizer(component["pretokenizers"][0], depth + 1, parts);
    if (type != "Metaspace")
        throw unsupported(cat("the pre-tokenizer ", type), "Metaspace alone");
    if (need_string(component, "replacement", "pre_tokenizer.") != space_mark)
        throw unsupported("a Metaspace replacement other than U+2581", "U+2581");
    const bool prefix = flag(component, "add_prefix_space", true);
    const std::string scheme = component.contains("prepend_scheme")
                                   ? need_string(component, "prepend_scheme", "pre_tokenizer.")
                                   : (prefix ? "always" : "never");
    if (scheme != "always" && scheme != "never")
        throw unsupported(cat("the Metaspace prepend_scheme \"", scheme, "\""), "always, never");
    parts.prefix_space = scheme == "always";
    parts.split_at_spaces = flag(component, "split", true);
}

std::vector<AddedToken> read_added_tokens(const Json& root)
{
    std::vector<AddedToken> tokens;
    const auto list = root.find("added_tokens");
    if (list == root.end() || list->is_null())
        return tokens;
    if (!list->is_array())
        throw config_error("the entry added_tokens is not a list");
    for (const Json& entry : *list) {
        AddedToken token;
        token.content = need_string(entry, "content", "added_tokens[].");
        token.id = token_id(need(entry, "id", "added_tokens[]."), token.content);
        token.special = flag(entry, "special", false);
        token.single_word = flag(entry, "single_word", false);
        token.lstrip = flag(entry, "lstrip", false);
        token.rstrip = flag(entry, "rstrip", false);
        token.normalized = flag(entry, "normalized", !token.special);
        if (!token.content.empty())
            tokens.push_back(std::move(token));
    }
    return tokens;
}

std::unique_ptr<UnigramModel> make_model(std::vector<UnigramPiece> pieces, std::int64_t unknown)
{
    SELM_VALIDATE(!pieces.empty() && unknown >= 0 && unknown < static_cast<std::int64_t>(pieces.size()),
                  ExitCode::configuration,
                  "its unknown token (" << unknown << ") is none of its " << pieces.size() << " pieces");
    for (const UnigramPiece& piece : pieces)
        SELM_VALIDATE(!piece.text.empty() && !find_invalid_utf8(piece.text) && std::isfinite(piece.score),
                      ExitCode::configuration, "it holds a piece that is empty, no UTF-8 or has no finite score");
    return std::make_unique<UnigramModel>(std::move(pieces), static_cast<std::int32_t>(unknown));
}

std::unique_ptr<UnigramModel> read_model(const Json& root)
{
    const Json& model = need(root, "model", "");
    const std::string type = model.contains("type") ? need_string(model, "type", "model.") : "without a type";
    if (type != "Unigram")
        throw unsupported(cat("the model ", type), "Unigram");
    if (flag(model, "byte_fallback", false))
        throw unsupported("model.byte_fallback", "false");
    std::vector<UnigramPiece> pieces;
    for (const Json& entry : need(model, "vocab", "model.")) {
        if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_number())
            throw config_error(cat("entry ", pieces.size(), " of model.vocab is not a pair of piece and score"));
        pieces.push_back({entry[0].get<std::string>(), entry[1].get<double>()});
    }
    const Json& unknown = need(model, "unk_id", "model.");
    if (!unknown.is_number_integer())
        throw config_error("the entry model.unk_id is not a whole number");
    return make_model(std::move(pieces), unknown.get<std::int64_t>());
}

/// Walks the fields of a protocol buffer message (the wire format of protobuf.dev/programming-guides/encoding).
class ProtobufFields {
  public:
    explicit ProtobufFields(std::string_view bytes) : rest_(bytes) {}

    std::uint32_t number = 0;
    std::uint64_t value = 0;  ///< of a number (floats: their bits)
    std::string_view content; ///< of a text, bytes or message

    bool next()
    {
        if (rest_.empty())
            return false;
        const std::uint64_t key = varint();
        number = static_cast<std::uint32_t>(key >> 3);
        content = {};
        switch (key & 7) {
        case 0:
            value = varint();
            break;
        case 1:
            value = fixed(8);
            break;
        case 2:
            content = take(varint());
            break;
        case 5:
            value = fixed(4);
            break;
        default:
            throw malformed();
        }
        return true;
    }
    float number_as_float() const
    {
        const auto bits = static_cast<std::uint32_t>(value);
        float result;
        std::memcpy(&result, &bits, sizeof result);
        return result;
    }

  private:
    static Error malformed() { return config_error("it is no SentencePiece model (its bytes are no protocol buffer)"); }
    std::string_view take(std::uint64_t bytes)
    {
        if (bytes > rest_.size())
            throw malformed();
        const std::string_view taken = rest_.substr(0, bytes);
        rest_.remove_prefix(bytes);
        return taken;
    }
    std::uint64_t varint()
    {
        std::uint64_t result = 0;
        for (unsigned shift = 0; shift < 64; shift += 7) {
            const auto byte = static_cast<unsigned char>(take(1)[0]);
            result |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
            if (byte < 0x80)
                return result;
        }
        throw malformed();
    }
    std::uint64_t fixed(std::size_t bytes)
    {
        std::uint64_t result = 0;
        std::memcpy(&result, take(bytes).data(), bytes); // little-endian, as this program's platforms are
        return result;
    }

    std::string_view rest_;
};

/// sentencepiece_model.proto: the fields that decide ids.
struct SentencePieceModel {
    enum PieceType : std::uint64_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };
    std::vector<UnigramPiece> pieces;
    std::vector<AddedToken> added;
    std::uint64_t kind = 1; ///< TrainerSpec.model_type; 1 unigram
    std::uint64_t unknown_id = 0;
    std::string_view charsmap;

    explicit SentencePieceModel(std::string_view bytes)
    {
        for (ProtobufFields fields(bytes); fields.next();) {
            if (fields.number == 1)
                add_piece(fields.content);
            else if (fields.number == 2)
                read_trainer(fields.content);
            else if (fields.number == 3)
                read_normalizer_spec(fields.content);
        }
    }

  private:
    void add_piece(std::string_view message)
    {
        UnigramPiece piece;
        std::uint64_t type = normal;
        for (ProtobufFields fields(message); fields.next();) {
            if (fields.number == 1)
                piece.text = fields.content;
            else if (fields.number == 2)
                piece.score = static_cast<double>(fields.number_as_float());
            else if (fields.number == 3)
                type = fields.value;
        }
        if (type == control || type == user_defined)
            added.push_back(
                {.id = static_cast<std::int32_t>(pieces.size()), .content = piece.text, .special = type == control});
        pieces.push_back(std::move(piece));
    }
    void read_trainer(std::string_view message)
    {
        for (ProtobufFields fields(message); fields.next();) {
            if (fields.number == 3)
                kind = fields.value;
            else if (fields.number == 40)
                unknown_id = fields.value;
        }
    }
    void read_normalizer_spec(std::string_view message)
    {
        for (ProtobufFields fields(message); fields.next();)
            if (fields.number == 2)
                charsmap = fields.content;
    }
};

Json parse(std::string_view json)
{
    Json root = Json::parse(json, nullptr, false);
    if (!root.is_object())
        throw config_error("it is not a JSON object");
    return root;
}

} // namespace

UnigramParts read_unigram_json(std::string_view json)
{
    const Json root = parse(json);
    UnigramParts parts;
    parts.model = read_model(root);
    parts.added_tokens = read_added_tokens(root);
    if (const auto normalizer = root.find("normalizer"); normalizer != root.end() && !normalizer->is_null())
        read_normalizer(*normalizer, 0, parts.normalizers);
    read_pre_tokenizer(need(root, "pre_tokenizer", ""), 0, parts);
    return parts;
}

UnigramParts read_sentencepiece_model(std::string_view model, std::string_view added_tokens)
{
    SentencePieceModel proto(model);
    if (proto.kind != 1)
        throw unsupported(cat("a SentencePiece model of type ", proto.kind), "1 (unigram)");
    UnigramParts parts;
    parts.normalizers.push_back(make_strip_normalizer(true, true));
    if (!proto.charsmap.empty())
        parts.normalizers.push_back(make_charsmap_normalizer(proto.charsmap));
    parts.normalizers.push_back(make_replace_normalizer(Regex(" {2,}"), " "));
    parts.added_tokens = std::move(proto.added);
    // The unknown token is one of the tokenizer's special tokens, though the model does not call it a control piece.
    if (proto.unknown_id < proto.pieces.size())
        parts.added_tokens.push_back({.id = static_cast<std::int32_t>(proto.unknown_id),
                                      .content = proto.pieces[proto.unknown_id].text,
                                      .special = true});
    parts.model = make_model(std::move(proto.pieces), static_cast<std::int64_t>(proto.unknown_id));
    if (!added_tokens.empty())
        for (AddedToken& token : read_added_tokens_json(added_tokens))
            parts.added_tokens.push_back(std::move(token));
    // DeBERTa's mask token is no piece: transformers appends it when no file names it.
    const bool has_mask = parts.model->find(mask_token) ||
                          std::any_of(parts.added_tokens.begin(), parts.added_tokens.end(),
                                      [](const AddedToken& token) { return token.content == mask_token; });
    if (!has_mask && added_tokens.empty())
        parts.added_tokens.push_back({.id = static_cast<std::int32_t>(parts.model->size()),
                                      .content = std::string(mask_token),
                                      .special = true});
    return parts;
}

std::vector<AddedToken> read_added_tokens_json(std::string_view json)
{
    std::vector<AddedToken> tokens;
    const Json entries = parse(json);
    for (const auto& [content, id] : entries.items())
        if (!content.empty())
            tokens.push_back({.id = token_id(id, content), .content = content});
    std::sort(tokens.begin(), tokens.end(), [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
    return tokens;
}

} // namespace selm::text
