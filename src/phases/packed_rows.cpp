#include "packed_rows.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <string_view>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/phases/shared_model.hpp"

namespace selm {

namespace {

ChatFormat chat_format(const std::string& directory, const std::string& name, const Tokenizer& tokenizer)
{
    return name.empty() ? ChatFormat::recognise(directory, tokenizer) : ChatFormat::by_name(name);
}

/// Rows of one rank or microbatch and what they cost.
struct Share {
    std::vector<std::size_t> rows;
    std::int64_t load = 0;
};

/// Indices by descending cost; ties keep their order.
std::vector<std::size_t> largest_first(std::span<const std::int64_t> costs)
{
    std::vector<std::size_t> order(costs.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
    return order;
}

/// To the least loaded share; ties: the first of them.
void add_to_least(std::vector<Share>& shares, std::size_t row, std::int64_t cost)
{
    Share& least = *std::min_element(shares.begin(), shares.end(),
                                     [](const Share& a, const Share& b) { return a.load < b.load; });
    least.rows.push_back(row);
    least.load += cost;
}

/// Each share's rows, ascending.
std::vector<std::vector<std::size_t>> rows_of(std::vector<Share> shares)
{
    std::vector<std::vector<std::size_t>> rows;
    for (Share& share : shares) {
        std::sort(share.rows.begin(), share.rows.end());
        rows.push_back(std::move(share.rows));
    }
    return rows;
}

/// The move of a row from one share to another, or the exchange of two, that brings their loads closest. Index of no row: -1.
struct Exchange {
    std::size_t to = 0;
    std::ptrdiff_t given = -1, taken = -1;
    std::int64_t larger_load = 0; ///< of the two afterwards
};

Exchange best_exchange(std::span<const Share> shares, std::size_t from, std::span<const std::int64_t> costs)
{
    Exchange best{.larger_load = shares[from].load};
    for (std::size_t to = 0; to < shares.size(); ++to) {
        if (shares[to].load == shares[from].load)
            continue;
        const auto count = static_cast<std::ptrdiff_t>(shares[to].rows.size());
        for (std::size_t given = 0; given < shares[from].rows.size(); ++given)
            for (std::ptrdiff_t taken = -1; taken < count; ++taken) {
                const std::int64_t moved =
                    costs[shares[from].rows[given]] -
                    (taken < 0 ? 0 : costs[shares[to].rows[static_cast<std::size_t>(taken)]]);
                const std::int64_t larger = std::max(shares[from].load - moved, shares[to].load + moved);
                if (larger < best.larger_load)
                    best = {to, static_cast<std::ptrdiff_t>(given), taken, larger};
            }
    }
    return best;
}

/// Exchanges rows of the most loaded share until its load is within a thousandth of the mean, or nothing helps.
void even_out(std::vector<Share>& shares, std::span<const std::int64_t> costs)
{
    constexpr std::int64_t most_trials = std::int64_t{1} << 24; ///< a fraction of a second
    const std::int64_t mean =
        std::accumulate(costs.begin(), costs.end(), std::int64_t{0}) / static_cast<std::int64_t>(shares.size());
    for (std::int64_t trials = 0; trials < most_trials;) {
        const auto largest = std::max_element(shares.begin(), shares.end(),
                                              [](const Share& a, const Share& b) { return a.load < b.load; });
        trials += static_cast<std::int64_t>(largest->rows.size() * (costs.size() + shares.size()));
        if (largest->load - mean <= mean / 1000)
            return;
        const Exchange exchange = best_exchange(shares, static_cast<std::size_t>(largest - shares.begin()), costs);
        if (exchange.given < 0)
            return;
        Share& other = shares[exchange.to];
        const std::size_t given = largest->rows[static_cast<std::size_t>(exchange.given)];
        largest->rows.erase(largest->rows.begin() + exchange.given);
        if (exchange.taken >= 0) {
            const std::size_t taken = other.rows[static_cast<std::size_t>(exchange.taken)];
            other.rows.erase(other.rows.begin() + exchange.taken);
            largest->rows.push_back(taken);
            largest->load += costs[taken];
            other.load -= costs[taken];
        }
        other.rows.push_back(given);
        largest->load -= costs[given];
        other.load += costs[given];
    }
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

std::int64_t PackedRow::scored_tokens() const
{
    std::int64_t total = 0;
    for (std::size_t branch = 0; branch < branches.size(); ++branch)
        total += scored_tokens(branch);
    return total;
}

std::int64_t PackedRow::attention_pairs() const
{
    const auto causal = [](std::size_t tokens) { return static_cast<std::int64_t>(tokens * (tokens + 1) / 2); };
    std::int64_t pairs = causal(trunk.size());
    for (const Branch& branch : branches)
        pairs += causal(branch.tokens.size()) + static_cast<std::int64_t>(branch.tokens.size() * trunk.size());
    return pairs;
}

std::int64_t work_of(const PackedRow& row, const DecoderConfig& config, bool with_backward)
{
    const std::int64_t token = config.layers * config.hidden *
                               (config.qkv_width() + config.heads * config.head_dim + 3 * config.intermediate);
    const std::int64_t scored_token = config.sequence_classifier ? 0 : config.vocabulary * config.hidden;
    const std::int64_t pair = config.layers * config.heads * config.head_dim;
    // Products of a pass. Those of attention, small and with exponentials between them, take half as long again.
    const std::int64_t in_layers = with_backward ? 3 : 1, in_head = with_backward ? 4 : 1,
                       in_attention = with_backward ? 7 : 2;
    return (in_layers * row.tokens() * token + in_head * row.scored_tokens() * scored_token +
            in_attention * 3 / 2 * row.attention_pairs() * pair) / 1000;
}

WantedCandidates RowPair::wanted() const
{
    WantedCandidates wanted{};
    wanted.at(static_cast<std::size_t>(best)) = true;
    wanted.at(static_cast<std::size_t>(worst)) = true;
    if (generated)
        wanted[index(Candidate::generated)] = true;
    return wanted;
}

PackedRow pack_row(std::int64_t position, const SequenceRow& sequences, const WantedCandidates& wanted)
{
    PackedRow row;
    row.position = position;
    bool first = true;
    for (const auto& sequence : sequences) {
        if (!sequence)
            continue;
        const auto end = sequence->ids.begin() + sequence->label_start;
        if (std::exchange(first, false))
            row.trunk.assign(sequence->ids.begin(), end);
        const auto common = std::mismatch(row.trunk.begin(), row.trunk.end(), sequence->ids.begin(), end).first;
        row.trunk.erase(common, row.trunk.end());
    }
    const auto common = static_cast<std::ptrdiff_t>(row.trunk.size());
    for (std::size_t c = 0; c < wanted.size(); ++c) {
        if (!wanted[c])
            continue;
        SELM_EXPECT(sequences[c].has_value());
        Branch own{{sequences[c]->ids.begin() + common, sequences[c]->ids.end()}, sequences[c]->label_start - common};
        const auto same = std::find_if(row.branches.begin(), row.branches.end(), [&](const Branch& branch) {
            return branch.unscored == own.unscored && branch.tokens == own.tokens;
        });
        row.branch_of[c] = static_cast<std::int32_t>(same - row.branches.begin());
        if (same == row.branches.end())
            row.branches.push_back(std::move(own));
    }
    return row;
}

std::vector<std::vector<std::size_t>> microbatches(std::span<const std::int64_t> costs, std::int64_t budget)
{
    const std::vector<std::size_t> order = largest_first(costs);
    std::vector<Share> groups;
    for (const std::size_t item : order) {
        auto fits = std::find_if(groups.begin(), groups.end(),
                                 [&](const Share& group) { return group.load + costs[item] <= budget; });
        if (fits == groups.end())
            fits = groups.emplace(groups.end());
        fits->rows.push_back(item);
        fits->load += costs[item];
    }
    std::vector<Share> even(groups.size());
    for (const std::size_t item : order)
        add_to_least(even, item, costs[item]);
    if (std::all_of(even.begin(), even.end(),
                    [&](const Share& group) { return group.rows.size() <= 1 || group.load <= budget; }))
        groups = std::move(even);
    std::stable_sort(groups.begin(), groups.end(), [](const Share& a, const Share& b) { return a.load > b.load; });
    return rows_of(std::move(groups));
}

std::vector<std::vector<std::size_t>> balance_rows(std::span<const std::int64_t> costs, int ranks)
{
    SELM_EXPECT(ranks >= 1);
    std::vector<Share> shares(static_cast<std::size_t>(ranks));
    for (const std::size_t row : largest_first(costs))
        add_to_least(shares, row, costs[row]);
    even_out(shares, costs);
    return rows_of(std::move(shares));
}

RowEncoder::RowEncoder(const std::string& directory, const EncodingOptions& options)
    : tokenizer_(Tokenizer::from_directory(directory)),
      format_(chat_format(directory, options.chat_format, tokenizer_)), limits_{options.max_length,
                                                                                options.max_prompt_length},
      format_name_(format_.name()), cap_(options.on_long_row == "cap"),
      context_(std::numeric_limits<std::int64_t>::max())
{
    limits_.validate();
    if (options.encoding == "recipe")
        recipe_ = recipe_ids(tokenizer_, format_, options.bos_token, options.eos_token);
}

RowEncoder::RowEncoder(const std::string& directory, const EncodingOptions& options, const DecoderConfig& config)
    : RowEncoder(directory, options)
{
    context_ = config.max_positions;
    context_text_ = config.context();
    check_vocabulary(directory, tokenizer_.vocabulary_size(), config.vocabulary);
    SELM_VALIDATE(limits_.max_length <= context_, ExitCode::configuration,
                  "--max-length " << limits_.max_length << " is beyond the context of " << directory << " ("
                                  << context_text_ << "). Lower it");
}

h5::Attributes RowEncoder::attributes() const
{
    if (!recipe_)
        return {};
    return {{"bos_id", std::int64_t{recipe_->bos.value_or(-1)}},
            {"eos_id", std::int64_t{recipe_->eos}},
            {"on_long_row", std::string(cap_ ? "cap" : "stop")}};
}

SequenceRow RowEncoder::encode_texts(std::span<const Message> messages, const Texts& answers, const RowPair& pair) const
{
    if (!recipe_)
        return sequences_of(encode_row_chat(tokenizer_, format_, messages, answers, limits_));
    return encode_row_recipe(tokenizer_, format_, messages, answers, static_cast<std::size_t>(pair.best),
                             static_cast<std::size_t>(pair.worst), *recipe_, limits_);
}

SequenceRow RowEncoder::sequences(const IterationReader& reader, std::int64_t position, const RowPair& pair) const
{
    WantedCandidates wanted = pair.wanted();
    if (recipe_ && reader.has_generated(position)) // the trunk must not depend on what is wanted
        wanted[index(Candidate::generated)] = true;
    std::array<std::string, candidates_per_row> texts;
    Texts answers;
    for (const Candidate candidate : all_candidates)
        if (wanted[index(candidate)]) {
            texts[index(candidate)] = reader.answer(position, candidate);
            answers[index(candidate)] = texts[index(candidate)];
        }
    return with_context(cat(reader.path(), " row ", position, " (prompt_id \"", reader.id(position), "\")"),
                        [&] { return encode_texts(reader.messages(position), answers, pair); });
}

SequenceRow RowEncoder::sequences(const PreferenceRow& row) const
{
    return with_context(cat("row ", row.row, " (prompt_id \"", row.id, "\")"),
                        [&] { return encode_texts(row.messages, {std::nullopt, row.chosen, row.rejected}, {}); });
}

bool RowEncoder::too_long(const SequenceRow& sequences, const WantedCandidates& wanted) const
{
    for (std::size_t c = 0; c < wanted.size(); ++c)
        if (wanted[c] && static_cast<std::int64_t>(sequences[c]->ids.size()) > context_)
            return true;
    return false;
}

Error RowEncoder::long_row(const IterationReader& reader, std::int64_t position, std::int64_t rows) const
{
    return data_error(cat(reader.path(), " row ", position, " (prompt_id \"", reader.id(position),
                          "\"): prompt and generated answer are longer than the model's context of ", context_text_,
                          " (the recipe does not cut an answer that is neither best nor worst; ", rows,
                          " such row(s)). Pass --on-long-row cap, or use --encoding chat"));
}

PackedRow RowEncoder::encode(const IterationReader& reader, std::int64_t position, const RowPair& pair) const
{
    SequenceRow encoded = sequences(reader, position, pair);
    const WantedCandidates wanted = pair.wanted();
    if (too_long(encoded, wanted)) {
        if (!cap_)
            throw long_row(reader, position, 1);
        for (std::size_t c = 0; c < wanted.size(); ++c)
            if (wanted[c])
                cap_length(*encoded[c], context_);
    }
    return pack_row(position, encoded, wanted);
}

PackedRow RowEncoder::encode(const PreferenceRow& row) const
{
    return pack_row(row.row, sequences(row), RowPair{}.wanted());
}

void RowEncoder::check_lengths(const IterationReader& reader, const std::function<RowPair(std::int64_t)>& pair_of,
                               Communicator& comm) const
{
    constexpr auto generated = static_cast<std::int32_t>(Candidate::generated);
    if (!recipe_)
        return; // cut to max-length, which the context holds
    std::int64_t first = reader.rows(), count = 0;
    agree(comm, "lengths of the rows", [&] {
        for (std::int64_t row = comm.rank(); row < reader.rows(); row += comm.size()) {
            const RowPair pair = pair_of(row);
            if (!pair.generated || pair.best == generated || pair.worst == generated ||
                !too_long(sequences(reader, row, pair), pair.wanted()))
                continue;
            first = std::min(first, row);
            ++count;
        }
    });
    first = all_reduce_value(comm, first, ReduceOp::min, "first row that is too long");
    count = all_reduce_value(comm, count, ReduceOp::sum, "rows that are too long");
    if (count > 0 && !cap_)
        throw long_row(reader, first, count);
    if (count > 0)
        SELM_LOG(warning, reader.path() << ": the generated answers of " << count
                                        << " row(s) are cut to the model's context of " << context_text_
                                        << ", the first in row " << first << " (prompt_id \"" << reader.id(first)
                                        << "\")");
}

std::int64_t RowEncoder::bytes(const IterationReader& reader, std::int64_t position, const RowPair& pair)
{
    const WantedCandidates wanted = pair.wanted();
    std::int64_t bytes = reader.message_bytes(position);
    for (const Candidate candidate : all_candidates)
        if (wanted[index(candidate)])
            bytes += reader.answer_bytes(position, candidate);
    return bytes;
}

} // namespace selm
