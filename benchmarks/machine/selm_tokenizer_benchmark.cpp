#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "selm/base/error.hpp"
#include "selm/text/tokenizer.hpp"

// Encoding texts, one after another on one core. FILE holds the texts, each followed by a zero byte; the ids of all of them go to
// IDS (int32). One line of JSON with seconds of each repetition. Usage: selm_tokenizer_benchmark DIRECTORY FILE IDS [REPETITIONS]
namespace {

std::vector<std::string> texts_of(const std::string& path)
{
    std::ifstream file(path, std::ios::binary);
    SELM_VALIDATE(file.good(), selm::ExitCode::bad_data, path << " cannot be read");
    const std::string all{std::istreambuf_iterator<char>(file), {}};
    std::vector<std::string> texts;
    for (std::size_t begin = 0; begin < all.size();) {
        const std::size_t end = std::min(all.find('\0', begin), all.size());
        texts.push_back(all.substr(begin, end - begin));
        begin = end + 1;
    }
    return texts;
}

void run(const std::string& directory, const std::string& file, const std::string& ids_path, int repetitions)
{
    const selm::Tokenizer tokenizer = selm::Tokenizer::from_directory(directory);
    const std::vector<std::string> texts = texts_of(file);
    std::size_t bytes = 0, tokens = 0;
    std::ofstream ids_file(ids_path, std::ios::binary);
    for (const std::string& text : texts) { // also the warm-up
        const std::vector<std::int32_t> ids = tokenizer.encode(text);
        ids_file.write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(ids.size() * sizeof(std::int32_t)));
        bytes += text.size();
        tokens += ids.size();
    }
    std::cout << "{\"bytes\": " << bytes << ", \"texts\": " << texts.size() << ", \"tokens\": " << tokens << ", \"seconds\": [";
    for (int i = 0; i < repetitions; ++i) {
        std::size_t again = 0;
        const auto start = std::chrono::steady_clock::now();
        for (const std::string& text : texts)
            again += tokenizer.encode(text).size();
        std::cout << (i == 0 ? "" : ", ") << std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        SELM_VALIDATE(again == tokens, selm::ExitCode::internal, "encoding again gave " << again << " tokens, not " << tokens);
    }
    std::cout << "]}" << std::endl;
}

} // namespace

int main(int argc, char** argv)
{
    try {
        SELM_VALIDATE(argc >= 4, selm::ExitCode::usage, "usage: selm_tokenizer_benchmark DIRECTORY FILE IDS [REPETITIONS]");
        run(argv[1], argv[2], argv[3], argc > 4 ? std::max(1, std::atoi(argv[4])) : 10);
    } catch (const std::exception& error) {
        std::cerr << "selm_tokenizer_benchmark: " << error.what() << "\n";
        return 70;
    }
    return 0;
}
