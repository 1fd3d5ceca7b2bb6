#include "selm/phases/inspect.hpp"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <map>
#include <ostream>
#include <sstream>

#include "inspect_encoding.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"

namespace selm {

namespace {

constexpr std::array<const char*, 3> candidate_names{"generated", "chosen", "rejected"};

std::string number(double value, int digits = 4)
{
    if (std::isnan(value))
        return "-";
    std::ostringstream out;
    out << std::setprecision(digits) << value;
    return out.str();
}

std::string text_of(const h5::AttributeValue& value)
{
    return std::visit([](const auto& one) { return cat(one); }, value);
}

std::string attribute_text(const h5::File& file, const char* name)
{
    const auto value = file.attribute("/", name);
    return value ? text_of(*value) : "-";
}

void print_spread(std::ostream& out, const char* name, std::vector<std::int64_t> values)
{
    if (values.empty())
        return;
    std::sort(values.begin(), values.end());
    double sum = 0;
    for (const std::int64_t value : values)
        sum += static_cast<double>(value);
    out << "  " << std::left << std::setw(22) << name << std::right << std::setw(9) << values.front() << std::setw(9)
        << values[values.size() / 2] << std::setw(11) << number(sum / static_cast<double>(values.size()), 5) << std::setw(9)
        << values.back() << "\n";
}

template<typename Value>
std::vector<std::int64_t> of_rows(std::int64_t rows, const Value& value)
{
    std::vector<std::int64_t> values;
    for (std::int64_t i = 0; i < rows; ++i)
        values.push_back(value(i));
    return values;
}

void print_length_head(std::ostream& out)
{
    out << "\n  " << std::left << std::setw(22) << "length" << std::right << std::setw(9) << "min" << std::setw(9) << "median"
        << std::setw(11) << "mean" << std::setw(9) << "max" << "\n";
}

void print_head(std::ostream& out, const h5::File& file, std::int64_t rows)
{
    out << file.path() << ": " << attribute_text(file, "format") << ", format version " << attribute_text(file, "format_version") << ", "
        << rows << " rows\n";
    for (const char* name : {"created", "software", "config_hash", "source_digest"})
        out << "  " << std::left << std::setw(24) << name << attribute_text(file, name) << "\n";
}

void print_extra(std::ostream& out, const h5::File& file, const std::vector<std::string>& shown)
{
    for (const auto& [name, value] : file.attributes("/"))
        if (std::find(shown.begin(), shown.end(), name) == shown.end())
            out << "  " << std::left << std::setw(24) << name << text_of(value) << "\n";
    const auto config = file.attribute("/", "config");
    const auto* text = config ? std::get_if<std::string>(&*config) : nullptr;
    if (text == nullptr || text->empty())
        return;
    out << "\n  configuration\n";
    std::istringstream lines(*text);
    for (std::string line; std::getline(lines, line);)
        out << "    " << line << "\n";
}

const std::vector<std::string>& common_attributes()
{
    static const std::vector<std::string> names{"format", "format_version", "created", "software", "config", "config_hash", "source_digest"};
    return names;
}

void print_messages_and_scores(std::ostream& out, const h5::File& file)
{
    const auto scores = file.read<double>("/scores");
    const auto offsets = file.read<std::int64_t>("/prompts/messages/row_offsets");
    const auto roles = file.read<std::uint8_t>("/prompts/messages/role");
    std::int64_t several = 0;
    for (std::size_t i = 1; i < offsets.size(); ++i)
        several += offsets[i] - offsets[i - 1] > 2;
    out << "\n  " << roles.size() << " messages before the answers, " << std::count(roles.begin(), roles.end(), std::uint8_t{0})
        << " of them of the system; " << several << " rows with more than one turn\n";
    std::array<double, 2> sums{};
    std::array<std::int64_t, 2> known{};
    for (std::size_t i = 0; i < scores.size(); ++i)
        if (!std::isnan(scores[i])) {
            sums[i % 2] += scores[i];
            ++known[i % 2];
        }
    for (const std::size_t c : {0U, 1U})
        out << "  score of " << candidate_names[c + 1] << " in the source: known in " << known[c] << " rows, mean "
            << number(known[c] > 0 ? sums[c] / static_cast<double>(known[c]) : NAN) << "\n";
}

void print_preferences(std::ostream& out, const std::string& path)
{
    const PreferencesReader reader(path);
    const std::int64_t n = reader.rows();
    print_head(out, reader.file(), n);
    print_extra(out, reader.file(), common_attributes());
    print_length_head(out);
    print_spread(out, "conversation, bytes", of_rows(n, [&](std::int64_t i) { return reader.message_bytes(i); }));
    print_spread(out, "chosen, bytes", of_rows(n, [&](std::int64_t i) { return reader.chosen_bytes(i); }));
    print_spread(out, "rejected, bytes", of_rows(n, [&](std::int64_t i) { return reader.rejected_bytes(i); }));
    print_messages_and_scores(out, reader.file());
}

void print_generated(std::ostream& out, const IterationReader& reader)
{
    std::map<FinishReason, std::int64_t> reasons;
    for (std::int64_t i = 0; i < reader.rows(); ++i)
        ++reasons[reader.finish_reason(i)];
    out << "  generated answers: " << reasons[FinishReason::stop] << " ended by themselves, " << reasons[FinishReason::length]
        << " cut at the limit, " << reasons[FinishReason::elsewhere] << " made elsewhere, " << reasons[FinishReason::none] << " rows without\n";
    const auto logprobs = reader.file().read<float>("/responses/generated/logprobs");
    double sum = 0;
    for (const float value : logprobs)
        sum += static_cast<double>(value);
    if (!logprobs.empty())
        out << "  " << logprobs.size() << " generated tokens, mean log-prob " << number(sum / static_cast<double>(logprobs.size())) << "\n";
}

void print_ranking(std::ostream& out, const IterationReader& reader)
{
    if (!reader.has_ranking()) {
        out << "\n  not ranked yet\n";
        return;
    }
    const auto scores = reader.ranking_scores();
    const auto ranks = reader.ranking_ranks();
    const auto pairs = reader.pairs();
    const bool paired = pairs.update_rule != "none"; // held-out answers are scored only
    out << "\n  ranking by";
    for (const std::string& name : reader.rankers())
        out << " " << name;
    out << (reader.rankers().empty() ? " nobody" : "") << ", update rule " << pairs.update_rule << "\n  " << std::left << std::setw(12)
        << "" << std::right << std::setw(11) << "mean score" << std::setw(8) << "rank 1" << std::setw(8) << "rank 2" << std::setw(8) << "rank 3"
        << (paired ? "  as best  as worst" : "") << "\n";
    for (std::size_t c = 0; c < candidates_per_row; ++c) {
        double sum = 0;
        std::int64_t scored = 0;
        std::array<std::int64_t, 4> at_rank{};
        for (std::size_t i = 0; i < scores.size(); ++i) {
            if (!std::isnan(scores[i][c])) {
                sum += scores[i][c];
                ++scored;
            }
            ++at_rank[static_cast<std::size_t>(std::clamp(ranks[i][c], 0, 3))];
        }
        out << "  " << std::left << std::setw(12) << candidate_names[c] << std::right << std::setw(11)
            << number(scored > 0 ? sum / static_cast<double>(scored) : NAN) << std::setw(8) << at_rank[1] << std::setw(8) << at_rank[2]
            << std::setw(8) << at_rank[3];
        if (paired)
            out << std::setw(9) << std::count(pairs.best.begin(), pairs.best.end(), static_cast<std::int32_t>(c)) << std::setw(10)
                << std::count(pairs.worst.begin(), pairs.worst.end(), static_cast<std::int32_t>(c));
        out << "\n";
    }
    if (!paired)
        return;
    std::int64_t same = 0;
    for (std::size_t i = 0; i < pairs.best.size(); ++i)
        same += pairs.best[i] == pairs.worst[i];
    out << "  best and worst are the same answer in " << same << " rows\n";
}

void print_logprobs(std::ostream& out, const IterationReader& reader)
{
    for (const std::string& name : reader.logprob_names()) {
        const auto found = reader.logprobs(name);
        const LogProbAttributes& of = found.attributes;
        out << "\n  log-probs \"" << name << "\" of " << of.model << " (" << of.dtype << ", " << of.engine << ", encoding " << of.encoding << ", "
            << of.chat_format << ", max length " << of.max_length << ")"
            << (reader.has_pairs() && of.pairs_digest == reader.pairs_digest() ? "" : "  OUT OF DATE: the pairs or answers are others") << "\n";
        for (std::size_t c = 0; c < candidates_per_row; ++c) {
            double sum = 0;
            std::int64_t tokens = 0;
            std::int64_t rows = 0;
            for (std::size_t i = 0; i < found.sum.size(); ++i)
                if (!std::isnan(found.sum[i][c])) {
                    sum += found.sum[i][c];
                    tokens += found.tokens[i][c];
                    ++rows;
                }
            out << "    " << std::left << std::setw(12) << candidate_names[c] << rows << " rows, mean sum "
                << number(rows > 0 ? sum / static_cast<double>(rows) : NAN, 6) << ", mean per token "
                << number(tokens > 0 ? sum / static_cast<double>(tokens) : NAN) << "\n";
        }
    }
}

void print_timing_and_provenance(std::ostream& out, const h5::File& file)
{
    if (file.exists("/timing"))
        for (const std::string& phase : file.children("/timing")) {
            const auto rows = file.read<std::int64_t>("/timing/" + phase + "/rows");
            const auto busy = file.read<double>("/timing/" + phase + "/busy_s");
            const auto idle = file.read<double>("/timing/" + phase + "/idle_s");
            double busy_sum = 0;
            double idle_sum = 0;
            for (std::size_t i = 0; i < busy.size(); ++i) {
                busy_sum += busy[i];
                idle_sum += idle[i];
            }
            out << "\n  " << phase << ": " << rows.size() << " ranks, " << *std::min_element(rows.begin(), rows.end()) << " to "
                << *std::max_element(rows.begin(), rows.end()) << " rows each, busy " << number(busy_sum) << " s, idle " << number(idle_sum) << " s";
        }
    out << "\n";
    if (!file.exists("/provenance"))
        return;
    for (const std::string& phase : file.children("/provenance")) {
        out << "  made by " << phase << ":";
        for (const auto& [name, value] : file.attributes("/provenance/" + phase))
            out << " " << name << "=" << text_of(value) << ";";
        out << "\n";
    }
}

void print_iteration(std::ostream& out, const std::string& path)
{
    const IterationReader reader(path);
    const std::int64_t n = reader.rows();
    const IterationAttributes attributes = reader.attributes();
    print_head(out, reader.file(), n);
    out << "  iteration " << attributes.iteration << ", portion " << attributes.portion << " of " << attributes.portions << "\n  policy "
        << (attributes.policy.empty() ? "-" : attributes.policy) << " (digest " << attributes.policy_digest << ")\n";
    std::vector<std::string> shown = common_attributes();
    shown.insert(shown.end(), {"iteration", "portion", "portions", "policy", "policy_digest"});
    print_extra(out, reader.file(), shown);
    print_length_head(out);
    print_spread(out, "conversation, bytes", of_rows(n, [&](std::int64_t i) { return reader.message_bytes(i); }));
    for (std::size_t c = 0; c < candidates_per_row; ++c)
        print_spread(out, cat(candidate_names[c], ", bytes").c_str(),
                     of_rows(n, [&](std::int64_t i) { return reader.answer_bytes(i, static_cast<Candidate>(c)); }));
    print_spread(out, "generated, tokens", of_rows(n, [&](std::int64_t i) { return reader.token_count(i); }));
    print_messages_and_scores(out, reader.file());
    print_generated(out, reader);
    print_ranking(out, reader);
    print_logprobs(out, reader);
    print_timing_and_provenance(out, reader.file());
}

/// Any other HDF5 file: what is in it.
void print_contents(std::ostream& out, const std::string& path, const std::string& format)
{
    const h5::File file = h5::File::open(path);
    out << path << ": " << (format.empty() ? "not a file that SELM wrote" : format) << "\n";
    for (const auto& [name, value] : file.attributes("/"))
        out << "  " << std::left << std::setw(24) << name << text_of(value) << "\n";
    for (const std::string& dataset : file.datasets()) {
        const h5::DatasetInfo info = file.info(dataset);
        out << "  " << dataset << "  " << h5::name_of(info.type) << " [";
        for (std::size_t i = 0; i < info.shape.size(); ++i)
            out << (i > 0 ? ", " : "") << info.shape[i];
        out << "]\n";
    }
}

// ---------------------------------------------------------------------------------------------------- one row

void print_block(std::ostream& out, const std::string& title, const std::string& text)
{
    out << "--- " << title << "\n" << text << (text.empty() ? "(empty)" : "") << "\n";
}

const char* role_name(Role role)
{
    switch (role) {
    case Role::system: return "system";
    case Role::user: return "user";
    case Role::assistant: return "assistant";
    }
    return "?";
}

void print_row_head(std::ostream& out, const std::string& path, std::int64_t position, const PreferenceRow& row)
{
    out << path << " row " << position << "  key " << row.row << "  source row " << row.row_source << "  id " << row.id << "\n";
    for (const Message& message : row.messages)
        print_block(out, role_name(message.role), message.content);
}

std::string source_score(double score)
{
    return std::isnan(score) ? "" : cat("  score in the source ", score);
}

void print_preference_row(std::ostream& out, const std::string& path, std::int64_t position)
{
    const PreferenceRow row = PreferencesReader(path).row(position);
    print_row_head(out, path, position, row);
    print_block(out, "chosen" + source_score(row.score_chosen), row.chosen);
    print_block(out, "rejected" + source_score(row.score_rejected), row.rejected);
}

/// Rank, score, part in the pair and log-probs of one answer, as far as they are there.
std::string answer_facts(const IterationReader& reader, std::int64_t position, std::size_t candidate)
{
    const auto i = static_cast<std::size_t>(position);
    std::string facts;
    if (reader.has_ranking()) {
        facts += cat("  rank ", reader.ranking_ranks()[i][candidate], ", score ", number(reader.ranking_scores()[i][candidate], 6));
        const auto pairs = reader.pairs();
        if (pairs.best[i] == static_cast<std::int32_t>(candidate))
            facts += ", BEST";
        if (pairs.worst[i] == static_cast<std::int32_t>(candidate))
            facts += ", WORST";
    }
    for (const std::string& name : reader.logprob_names()) {
        const auto found = reader.logprobs(name);
        if (found.tokens[i][candidate] > 0)
            facts += cat(", ", name, " log-prob ", number(found.sum[i][candidate], 6), " over ", found.tokens[i][candidate], " tokens");
    }
    return facts;
}

std::string finish_words(const GeneratedAnswer& answer)
{
    switch (answer.finish_reason) {
    case FinishReason::stop: return cat("  ", answer.tokens.size(), " tokens, ended by itself");
    case FinishReason::length: return cat("  ", answer.tokens.size(), " tokens, cut at the limit");
    case FinishReason::elsewhere: return "  made elsewhere";
    case FinishReason::none: return "  none";
    }
    return "";
}

void print_iteration_row(std::ostream& out, const std::string& path, std::int64_t position)
{
    const IterationReader reader(path);
    const IterationRow row = reader.row(position);
    print_row_head(out, path, position, row);
    print_block(out, "generated" + finish_words(row.generated) + answer_facts(reader, position, 0), row.generated.text);
    print_block(out, "chosen" + source_score(row.score_chosen) + answer_facts(reader, position, 1), row.chosen);
    print_block(out, "rejected" + source_score(row.score_rejected) + answer_facts(reader, position, 2), row.rejected);
}

void inspect(const InspectOptions& options, std::ostream& out)
{
    const std::string format = format_of(options.file);
    if (options.verify)
        verify_file(options.file);
    if (!options.encode.empty()) {
        print_encoded_rows(options, out);
        return;
    }
    if (options.digest) {
        out << data_digest(options.file) << "\n";
        return;
    }
    if (options.verify) {
        out << options.file << ": verified\n";
        return;
    }
    const bool preferences = format == preferences_format;
    if (!preferences && format != iteration_format) {
        if (options.row >= 0)
            throw data_error(cat(options.file, " has no rows (it is ", format.empty() ? "not a file that SELM wrote" : "a " + format + " file", "). Leave out --row"));
        print_contents(out, options.file, format);
    } else if (options.row >= 0) {
        preferences ? print_preference_row(out, options.file, options.row) : print_iteration_row(out, options.file, options.row);
    } else {
        preferences ? print_preferences(out, options.file) : print_iteration(out, options.file);
    }
}

} // namespace

void InspectOptions::describe(OptionVisitor& visitor)
{
    visitor.option("inspect", "file", file, "HDF5 file to look into", OptionRole::operational);
    visitor.option("inspect", "row", row, "print this row of the file (counted from 0)", OptionRole::operational);
    visitor.option("inspect", "verify", verify, "on|off: check every dataset", OptionRole::operational);
    visitor.option("inspect", "digest", digest, "on|off: print the digest of the data and nothing else", OptionRole::operational);
    visitor.option("inspect", "encode", encode, "print the rows as token ids of the tokenizer in this directory, one line of JSON each",
                   OptionRole::operational);
    visitor.option("inspect", "rows", rows, "rows A:B to encode (0-based, B excluded); empty: all", OptionRole::operational);
    encoding.describe_tokens(visitor);
}

void InspectOptions::validate() const
{
    if (file.empty())
        throw usage_error("no file was named (there is nothing to look into). Run selm_inspect FILE.h5");
    if (row < -1)
        throw usage_error(cat("--row ", row, " is negative (rows count from 0). Pass a row of the file"));
    if (row >= 0 && (verify || digest || !encode.empty()))
        throw usage_error("--row goes with neither --verify nor --digest nor --encode. Pass one of them");
    if (digest && !encode.empty())
        throw usage_error("--digest does not go with --encode. Pass one of them");
    if (encode.empty() && !rows.empty())
        throw usage_error("--rows is for --encode DIR (which tokenizer?). Pass it, or --row I to see one row's texts");
    encoding.validate();
}

void run_inspect(const InspectOptions& options, Communicator& comm, std::ostream& out)
{
    options.validate();
    agree(comm, "inspect", [&] {
        if (comm.is_root())
            inspect(options, out);
    });
}

} // namespace selm
