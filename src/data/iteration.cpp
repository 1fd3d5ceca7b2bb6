#include "selm/data/iteration.hpp"

#include <algorithm>
#include <set>

#include "answer_blocks.hpp"
#include "dataset_digest.hpp"
#include "redistribute.hpp"
#include "row_columns.hpp"
#include "selm/base/provenance.hpp"
#include "selm/h5/publish.hpp"

namespace selm {

namespace {

template<typename T, std::size_t N>
std::vector<std::array<T, N>> as_arrays(const std::vector<T>& flat)
{
    std::vector<std::array<T, N>> rows(flat.size() / N);
    for (std::size_t i = 0; i < rows.size(); ++i)
        std::copy_n(flat.begin() + static_cast<std::ptrdiff_t>(i * N), N, rows[i].begin());
    return rows;
}

template<typename T, std::size_t N>
void append(std::vector<T>& flat, const std::array<T, N>& values)
{
    flat.insert(flat.end(), values.begin(), values.end());
}

} // namespace

void write_iteration(const std::string& path, const PreferencesReader& prefs, const std::vector<std::int64_t>& rows,
                     const std::vector<GeneratedAnswer>& answers, const IterationAttributes& attributes,
                     const RankTiming& timing, Communicator& comm)
{
    const auto n = static_cast<std::int64_t>(rows.size());
    const auto begin = static_cast<std::size_t>(block_begin(n, comm.size(), comm.rank()));
    const auto end = static_cast<std::size_t>(block_begin(n, comm.size(), comm.rank() + 1));
    AnswerBlocks generated(rows, answers, comm);
    h5::write_and_publish(path, comm, [&](h5::File& file) {
        write_root_attributes(file, iteration_format, attributes.file);
        file.set_attribute("/", "iteration", attributes.iteration);
        file.set_attribute("/", "portion", attributes.portion);
        file.set_attribute("/", "portions", attributes.portions);
        file.set_attribute("/", "policy", attributes.policy);
        file.set_attribute("/", "policy_digest", attributes.policy_digest);
        prefs.copy_rows(file, std::span(rows).subspan(begin, end - begin), comm);
        generated.write(file);
        write_timing(file, "generation", timing, comm);
        write_provenance(file, "generation", attributes.provenance, comm);
    });
}

void update_iteration(const std::string& path, Communicator& comm, const std::vector<std::string>& replace,
                      const std::function<void(h5::File&)>& write_groups)
{
    std::optional<h5::File> source;
    agree(comm, "opening " + path, [&] {
        source = h5::File::open(path);
        check_format(*source, iteration_format);
    });
    h5::write_and_publish(path, comm, [&](h5::File& file) {
        file.copy_tree(*source, "/", replace);
        write_groups(file);
    });
}

void write_ranking(h5::File& file, std::int64_t rows, const std::vector<RankedRow>& mine, const RankingInfo& info,
                   Communicator& comm)
{
    const std::size_t rankers = info.rankers.size();
    std::vector<std::pair<std::int64_t, std::vector<std::byte>>> packed;
    agree(comm, "ranked rows", [&] {
        for (const RankedRow& row : mine) {
            SELM_EXPECT(row.rankers.size() == rankers);
            PayloadWriter out;
            out.value(row.scores);
            out.value(row.ranks);
            out.value(row.best);
            out.value(row.worst);
            for (const RankedRow::OfRanker& one : row.rankers)
                out.value(one);
            packed.emplace_back(row.position, out.bytes());
        }
    });
    const auto block = to_blocks(rows, std::move(packed), "ranked rows", comm);
    std::vector<double> scores;
    std::vector<std::int32_t> ranks, best, worst;
    std::vector<std::vector<double>> ranker_scores(rankers);
    std::vector<std::vector<float>> ranker_logits(rankers);
    for (const auto& payload : block) {
        PayloadReader in(payload);
        append(scores, in.value<std::array<double, 3>>());
        append(ranks, in.value<std::array<std::int32_t, 3>>());
        best.push_back(in.value<std::int32_t>());
        worst.push_back(in.value<std::int32_t>());
        for (std::size_t r = 0; r < rankers; ++r) {
            const auto one = in.value<RankedRow::OfRanker>();
            append(ranker_scores[r], one.scores);
            append(ranker_logits[r], one.logits);
        }
    }
    file.write_blocks("/ranking/scores", scores, {3});
    file.write_blocks("/ranking/ranks", ranks, {3});
    file.create_group("/ranking/rankers");
    file.set_attributes("/ranking", info.attributes);
    for (std::size_t r = 0; r < rankers; ++r) {
        const std::string group = "/ranking/rankers/" + info.rankers[r].name;
        file.write_blocks(group + "/scores", ranker_scores[r], {3});
        if (info.rankers[r].pairwise)
            file.write_blocks(group + "/logits", ranker_logits[r], {3, 3});
        file.set_attributes(group, info.rankers[r].attributes);
    }
    file.write_blocks("/pairs/best", best);
    file.write_blocks("/pairs/worst", worst);
    file.set_attribute("/pairs", "update_rule", info.update_rule);
}

void write_logprobs(h5::File& file, const std::string& name, std::int64_t rows, const std::vector<RowLogProbSums>& mine,
                    const LogProbAttributes& attributes, Communicator& comm)
{
    std::vector<std::pair<std::int64_t, std::vector<std::byte>>> packed;
    for (const RowLogProbSums& row : mine) {
        PayloadWriter out;
        out.value(row.sum);
        out.value(row.tokens);
        packed.emplace_back(row.position, out.bytes());
    }
    const auto block = to_blocks(rows, std::move(packed), "log-probs", comm);
    std::vector<double> sums;
    std::vector<std::int32_t> tokens;
    for (const auto& payload : block) {
        PayloadReader in(payload);
        append(sums, in.value<std::array<double, 3>>());
        append(tokens, in.value<std::array<std::int32_t, 3>>());
    }
    const std::string group = "/logprobs/" + name;
    file.write_blocks(group + "/sum", sums, {3});
    file.write_blocks(group + "/tokens", tokens, {3});
    file.set_attribute(group, "model", attributes.model);
    file.set_attribute(group, "digest", attributes.digest);
    file.set_attribute(group, "engine", attributes.engine);
    file.set_attribute(group, "encoding", attributes.encoding);
    file.set_attribute(group, "chat_format", attributes.chat_format);
    file.set_attribute(group, "dtype", attributes.dtype);
    file.set_attribute(group, "max_length", attributes.max_length);
    file.set_attribute(group, "max_prompt_length", attributes.max_prompt_length);
    file.set_attribute(group, "pairs_digest", attributes.pairs_digest);
    file.set_attributes(group, attributes.extra);
}

void write_timing(h5::File& file, const std::string& phase, const RankTiming& mine, Communicator&)
{
    const std::string group = "/timing/" + phase;
    file.write_blocks(group + "/rows", std::vector<std::int64_t>{mine.rows});
    file.write_blocks(group + "/busy_s", std::vector<double>{mine.busy_s});
    file.write_blocks(group + "/idle_s", std::vector<double>{mine.idle_s});
}

void write_provenance(h5::File& file, const std::string& phase, const h5::Attributes& what, Communicator& comm)
{
    const std::string group = "/provenance/" + phase;
    file.write_texts(group + "/hosts", std::vector<std::string>{host_name()});
    // Facts of one rank, the same for all: ranks may run on different processors or at a different second.
    const auto of_root = [&](const char* name, const std::function<std::string()>& fact) {
        file.set_attribute(group, name, root_string(comm, "provenance", fact));
    };
    of_root("finished", utc_timestamp);
    of_root("software", software_version);
    of_root("build", build_description);
    of_root("cpu", cpu_model);
    file.set_attribute(group, "ranks", static_cast<std::int64_t>(comm.size()));
    file.set_attributes(group, what);
}

// ---------------------------------------------------------------------------------------------------- reading

struct IterationReader::Columns : RowColumns {
    explicit Columns(const std::string& path) : RowColumns(path, iteration_format)
    {
        generated = TextColumn(file, "/responses/generated/text");
        reasons = file.read<std::uint8_t>("/responses/generated/finish_reason");
        token_offsets = file.read<std::int64_t>("/responses/generated/token_offsets");
        const auto complain = [&](const std::string& problem) {
            throw data_error(cat(path, ": ", problem, ". The file is damaged; make it anew"));
        };
        const auto n = static_cast<std::size_t>(rows());
        if (generated.rows() != rows() || reasons.size() != n || token_offsets.size() != n + 1)
            complain(cat("/responses/generated does not have ", n, " rows as the prompts do"));
        if (token_offsets.front() != 0 || !std::is_sorted(token_offsets.begin(), token_offsets.end()))
            complain("/responses/generated/token_offsets does not rise from 0");
        if (file.info("/responses/generated/tokens").elements() != token_offsets.back()
            || file.info("/responses/generated/logprobs").elements() != token_offsets.back())
            complain("/responses/generated/token_offsets does not end at the number of tokens and log-probs");
        for (const std::uint8_t reason : reasons)
            if (reason > static_cast<std::uint8_t>(FinishReason::none))
                complain(cat("/responses/generated/finish_reason holds ", static_cast<int>(reason), " (0 to 3 are defined)"));
    }

    std::vector<std::array<double, 3>> triples(const std::string& dataset) const
    {
        check_shape(dataset);
        return as_arrays<double, 3>(file.read<double>(dataset));
    }

    std::vector<std::array<std::int32_t, 3>> int_triples(const std::string& dataset) const
    {
        check_shape(dataset);
        return as_arrays<std::int32_t, 3>(file.read<std::int32_t>(dataset));
    }

    void check_shape(const std::string& dataset) const
    {
        if (file.info(dataset).shape != std::vector<std::int64_t>{rows(), 3})
            throw data_error(cat(file.path(), ": ", dataset, " is not of shape [", rows(), ", 3]. The file is damaged; make it anew"));
    }

    TextColumn generated;
    std::vector<std::uint8_t> reasons;
    std::vector<std::int64_t> token_offsets;
};

IterationReader::IterationReader(const std::string& path) : columns_(std::make_unique<Columns>(path)) {}
IterationReader::~IterationReader() = default;
IterationReader::IterationReader(IterationReader&&) noexcept = default;
IterationReader& IterationReader::operator=(IterationReader&&) noexcept = default;

const std::string& IterationReader::path() const noexcept { return columns_->file.path(); }
std::int64_t IterationReader::rows() const noexcept { return columns_->rows(); }
std::vector<std::string> IterationReader::ids() const { return columns_->ids(); }
std::vector<Message> IterationReader::messages(std::int64_t position) const { return columns_->messages(position); }
std::int64_t IterationReader::message_bytes(std::int64_t position) const { return columns_->message_bytes(position); }
const h5::File& IterationReader::file() const noexcept { return columns_->file; }

IterationRow IterationReader::row(std::int64_t position) const
{
    IterationRow found;
    static_cast<PreferenceRow&>(found) = columns_->row(position);
    found.generated.row = found.row;
    found.generated.text = columns_->generated.text(position);
    found.generated.tokens = tokens(position);
    found.generated.logprobs = token_logprobs(position);
    found.generated.finish_reason = finish_reason(position);
    return found;
}

std::int64_t IterationReader::row_key(std::int64_t position) const
{
    columns_->check_row(position);
    return columns_->row_key[static_cast<std::size_t>(position)];
}

std::string IterationReader::id(std::int64_t position) const
{
    columns_->check_row(position);
    return columns_->id.text(position);
}

std::string IterationReader::prompt(std::int64_t position) const
{
    columns_->check_row(position);
    return columns_->prompt.text(position);
}

namespace {

const TextColumn& column_of(Candidate candidate, const TextColumn& generated, const TextColumn& chosen, const TextColumn& rejected)
{
    switch (candidate) {
    case Candidate::generated: return generated;
    case Candidate::chosen: return chosen;
    case Candidate::rejected: return rejected;
    }
    throw internal_error("unknown candidate");
}

} // namespace

std::string IterationReader::answer(std::int64_t position, Candidate candidate) const
{
    columns_->check_row(position);
    return column_of(candidate, columns_->generated, columns_->chosen, columns_->rejected).text(position);
}

std::int64_t IterationReader::answer_bytes(std::int64_t position, Candidate candidate) const
{
    columns_->check_row(position);
    return column_of(candidate, columns_->generated, columns_->chosen, columns_->rejected).bytes(position);
}

std::vector<std::int32_t> IterationReader::tokens(std::int64_t position) const
{
    columns_->check_row(position);
    return columns_->file.read_rows<std::int32_t>("/responses/generated/tokens",
                                                  columns_->token_offsets[static_cast<std::size_t>(position)], token_count(position));
}

std::vector<float> IterationReader::token_logprobs(std::int64_t position) const
{
    columns_->check_row(position);
    return columns_->file.read_rows<float>("/responses/generated/logprobs",
                                           columns_->token_offsets[static_cast<std::size_t>(position)], token_count(position));
}

std::int64_t IterationReader::token_count(std::int64_t position) const
{
    columns_->check_row(position);
    return columns_->token_offsets[static_cast<std::size_t>(position) + 1] - columns_->token_offsets[static_cast<std::size_t>(position)];
}

FinishReason IterationReader::finish_reason(std::int64_t position) const
{
    columns_->check_row(position);
    return static_cast<FinishReason>(columns_->reasons[static_cast<std::size_t>(position)]);
}

bool IterationReader::has_ranking() const
{
    return columns_->file.exists("/ranking/scores");
}

std::vector<std::array<double, 3>> IterationReader::ranking_scores() const
{
    if (!has_ranking())
        throw data_error(cat(path(), " has no ranking (it is needed here). Run selm_rank on it first"));
    return columns_->triples("/ranking/scores");
}

std::vector<std::array<std::int32_t, 3>> IterationReader::ranking_ranks() const
{
    if (!has_ranking())
        throw data_error(cat(path(), " has no ranking (it is needed here). Run selm_rank on it first"));
    return columns_->int_triples("/ranking/ranks");
}

std::vector<std::string> IterationReader::rankers() const
{
    return columns_->file.exists("/ranking/rankers") ? columns_->file.children("/ranking/rankers") : std::vector<std::string>{};
}

std::vector<std::array<double, 3>> IterationReader::ranker_scores(const std::string& name) const
{
    return columns_->triples("/ranking/rankers/" + name + "/scores");
}

bool IterationReader::has_pairs() const
{
    return columns_->file.exists("/pairs/best") && columns_->file.exists("/pairs/worst");
}

IterationReader::Pairs IterationReader::pairs() const
{
    if (!has_pairs())
        throw data_error(cat(path(), " has no pairs (which answer is better is needed here). Run selm_rank on it first"));
    Pairs found;
    found.best = columns_->file.read<std::int32_t>("/pairs/best");
    found.worst = columns_->file.read<std::int32_t>("/pairs/worst");
    found.update_rule = columns_->file.string_attribute("/pairs", "update_rule");
    const auto n = static_cast<std::size_t>(rows());
    const auto is_candidate = [](std::int32_t value) { return value >= 0 && value < candidates_per_row; };
    if (found.best.size() != n || found.worst.size() != n || !std::all_of(found.best.begin(), found.best.end(), is_candidate)
        || !std::all_of(found.worst.begin(), found.worst.end(), is_candidate))
        throw data_error(cat(path(), ": /pairs does not hold ", n, " candidate indices 0 to 2. The file is damaged; run selm_rank again"));
    return found;
}

std::string IterationReader::pairs_digest() const
{
    static const std::vector<std::string> bound{
        "/pairs/best", "/pairs/worst", "/prompts/messages/role", "/prompts/messages/row_offsets", "/prompts/messages/text",
        "/prompts/messages/text_offsets", "/responses/chosen/text", "/responses/chosen/text_offsets",
        "/responses/generated/finish_reason", "/responses/generated/text", "/responses/generated/text_offsets",
        "/responses/rejected/text", "/responses/rejected/text_offsets"};
    if (!has_pairs())
        throw data_error(cat(path(), " has no pairs (which answer is better is needed here). Run selm_rank on it first"));
    return digest_of_datasets(columns_->file, bound);
}

bool IterationReader::has_logprobs(const std::string& name) const
{
    return columns_->file.exists("/logprobs/" + name + "/sum");
}

std::vector<std::string> IterationReader::logprob_names() const
{
    return columns_->file.exists("/logprobs") ? columns_->file.children("/logprobs") : std::vector<std::string>{};
}

IterationReader::LogProbs IterationReader::logprobs(const std::string& name) const
{
    if (!has_logprobs(name))
        throw data_error(cat(path(), " has no log-probs \"", name, "\" (they are needed here). Run selm_logp on it first"));
    const std::string group = "/logprobs/" + name;
    const h5::File& in = columns_->file;
    LogProbs found;
    found.sum = columns_->triples(group + "/sum");
    found.tokens = columns_->int_triples(group + "/tokens");
    LogProbAttributes& attributes = found.attributes;
    attributes.model = in.string_attribute(group, "model");
    attributes.digest = in.string_attribute(group, "digest");
    attributes.engine = in.string_attribute(group, "engine");
    attributes.encoding = in.string_attribute(group, "encoding");
    attributes.chat_format = in.string_attribute(group, "chat_format");
    attributes.dtype = in.string_attribute(group, "dtype");
    attributes.pairs_digest = in.string_attribute(group, "pairs_digest");
    attributes.max_length = in.int_attribute(group, "max_length");
    attributes.max_prompt_length = in.int_attribute(group, "max_prompt_length");
    static const std::set<std::string> named{"model", "digest", "engine", "encoding", "chat_format", "dtype", "pairs_digest",
                                             "max_length", "max_prompt_length"};
    for (const auto& [key, value] : in.attributes(group))
        if (!named.contains(key))
            attributes.extra.emplace(key, value);
    return found;
}

IterationAttributes IterationReader::attributes() const
{
    const h5::File& in = columns_->file;
    IterationAttributes found;
    found.file.config = in.string_attribute("/", "config");
    found.file.config_hash = in.string_attribute("/", "config_hash");
    found.file.source_digest = in.string_attribute("/", "source_digest");
    found.iteration = in.int_attribute("/", "iteration");
    found.portion = in.int_attribute("/", "portion");
    found.portions = in.int_attribute("/", "portions");
    found.policy = in.string_attribute("/", "policy");
    found.policy_digest = in.string_attribute("/", "policy_digest");
    static const std::set<std::string> named{"format", "format_version", "created", "software", "config", "config_hash",
                                             "source_digest", "iteration", "portion", "portions", "policy", "policy_digest"};
    for (const auto& [key, value] : in.attributes("/"))
        if (!named.contains(key))
            found.file.extra.emplace(key, value);
    return found;
}

} // namespace selm
