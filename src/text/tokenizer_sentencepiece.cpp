#include "tokenizer_sentencepiece.hpp"

#include <algorithm>
#include <functional>
#include <map>

#include <sentencepiece_processor.h>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/text/utf8.hpp"

namespace selm::text {
namespace {

using sentencepiece::SentencePieceProcessor;

constexpr std::string_view space_sign = "\u2581";

/// What the library does not tell by its functions: entries of the model's protocol buffer (sentencepiece_model.proto).
struct ModelSpec {
    static constexpr std::uint64_t bpe = 2;
    bool has_user_defined_pieces = false;   ///< ModelProto 1 SentencePiece 3 = 4
    std::uint64_t model_type = 1;           ///< ModelProto 2 TrainerSpec 3
    bool whitespace_is_suffix = false;      ///< ModelProto 2 TrainerSpec 24
    bool byte_fallback = false;             ///< ModelProto 2 TrainerSpec 35
    std::size_t character_table_bytes = 0;  ///< ModelProto 3 NormalizerSpec 2
    bool add_dummy_prefix = true;           ///< ModelProto 3 NormalizerSpec 3
    bool remove_extra_whitespaces = true;   ///< ModelProto 3 NormalizerSpec 4
    bool escape_whitespaces = true;         ///< ModelProto 3 NormalizerSpec 5
};

std::uint64_t read_varint(std::string_view message, std::size_t& position)
{
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64 && position < message.size(); shift += 7) {
        const auto byte = static_cast<std::uint8_t>(message[position++]);
        value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
        if (byte < 0x80)
            return value;
    }
    throw config_error("is damaged (a number without end)");
}

/// Calls @p visit for each entry of a protocol buffer message, which has either a number or bytes.
void for_each_field(std::string_view message,
                    const std::function<void(std::uint64_t field, std::uint64_t number, std::string_view bytes)>& visit)
{
    for (std::size_t position = 0; position < message.size();) {
        const std::uint64_t key = read_varint(message, position);
        const std::uint64_t kind = key & 7;
        std::uint64_t number = 0;
        std::string_view bytes;
        if (kind == 0) {
            number = read_varint(message, position);
        } else {
            const std::uint64_t size = kind == 2 ? read_varint(message, position) : kind == 1 ? 8 : 4;
            if ((kind != 1 && kind != 2 && kind != 5) || size > message.size() - position)
                throw config_error("is damaged (an entry beyond the end)");
            bytes = message.substr(position, size);
            position += size;
        }
        visit(key >> 3, number, bytes);
    }
}

ModelSpec read_spec(std::string_view model)
{
    ModelSpec spec;
    for_each_field(model, [&](std::uint64_t field, std::uint64_t, std::string_view message) {
        if (field == 1)
            for_each_field(message, [&](std::uint64_t entry, std::uint64_t number, std::string_view) {
                spec.has_user_defined_pieces |= entry == 3 && number == 4;
            });
        if (field == 2)
            for_each_field(message, [&](std::uint64_t entry, std::uint64_t number, std::string_view) {
                if (entry == 3)
                    spec.model_type = number;
                else if (entry == 24)
                    spec.whitespace_is_suffix = number != 0;
                else if (entry == 35)
                    spec.byte_fallback = number != 0;
            });
        if (field == 3)
            for_each_field(message, [&](std::uint64_t entry, std::uint64_t number, std::string_view bytes) {
                if (entry == 2)
                    spec.character_table_bytes = bytes.size();
                else if (entry == 3)
                    spec.add_dummy_prefix = number != 0;
                else if (entry == 4)
                    spec.remove_extra_whitespaces = number != 0;
                else if (entry == 5)
                    spec.escape_whitespaces = number != 0;
            });
    });
    return spec;
}

Error unsupported(std::string_view what)
{
    return config_error(cat("is a SentencePiece model with ", what,
                            ", which is not supported. Save the tokenizer as tokenizer.json with transformers"));
}

void check_spec(const ModelSpec& spec)
{
    if (spec.model_type != ModelSpec::bpe)
        throw unsupported(cat("model_type ", spec.model_type, " (BPE is ", ModelSpec::bpe, ")"));
    if (spec.character_table_bytes > 0)
        throw unsupported("a normalizer that rewrites characters (precompiled_charsmap)");
    if (spec.remove_extra_whitespaces)
        throw unsupported("remove_extra_whitespaces");
    if (!spec.escape_whitespaces)
        throw unsupported("escape_whitespaces = false");
    if (spec.whitespace_is_suffix)
        throw unsupported("treat_whitespace_as_suffix");
    if (spec.has_user_defined_pieces)
        throw unsupported("user-defined pieces");
}

bool is_ordinary(const SentencePieceProcessor& processor, int id)
{
    return !processor.IsControl(id) && !processor.IsUnknown(id) && !processor.IsByte(id);
}

/// Pieces of the same score merge in the order of their places: they have the same rank.
std::map<float, std::int32_t, std::greater<>> rank_scores(const SentencePieceProcessor& processor)
{
    std::map<float, std::int32_t, std::greater<>> ranks;
    for (int id = 0; id < processor.GetPieceSize(); ++id)
        if (is_ordinary(processor, id))
            ranks.emplace(processor.GetScore(id), 0);
    std::int32_t rank = 0;
    for (auto& entry : ranks)
        entry.second = rank++;
    return ranks;
}

/// Every way to put a piece together from two others.
void add_merges(const SentencePieceProcessor& processor, BpeDefinition& definition)
{
    const std::map<float, std::int32_t, std::greater<>> ranks = rank_scores(processor);
    const auto is_piece = [&](std::string_view text) {
        const auto found = definition.vocabulary.find(text);
        return found != definition.vocabulary.end() && is_ordinary(processor, found->second);
    };
    for (int id = 0; id < processor.GetPieceSize(); ++id) {
        if (!is_ordinary(processor, id))
            continue;
        const std::string& piece = processor.IdToPiece(id);
        const std::int32_t rank = ranks.at(processor.GetScore(id));
        for (std::size_t begin = 0, end = 0; end < piece.size(); begin = end) {
            next_code_point(piece, end);
            if (!is_piece(std::string_view(piece).substr(begin, end - begin)))
                throw unsupported(cat("the piece \"", piece, "\", of which a character is no piece"));
            if (end < piece.size() && is_piece(std::string_view(piece).substr(0, end)) &&
                is_piece(std::string_view(piece).substr(end))) {
                definition.merges.emplace_back(piece.substr(0, end), piece.substr(end));
                definition.ranks.push_back(rank);
            }
        }
    }
}

BpeDefinition read_definition(const SentencePieceProcessor& processor, const ModelSpec& spec)
{
    BpeDefinition definition;
    for (int id = 0; id < processor.GetPieceSize(); ++id) {
        const std::string& piece = processor.IdToPiece(id);
        if (processor.IsUnused(id))
            throw unsupported(cat("the unused piece \"", piece, "\""));
        if (piece.empty() || find_invalid_utf8(piece) || !definition.vocabulary.emplace(piece, id).second)
            throw config_error(cat("is damaged (piece ", id, " is empty, not UTF-8 or there twice)"));
    }
    add_merges(processor, definition);
    definition.unknown_token = processor.IdToPiece(processor.unk_id());
    definition.fuse_unknown = true;
    definition.byte_fallback = spec.byte_fallback;
    return definition;
}

std::vector<AddedToken> special_tokens(const SentencePieceProcessor& processor)
{
    std::vector<AddedToken> tokens;
    for (int id = 0; id < processor.GetPieceSize(); ++id)
        if (processor.IsControl(id) || processor.IsUnknown(id))
            tokens.push_back({.id = id, .content = processor.IdToPiece(id), .special = true});
    return tokens;
}

void set_space_rules(TokenizerParts& parts, const ModelSpec& spec, bool legacy)
{
    if (!legacy) {
        const PrependScheme scheme = spec.add_dummy_prefix ? PrependScheme::first : PrependScheme::never;
        parts.pre_tokenizer = std::make_unique<MetaspacePreTokenizer>(std::string(space_sign), scheme, false);
        return;
    }
    std::vector<std::unique_ptr<Normalizer>> steps;
    if (spec.add_dummy_prefix)
        steps.push_back(std::make_unique<PrependNormalizer>(std::string(space_sign)));
    steps.push_back(std::make_unique<ReplacingNormalizer>(Replacer(" ", std::string(space_sign))));
    parts.normalizer = std::make_unique<SequenceNormalizer>(std::move(steps));
}

std::unique_ptr<TokenDecoder> make_decoder(const ModelSpec& spec)
{
    std::vector<std::unique_ptr<TokenDecoder>> steps;
    steps.push_back(std::make_unique<ReplaceDecoder>(Replacer(std::string(space_sign), " ")));
    steps.push_back(std::make_unique<ByteFallbackDecoder>());
    steps.push_back(std::make_unique<FuseDecoder>());
    if (spec.add_dummy_prefix)
        steps.push_back(std::make_unique<StripDecoder>(" ", 1, 0));
    return std::make_unique<SequenceDecoder>(std::move(steps));
}

std::optional<std::int32_t> existing(int id)
{
    return id >= 0 ? std::optional<std::int32_t>(id) : std::nullopt;
}

} // namespace

TokenizerParts read_sentencepiece_model_file(const std::string& path, bool legacy)
{
    return with_context(path, [&] {
        SentencePieceProcessor processor;
        const std::string bytes = read_file(path);
        const sentencepiece::util::Status status = processor.LoadFromSerializedProto(bytes);
        if (!status.ok())
            throw config_error(cat("cannot be read as a SentencePiece model (", status.ToString(),
                                   "). Is the file damaged, or a tiktoken file? Save the tokenizer as tokenizer.json "
                                   "with transformers"));
        const ModelSpec spec = read_spec(bytes);
        check_spec(spec);
        TokenizerParts parts;
        parts.added_tokens = special_tokens(processor);
        set_space_rules(parts, spec, legacy);
        parts.model = std::make_unique<Bpe>(read_definition(processor, spec));
        parts.decoder = make_decoder(spec);
        parts.bos = existing(processor.bos_id());
        parts.eos = existing(processor.eos_id());
        parts.frame_is_default = true;
        return parts;
    });
}

} // namespace selm::text
