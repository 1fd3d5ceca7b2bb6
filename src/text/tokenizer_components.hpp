#pragma once

#include <memory>

#include "pre_tokenizer.hpp"
#include "token_decoder.hpp"
#include "tokenizer_json.hpp"
#include "tokenizer_normalizer.hpp"
#include "tokenizer_reader.hpp"

/// The components of a tokenizer.json. @throws Error configuration naming what is missing, wrong or not supported.
namespace selm::text {

std::unique_ptr<Normalizer> read_normalizer(const Json& component);
std::unique_ptr<PreTokenizer> read_pre_tokenizer(const Json& component);
std::unique_ptr<TokenDecoder> read_decoder(const Json& component);
TextFrame read_post_processor(const Json& component);

} // namespace selm::text
