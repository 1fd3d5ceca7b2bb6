// Makes a tiny random model directory for the shell tests: selm_tiny_model_tool DIR [seed=N] [vocabulary=N] [layers=N] [classifier] [damaged]
#include <iostream>
#include <string>

#include "../../mpi/phases/tiny_model.hpp"
#include "selm/base/error.hpp"
#include "selm/model/decoder_config.hpp"

int main(int argc, char** argv)
{
    selm::test::TinyModel what;
    for (int i = 2; i < argc; ++i) {
        const std::string word = argv[i];
        if (word.starts_with("seed="))
            what.seed = std::stoull(word.substr(5));
        else if (word.starts_with("vocabulary="))
            what.vocabulary = std::stoll(word.substr(11));
        else if (word.starts_with("layers="))
            what.layers = std::stoll(word.substr(7));
        else if (word == "classifier")
            what.classifier = true;
        else if (word == "damaged")
            what.damaged = true;
        else {
            std::cerr << "unknown word " << word << '\n';
            return 64;
        }
    }
    if (argc < 2)
        return 64;
    try {
        selm::test::make_tiny_model(argv[1], what);
    } catch (const selm::Error& error) {
        std::cerr << error.what() << '\n';
        return static_cast<int>(error.code());
    }
    return 0;
}
