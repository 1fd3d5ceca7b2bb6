#include "answer_blocks.hpp"

#include <algorithm>
#include <cstring>

#include "redistribute.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"

namespace selm {

namespace {

constexpr const char* what = "generated answers";

void check_answer(const GeneratedAnswer& answer)
{
    if (answer.tokens.size() != answer.logprobs.size())
        throw internal_error(cat("the generated answer of row ", answer.row, " has ", answer.tokens.size(), " tokens and ",
                                 answer.logprobs.size(), " log-probs"));
    if (answer.finish_reason == FinishReason::none && !(answer.text.empty() && answer.tokens.empty()))
        throw internal_error(cat("row ", answer.row, " has no generated answer, but a text of one"));
    if (answer.finish_reason > FinishReason::none)
        throw internal_error(cat("row ", answer.row, " has an unknown finish reason"));
}

void append(std::byte*& place, std::span<const std::byte> bytes)
{
    if (!bytes.empty())
        std::memcpy(place, bytes.data(), bytes.size());
    place += bytes.size();
}

} // namespace

AnswerBlocks::AnswerBlocks(const std::vector<std::int64_t>& rows, const std::vector<GeneratedAnswer>& answers, Communicator& comm)
    : comm_(comm), total_(static_cast<std::int64_t>(rows.size()))
{
    agree(comm, what, [&] { find_positions(rows, answers); });
    std::vector<std::vector<std::byte>> heads(static_cast<std::size_t>(comm.size()));
    for (int r = 0; r < comm.size(); ++r)
        for (const auto& [position, answer] : for_rank(r)) {
            const Head head{.position = position, .text_bytes = static_cast<std::int64_t>(answer->text.size()),
                            .tokens = static_cast<std::int64_t>(answer->tokens.size()),
                            .finish_reason = static_cast<std::int64_t>(answer->finish_reason)};
            const auto bytes = std::as_bytes(std::span(&head, 1));
            auto& out = heads[static_cast<std::size_t>(r)];
            out.insert(out.end(), bytes.begin(), bytes.end());
        }
    const auto received = comm.all_to_all_ragged(heads, what);
    agree(comm, what, [&] { take_heads(received); });
}

void AnswerBlocks::find_positions(const std::vector<std::int64_t>& rows, const std::vector<GeneratedAnswer>& answers)
{
    std::vector<std::pair<std::int64_t, std::int64_t>> places(rows.size()); // (key, position)
    for (std::size_t i = 0; i < rows.size(); ++i)
        places[i] = {rows[i], static_cast<std::int64_t>(i)};
    std::sort(places.begin(), places.end());
    for (std::size_t i = 1; i < places.size(); ++i)
        if (places[i].first == places[i - 1].first)
            throw internal_error(cat("row ", places[i].first, " is listed twice for one iteration file"));
    mine_.reserve(answers.size());
    for (const GeneratedAnswer& answer : answers) {
        check_answer(answer);
        const auto found = std::lower_bound(places.begin(), places.end(), std::pair{answer.row, std::int64_t{0}});
        if (found == places.end() || found->first != answer.row)
            throw internal_error(cat("an answer was generated for row ", answer.row, ", which is not of this iteration file"));
        mine_.emplace_back(found->second, &answer);
    }
    std::stable_sort(mine_.begin(), mine_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
}

std::span<const std::pair<std::int64_t, const GeneratedAnswer*>> AnswerBlocks::for_rank(int r) const
{
    const auto at = [&](int rank) {
        return std::lower_bound(mine_.begin(), mine_.end(), block_begin(total_, comm_.size(), rank),
                                [](const auto& item, std::int64_t position) { return item.first < position; });
    };
    return {at(r), at(r + 1)};
}

void AnswerBlocks::take_heads(const std::vector<std::vector<std::byte>>& received)
{
    const std::int64_t begin = block_begin(total_, comm_.size(), comm_.rank());
    const std::int64_t end = block_begin(total_, comm_.size(), comm_.rank() + 1);
    block_.assign(static_cast<std::size_t>(end - begin), Head{.position = -1});
    from_.resize(received.size());
    for (std::size_t r = 0; r < received.size(); ++r) {
        from_[r].resize(received[r].size() / sizeof(Head));
        if (!from_[r].empty())
            std::memcpy(from_[r].data(), received[r].data(), from_[r].size() * sizeof(Head));
        for (const Head& head : from_[r]) {
            SELM_EXPECT(head.position >= begin && head.position < end);
            Head& place = block_[static_cast<std::size_t>(head.position - begin)];
            if (place.position >= 0)
                throw internal_error(cat(what, ": position ", head.position, " was recorded twice"));
            place = head;
        }
    }
    for (std::size_t i = 0; i < block_.size(); ++i)
        if (block_[i].position < 0)
            throw internal_error(cat(what, ": position ", begin + static_cast<std::int64_t>(i), " has no record"));
}

template<typename Bytes, typename Length>
std::span<const std::byte> AnswerBlocks::gather(const Bytes& bytes_of, const Length& length_of)
{
    const int np = comm_.size(), self = comm_.rank();
    std::vector<std::size_t> offsets(block_.size() + 1, 0);
    std::vector<std::size_t> leaving(static_cast<std::size_t>(np), 0), coming(static_cast<std::size_t>(np), 0);
    std::span<std::byte> column, out, in;
    agree(comm_, what, [&] { // memory may run out on one rank
        for (std::size_t i = 0; i < block_.size(); ++i)
            offsets[i + 1] = offsets[i] + length_of(block_[i]);
        std::size_t all_leaving = 0, all_coming = 0;
        for (int r = 0; r < np; ++r) {
            if (r == self)
                continue;
            const auto rank = static_cast<std::size_t>(r);
            for (const auto& item : for_rank(r))
                leaving[rank] += bytes_of(*item.second).size();
            for (const Head& head : from_[rank])
                coming[rank] += length_of(head);
            all_leaving += leaving[rank];
            all_coming += coming[rank];
        }
        column = column_.take(offsets.back());
        out = outgoing_.take(all_leaving);
        in = incoming_.take(all_coming);
    });
    std::vector<Communicator::Outgoing> outgoing;
    std::vector<Communicator::Incoming> incoming;
    std::byte* next_out = out.data();
    std::byte* next_in = in.data();
    for (int step = 1; step < np; ++step) { // not all ranks at one rank first
        const int to = (self + step) % np;
        std::byte* const begin = next_out;
        for (const auto& item : for_rank(to))
            append(next_out, bytes_of(*item.second));
        if (next_out != begin)
            outgoing.push_back({to, {begin, next_out}});
    }
    for (int r = 0; r < np; ++r) {
        if (const std::size_t bytes = coming[static_cast<std::size_t>(r)]; bytes > 0)
            incoming.push_back({r, {next_in, bytes}});
        next_in += coming[static_cast<std::size_t>(r)];
    }
    const auto exchange = comm_.start_exchange(outgoing, incoming, what);
    const std::int64_t first = block_begin(total_, np, self);
    const auto place_of = [&](std::int64_t position) { return column.data() + offsets[static_cast<std::size_t>(position - first)]; };
    for (const auto& [position, answer] : for_rank(self)) {
        std::byte* place = place_of(position);
        append(place, bytes_of(*answer));
    }
    exchange->wait();
    const std::byte* from = in.data();
    for (int r = 0; r < np; ++r) {
        if (r == self)
            continue;
        for (const Head& head : from_[static_cast<std::size_t>(r)]) {
            std::byte* place = place_of(head.position);
            append(place, {from, length_of(head)});
            from += length_of(head);
        }
    }
    return column;
}

void AnswerBlocks::write(h5::File& file)
{
    std::vector<std::int64_t> text_bytes, tokens;
    std::vector<std::uint8_t> reasons;
    for (const Head& head : block_) {
        text_bytes.push_back(head.text_bytes);
        tokens.push_back(head.tokens);
        reasons.push_back(static_cast<std::uint8_t>(head.finish_reason));
    }
    const auto as = []<typename T>(T, std::span<const std::byte> bytes) {
        return std::span<const T>(reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T));
    };
    const auto of_text = [](const Head& head) { return static_cast<std::size_t>(head.text_bytes); };
    const auto of_tokens = [](const Head& head) { return static_cast<std::size_t>(head.tokens) * 4; };
    const std::string group = "/responses/generated/";
    file.write_blocks(group + "text", as(std::uint8_t{}, gather([](const GeneratedAnswer& a) { return std::as_bytes(std::span(a.text)); }, of_text)));
    file.write_offsets(group + "text_offsets", text_bytes);
    file.write_blocks(group + "tokens", as(std::int32_t{}, gather([](const GeneratedAnswer& a) { return std::as_bytes(std::span(a.tokens)); }, of_tokens)));
    file.write_offsets(group + "token_offsets", tokens);
    file.write_blocks(group + "logprobs", as(float{}, gather([](const GeneratedAnswer& a) { return std::as_bytes(std::span(a.logprobs)); }, of_tokens)));
    file.write_blocks(group + "finish_reason", reasons);
}

} // namespace selm
