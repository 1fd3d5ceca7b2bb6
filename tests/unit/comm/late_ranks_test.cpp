#include "late_ranks.hpp"

#include <gtest/gtest.h>

#include "selm/base/error.hpp"

namespace selm::comm {
namespace {

using Kind = RankState::Kind;

RankState state(int rank, Kind kind, bool arrived = false, std::string label = {}, std::uint64_t number = 0, bool same_group = false)
{
    return {rank, cat("n", rank / 4), kind, arrived, std::move(label), number, same_group};
}

TEST(LateRanks, Verdicts)
{
    const RankState here = state(1, Kind::waiting, true, "sum", 7, true);
    EXPECT_EQ(judge({here, here}), Verdict::all_arrived);
    EXPECT_EQ(judge({here, state(2, Kind::working, true)}), Verdict::all_arrived) << "it has started it and works on";
    EXPECT_EQ(judge({here, state(2, Kind::working)}), Verdict::alive);
    EXPECT_EQ(judge({here, state(2, Kind::silent)}), Verdict::late);
    EXPECT_EQ(judge({here, state(2, Kind::working), state(3, Kind::waiting, false, "gather", 6, true)}), Verdict::late);
}

TEST(LateRanks, TheMessageNamesCollectiveRankHostAndRemedy)
{
    const std::string text = late_message("gradients", 42, 1800,
                                          {state(1, Kind::waiting, true, "gradients", 42, true), state(5, Kind::silent)});
    EXPECT_EQ(text.find("collective 'gradients' (call 42) did not finish within 1800 s: rank 5 (host n1) has not arrived"), 0U) << text;
    EXPECT_EQ(text.find("rank 1 "), std::string::npos) << "ranks that wait for it are not named";
    EXPECT_NE(text.find("--collective-timeout"), std::string::npos);
}

TEST(LateRanks, RanksElsewhereAreNamedWithTheirCollective)
{
    const std::string text = late_message("gradients", 0, 2,
                                          {state(2, Kind::waiting, false, "other", 41, true), state(3, Kind::waiting, false, "node", 3),
                                           state(4, Kind::working)});
    EXPECT_EQ(text.find("collective 'gradients' did not finish"), 0U) << "no number where the call is not counted: " << text;
    EXPECT_NE(text.find("rank 2 (host n0) is in 'other' (call 41)"), std::string::npos) << text;
    EXPECT_NE(text.find("rank 3 (host n0) is in 'node' of another group of ranks"), std::string::npos) << text;
    EXPECT_NE(text.find("rank 4 (host n1) has not arrived (it still works)"), std::string::npos) << text;
}

TEST(LateRanks, ThousandsOfLateRanksMakeOneShortMessage)
{
    std::vector<RankState> others;
    for (int r = 1; r < 4096; ++r)
        others.push_back(state(r, Kind::silent));
    const std::string text = late_message("gradients", 42, 1800, others);
    EXPECT_NE(text.find("rank 8 (host n2)"), std::string::npos);
    EXPECT_EQ(text.find("rank 9 "), std::string::npos);
    EXPECT_NE(text.find("and 4087 more have not arrived"), std::string::npos) << text;
    EXPECT_LT(text.size(), 1500U);
}

TEST(LateRanks, NobodyMissing)
{
    const std::string text = late_message("gradients", 42, 1800, {state(1, Kind::waiting, true, "gradients", 42, true)});
    EXPECT_NE(text.find("all ranks have entered it"), std::string::npos) << text;
}

} // namespace
} // namespace selm::comm
