// Unigram tokenizer for reference tests: one JSON request a line on stdin, one JSON answer a line on stdout.
// usage: selm_unigram_tool MODEL_DIR
//   {"text": T}            -> {"ids": [...]}      "hex" instead of "text": any bytes
//   {"token": T}           -> {"id": N|null}
//   {"info": true}         -> {"vocabulary_size": N}

#include <iostream>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/text/unigram_tokenizer.hpp"

namespace {

using Json = nlohmann::json;

std::string text_of(const Json& request)
{
    if (!request.contains("hex"))
        return request["text"];
    const std::string hex = request["hex"];
    std::string bytes;
    for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
        bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
    return bytes;
}

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
    if (argc != 2) {
        std::cerr << "usage: selm_unigram_tool MODEL_DIR\n";
        return 64;
    }
    try {
        const selm::UnigramTokenizer tokenizer = selm::UnigramTokenizer::from_directory(argv[1]);
        for (std::string line; std::getline(std::cin, line);)
            std::cout << answer(Json::parse(line), tokenizer).dump() << "\n";
    } catch (const selm::Error& error) {
        std::cerr << error.what() << "\n";
        return static_cast<int>(error.code());
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 70;
    }
    return 0;
}
