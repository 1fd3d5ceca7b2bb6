#include "inspect_encoding.hpp"

#include <functional>
#include <ostream>

#include <nlohmann/json.hpp>

#include "packed_rows.hpp"
#include "reward_objective.hpp"
#include "selm/base/error.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"

namespace selm {

namespace {

using nlohmann::ordered_json;

ordered_json to_json(const LabelledSequence& sequence, const Tokenizer& tokenizer)
{
    ordered_json pieces = ordered_json::array();
    for (const std::int32_t id : sequence.ids)
        pieces.push_back(tokenizer.token_text(id).value_or(""));
    return {{"ids", sequence.ids}, {"label_start", sequence.label_start}, {"pieces", std::move(pieces)}};
}

/// Lines of rows [begin, end): `sequences` by Candidate, `chosen` and `rejected` which of them go by these names.
struct RowSource {
    std::int64_t rows = 0;
    std::function<RowPair(std::int64_t)> pair;
    std::function<SequenceRow(std::int64_t, const RowPair&)> sequences;
};

void print_rows(const RowSource& source, const InspectOptions& options, const Tokenizer& tokenizer, std::ostream& out)
{
    const RowRange range = RowRange::parse(options.rows, source.rows);
    for (std::int64_t row = range.begin; row < range.end; ++row) {
        const RowPair pair = source.pair(row);
        const SequenceRow sequences = source.sequences(row, pair);
        ordered_json line{{"row", row},
                          {"chosen", to_json(*sequences[static_cast<std::size_t>(pair.best)], tokenizer)},
                          {"rejected", to_json(*sequences[static_cast<std::size_t>(pair.worst)], tokenizer)}};
        if (pair.generated)
            line["generated"] = to_json(*sequences[static_cast<std::size_t>(Candidate::generated)], tokenizer);
        out << line.dump() << "\n";
    }
}

} // namespace

void print_encoded_rows(const InspectOptions& options, std::ostream& out)
{
    const std::string format = format_of(options.file);
    const RowEncoder encoder(options.encode, options.encoding);
    if (format == preferences_format) {
        const PreferencesReader reader(options.file);
        print_rows({.rows = reader.rows(),
                    .pair = [](std::int64_t) { return RowPair{}; },
                    .sequences = [&](std::int64_t row, const RowPair&) { return encoder.sequences(reader.row(row)); }},
                   options, encoder.tokenizer(), out);
        return;
    }
    SELM_VALIDATE(format == iteration_format, ExitCode::bad_data,
                  options.file << " has no rows (it is "
                               << (format.empty() ? "not a file that SELM wrote" : "a " + format + " file")
                               << "). Pass a prefs.h5 or an iter.h5 with --encode");
    const IterationReader reader(options.file);
    const IterationReader::Pairs pairs = reader.pairs();
    SELM_VALIDATE(pairs.update_rule != "none", ExitCode::bad_data,
                  options.file << " holds held-out answers (there are no pairs to encode). Pass ranked training rows");
    print_rows({.rows = reader.rows(),
                .pair =
                    [&](std::int64_t row) {
                        const auto i = static_cast<std::size_t>(row);
                        return RowPair{pairs.best[i], pairs.worst[i], reader.has_generated(row)};
                    },
                .sequences =
                    [&](std::int64_t row, const RowPair& pair) { return encoder.sequences(reader, row, pair); }},
               options, encoder.tokenizer(), out);
}

} // namespace selm
