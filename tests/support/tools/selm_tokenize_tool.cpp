// Tokenizer, chat formats and encodings for reference tests: one JSON request a line on stdin, one JSON answer a line
// on stdout. usage: selm_tokenize_tool MODEL_DIR
//   {"op": "encode", "text": T, "special": true|false}   -> {"ids": [...]}      "hex" instead of "text": any bytes
//   {"op": "encode", "text": T, "added": true}           -> {"ids": [...]} with what the tokenizer adds to a text
//   {"op": "decode", "ids": [...], "skip_special": B}     -> {"text": T}
//   {"op": "render", "messages": [...], "header": B, "format": NAME (default: recognised)} -> {"text": T}
//   {"op": "row", "messages": [...], "responses": [T|null, T|null, T|null], "max_length": N, "max_prompt_length": N}
//                                                          -> {"prompt": [...], "responses": [[...]|null, ...]}
//   {"op": "recipe_prompt", "messages": [...], "format": NAME} -> {"ids": [...]}   what the recipe generates from
//   {"op": "info"}  -> {"vocabulary_size": N, "format": NAME, "special": [ids], "bos": ID|null, "eos": ID|null}
//   {"op": "strip", "text": T}                             -> {"text": T}

#include <iostream>

#include <nlohmann/json.hpp>

#include "json_tool.hpp"
#include "selm/base/error.hpp"
#include "selm/text/encoding.hpp"
#include "selm/text/recipe_encoding.hpp"
#include "selm/text/utf8.hpp"

namespace {

using Json = nlohmann::json;
using selm::test::text_of;

std::vector<selm::Message> read_messages(const Json& list)
{
    std::vector<selm::Message> messages;
    for (const Json& entry : list) {
        const std::string role = entry["role"];
        const selm::Role who = role == "system"      ? selm::Role::system
                               : role == "assistant" ? selm::Role::assistant
                                                     : selm::Role::user;
        messages.push_back({who, entry["content"]});
    }
    return messages;
}

selm::SpecialText special_text(const Json& request)
{
    return request.value("special", true) ? selm::SpecialText::parse : selm::SpecialText::literal;
}

Json answer(const Json& request, const selm::Tokenizer& tokenizer, const std::string& directory)
{
    const auto format = [&] {
        return request.contains("format") ? selm::ChatFormat::by_name(request["format"].get<std::string>())
                                          : selm::ChatFormat::recognise(directory, tokenizer);
    };
    const std::string op = request["op"];
    if (op == "encode" && request.value("added", false))
        return {{"ids", tokenizer.encode_with_special_tokens(text_of(request))}};
    if (op == "encode")
        return {{"ids", tokenizer.encode(text_of(request), special_text(request))}};
    if (op == "decode")
        return {{"text", tokenizer.decode(request["ids"].get<std::vector<std::int32_t>>(),
                                          request.value("skip_special", true) ? selm::SpecialTokens::skip
                                                                              : selm::SpecialTokens::keep)}};
    if (op == "render")
        return {{"text", format().render(read_messages(request["messages"]), request["header"])}};
    if (op == "recipe_prompt")
        return {{"ids", selm::encode_prompt_recipe(tokenizer, format(), read_messages(request["messages"]))}};
    if (op == "strip")
        return {{"text", selm::strip_whitespace(text_of(request))}};
    if (op == "row") {
        std::array<std::string, selm::candidates_per_row> texts;
        std::array<std::optional<std::string_view>, selm::candidates_per_row> responses;
        for (std::size_t i = 0; i < texts.size(); ++i)
            if (!request["responses"][i].is_null())
                responses[i] = texts[i] = request["responses"][i];
        const selm::EncodedRow row =
            selm::encode_row_chat(tokenizer, format(), read_messages(request["messages"]), responses,
                                  {request["max_length"], request["max_prompt_length"]});
        Json encoded = Json::array();
        for (const auto& response : row.responses)
            encoded.push_back(response ? Json(*response) : Json());
        return {{"prompt", row.prompt}, {"responses", encoded}};
    }
    if (op == "info") {
        std::vector<std::int32_t> special;
        for (std::int32_t id = 0; id < tokenizer.vocabulary_size(); ++id)
            if (tokenizer.is_special(id))
                special.push_back(id);
        const auto id = [](std::optional<std::int32_t> value) { return value ? Json(*value) : Json(); };
        return {{"vocabulary_size", tokenizer.vocabulary_size()},
                {"format", format().name()},
                {"special", special},
                {"bos", id(tokenizer.bos_id())},
                {"eos", id(tokenizer.eos_id())}};
    }
    throw selm::usage_error("unknown op " + op);
}

} // namespace

int main(int argc, char** argv)
{
    return selm::test::tool_main(argc, argv, "selm_tokenize_tool MODEL_DIR", [](const std::string& directory) {
        const selm::Tokenizer tokenizer = selm::Tokenizer::from_directory(directory);
        selm::test::answer_lines([&](const Json& request) { return answer(request, tokenizer, directory); });
    });
}
