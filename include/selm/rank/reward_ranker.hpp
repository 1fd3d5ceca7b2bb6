#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "selm/model/decoder.hpp"
#include "selm/rank/ranker.hpp"
#include "selm/text/chat_format.hpp"
#include "selm/text/encoding.hpp"
#include "selm/text/tokenizer.hpp"

namespace selm {

/**
 * @brief A reward model: a decoder with score.weight [1, H] on the hidden state of the last token of prompt (with the
 * generation header), answer and end-of-turn token (cut answers: the last token that is left). The prompt is computed
 * once per row, equal answers once.
 */
struct RewardRankerParts {
    Decoder& decoder;         ///< of a sequence classifier; borrowed
    WeightStore& weights;     ///< of the same decoder: its head() is score.weight
    const Tokenizer& tokenizer; ///< borrowed
    ChatFormat format;
    EncodingLimits limits;
    std::int64_t tokens_per_microbatch = 4096;
    std::string directory;
    std::string digest;
};
/// @throws Error configuration when the decoder is no sequence classifier.
std::unique_ptr<Ranker> make_reward_ranker(RewardRankerParts parts);

} // namespace selm
