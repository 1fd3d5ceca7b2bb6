#include "packed_rows.hpp"

#include <algorithm>
#include <numeric>
#include <optional>
#include <string_view>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/phases/shared_model.hpp"

namespace selm {

namespace {

ChatFormat chat_format(const std::string& directory, const std::string& name, const Tokenizer& tokenizer)
{
    return name.empty() ? ChatFormat::recognise(directory, tokenizer) : ChatFormat::by_name(name);
}

std::size_t index(Candidate candidate)
{
    return static_cast<std::size_t>(candidate);
}

constexpr std::array all_candidates{Candidate::generated, Candidate::chosen, Candidate::rejected};

} // namespace

std::int64_t PackedRow::tokens() const
{
    auto total = static_cast<std::int64_t>(trunk.size());
    for (const Branch& branch : branches)
        total += static_cast<std::int64_t>(branch.tokens.size());
    return total;
}

WantedCandidates wanted_candidates(std::int32_t best, std::int32_t worst, bool generated)
{
    WantedCandidates wanted{};
    wanted.at(static_cast<std::size_t>(best)) = true;
    wanted.at(static_cast<std::size_t>(worst)) = true;
    if (generated)
        wanted[index(Candidate::generated)] = true;
    return wanted;
}

PackedRow pack_row(std::int64_t position, EncodedRow encoded, const WantedCandidates& wanted)
{
    PackedRow row;
    row.position = position;
    row.trunk = std::move(encoded.prompt);
    for (std::size_t c = 0; c < wanted.size(); ++c) {
        if (!wanted[c])
            continue;
        SELM_EXPECT(encoded.responses[c].has_value());
        const auto same = std::find_if(row.branches.begin(), row.branches.end(),
                                       [&](const Branch& branch) { return branch.tokens == *encoded.responses[c]; });
        row.branch_of[c] = static_cast<std::int32_t>(same - row.branches.begin());
        if (same == row.branches.end())
            row.branches.push_back({std::move(*encoded.responses[c]), 0});
    }
    return row;
}

std::vector<std::size_t> microbatch_ends(std::span<const std::int64_t> costs, std::int64_t budget)
{
    std::vector<std::size_t> ends;
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < costs.size(); ++i) {
        if (sum > 0 && sum + costs[i] > budget) {
            ends.push_back(i);
            sum = 0;
        }
        sum += costs[i];
    }
    if (!costs.empty())
        ends.push_back(costs.size());
    return ends;
}

std::vector<std::vector<std::size_t>> balance_rows(std::span<const std::int64_t> costs, int ranks)
{
    SELM_EXPECT(ranks >= 1);
    std::vector<std::size_t> order(costs.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
    std::vector<std::vector<std::size_t>> rows(static_cast<std::size_t>(ranks));
    std::vector<std::int64_t> load(static_cast<std::size_t>(ranks), 0);
    for (const std::size_t row : order) {
        const auto rank = static_cast<std::size_t>(std::min_element(load.begin(), load.end()) - load.begin());
        rows[rank].push_back(row);
        load[rank] += costs[row];
    }
    for (auto& of_rank : rows)
        std::sort(of_rank.begin(), of_rank.end());
    return rows;
}

RowEncoder::RowEncoder(const std::string& directory, const EncodingOptions& options, const DecoderConfig& config)
    : tokenizer_(Tokenizer::from_directory(directory)),
      format_(chat_format(directory, options.chat_format, tokenizer_)), limits_{options.max_length,
                                                                                options.max_prompt_length},
      format_name_(format_.name())
{
    SELM_VALIDATE(options.encoding == "chat", ExitCode::configuration,
                  "--encoding " << options.encoding << " is not built in this version. Use --encoding chat");
    limits_.validate();
    check_vocabulary(directory, tokenizer_.vocabulary_size(), config.vocabulary);
    SELM_VALIDATE(limits_.max_length <= config.max_positions, ExitCode::configuration,
                  "--max-length " << limits_.max_length << " is beyond the context of " << directory << " ("
                                  << config.max_positions << " tokens). Lower it");
}

EncodedRow
RowEncoder::encode_texts(std::span<const Message> messages,
                         const std::array<std::optional<std::string_view>, candidates_per_row>& answers) const
{
    return encode_row_chat(tokenizer_, format_, messages, answers, limits_);
}

PackedRow RowEncoder::encode(const IterationReader& reader, std::int64_t position, const WantedCandidates& wanted) const
{
    std::array<std::string, candidates_per_row> texts;
    std::array<std::optional<std::string_view>, candidates_per_row> answers;
    for (const Candidate candidate : all_candidates)
        if (wanted[index(candidate)]) {
            texts[index(candidate)] = reader.answer(position, candidate);
            answers[index(candidate)] = texts[index(candidate)];
        }
    return pack_row(position, encode_texts(reader.messages(position), answers), wanted);
}

PackedRow RowEncoder::encode(const PreferenceRow& row) const
{
    return pack_row(row.row, encode_texts(row.messages, {std::nullopt, row.chosen, row.rejected}), {false, true, true});
}

std::int64_t RowEncoder::bytes(const IterationReader& reader, std::int64_t position, const WantedCandidates& wanted)
{
    std::int64_t bytes = reader.message_bytes(position);
    for (const Candidate candidate : all_candidates)
        if (wanted[index(candidate)])
            bytes += reader.answer_bytes(position, candidate);
    return bytes;
}

} // namespace selm
