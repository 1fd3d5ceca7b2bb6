#include "late_ranks.hpp"

#include <algorithm>
#include <sstream>

namespace selm::comm {

namespace {

constexpr std::size_t most_named = 8; // of each kind

bool is_missing(const RankState& state)
{
    return state.kind == RankState::Kind::silent || !state.arrived;
}

std::string call_text(std::uint64_t number)
{
    return number == 0 ? std::string() : " (call " + std::to_string(number) + ")";
}

std::string name_of(const RankState& state)
{
    return "rank " + std::to_string(state.rank) + " (host " + state.host + ")";
}

/// "rank 3 (host a) X; rank 5 (host b) X; and 40 more X"
template<typename Text>
void list(std::ostringstream& out, const std::vector<const RankState*>& states, std::string_view rest, Text&& text)
{
    for (std::size_t i = 0; i < std::min(states.size(), most_named); ++i)
        out << (out.tellp() > 0 ? "; " : "") << text(*states[i]);
    if (states.size() > most_named)
        out << "; and " << states.size() - most_named << " more " << rest;
}

std::string missing_text(const std::vector<RankState>& others)
{
    std::vector<const RankState*> silent, working, elsewhere;
    for (const RankState& state : others) {
        if (!is_missing(state))
            continue;
        if (state.kind == RankState::Kind::silent)
            silent.push_back(&state);
        else
            (state.kind == RankState::Kind::working ? working : elsewhere).push_back(&state);
    }
    std::ostringstream out;
    list(out, silent, "have not arrived", [](const RankState& s) { return name_of(s) + " has not arrived and does not answer"; });
    list(out, working, "still work", [](const RankState& s) { return name_of(s) + " has not arrived (it still works)"; });
    list(out, elsewhere, "are in other collectives", [](const RankState& s) {
        return name_of(s) + " is in '" + s.label + "'" + (s.same_group ? call_text(s.number) : " of another group of ranks");
    });
    return out.str();
}

} // namespace

Verdict judge(const std::vector<RankState>& others)
{
    bool missing = false;
    for (const RankState& state : others) {
        if (!is_missing(state))
            continue;
        if (state.kind != RankState::Kind::working)
            return Verdict::late;
        missing = true;
    }
    return missing ? Verdict::alive : Verdict::all_arrived;
}

std::string late_message(std::string_view label, std::uint64_t number, double seconds, const std::vector<RankState>& others)
{
    std::ostringstream out;
    out << "collective '" << label << "'" << call_text(number) << " did not finish within " << seconds << " s: ";
    if (judge(others) == Verdict::all_arrived) {
        out << "all ranks have entered it, but it does not end (the network or the MPI library does not move its data). Look "
               "at the nodes' links and at the MPI library's messages";
    } else {
        out << missing_text(others)
            << " (all other ranks wait for it and the job makes no progress). Look at the log and the node of the first rank "
               "named: stopped or swapping, a file system that hangs, a lost node";
    }
    out << "; where it is only slow, raise --collective-timeout (0: wait for ever)";
    return out.str();
}

} // namespace selm::comm
