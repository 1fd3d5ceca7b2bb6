#include "generate_journal.hpp"

#include "selm/base/error.hpp"

namespace selm {

JournalBinding generation_binding(const std::string& recipe_hash, const std::string& policy_digest,
                                  const std::string& data_digest, const std::string& engine_key)
{
    return {{"recipe", recipe_hash}, {"policy", policy_digest}, {"prompts", data_digest}, {"engine", engine_key}};
}

std::vector<std::byte> to_payload(const SampledAnswer& answer)
{
    PayloadWriter payload;
    payload.value(std::uint8_t{answer.ended});
    payload.array(std::span<const std::int32_t>(answer.tokens));
    payload.array(std::span<const float>(answer.log_probs));
    return payload.bytes();
}

SampledAnswer from_payload(const Journal::Record& record)
{
    return with_context(cat("journal, row ", record.row), [&] {
        PayloadReader payload(record.payload);
        SampledAnswer answer;
        answer.row = record.row;
        answer.ended = payload.value<std::uint8_t>() != 0;
        answer.tokens = payload.array<std::int32_t>();
        answer.log_probs = payload.array<float>();
        return answer;
    });
}

} // namespace selm
