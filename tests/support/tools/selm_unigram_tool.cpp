// Unigram tokenizer for reference tests: one JSON request a line on stdin, one JSON answer a line on stdout.
// usage: selm_unigram_tool MODEL_DIR
//   {"text": T}            -> {"ids": [...]}      "hex" instead of "text": any bytes
//   {"token": T}           -> {"id": N|null}
//   {"info": true}         -> {"vocabulary_size": N}

#include <iostream>

#include <nlohmann/json.hpp>

#include "json_tool.hpp"
#include "selm/text/unigram_tokenizer.hpp"

namespace {

using Json = nlohmann::json;
using selm::test::text_of;

Json answer(const Json& request, const selm::UnigramTokenizer& tokenizer)
{
    if (request.contains("token")) {
        const auto id = tokenizer.token_id(request["token"].get<std::string>());
        return {{"id", id ? Json(*id) : Json()}};
    }
    if (request.contains("info"))
        return {{"vocabulary_size", tokenizer.vocabulary_size()}};
    return {{"ids", tokenizer.encode(text_of(request))}};
}

} // namespace

int main(int argc, char** argv)
{
    return selm::test::tool_main(argc, argv, "selm_unigram_tool MODEL_DIR", [](const std::string& directory) {
        const selm::UnigramTokenizer tokenizer = selm::UnigramTokenizer::from_directory(directory);
        selm::test::answer_lines([&](const Json& request) { return answer(request, tokenizer); });
    });
}
