#include <gtest/gtest.h>

#include "selm/text/utf8.hpp"

namespace selm {
namespace {

TEST(Utf8, WellFormedTextsAreAccepted)
{
    using namespace std::string_view_literals;
    for (const std::string_view text :
         {""sv, "a\0b"sv, "\x7f"sv, "\xC2\x80"sv, "\xDF\xBF"sv, "\xE0\xA0\x80"sv, "\xED\x9F\xBF"sv, "\xEE\x80\x80"sv,
          "\xEF\xBF\xBF"sv, "\xF0\x90\x80\x80"sv, "\xF4\x8F\xBF\xBF"sv})
        EXPECT_EQ(find_invalid_utf8(text), std::nullopt);
}

TEST(Utf8, FirstBadByteIsFound)
{
    const std::pair<std::string, std::size_t> cases[] = {
        {"\x80", 0},
        {"ab\xFF", 2},
        {"\xC0\xAF", 0},
        {"\xC1\xBF", 0},
        {"x\xC3", 1},
        {"\xC3(", 0},
        {"\xE0\x9F\xBF", 0},
        {"\xED\xA0\x80", 0},
        {"\xE2\x82", 0},
        {"\xF0\x8F\xBF\xBF", 0},
        {"\xF4\x90\x80\x80", 0},
        {"\xF5\x80\x80\x80", 0},
        {"\xC3\xA9\xE2", 2},
        {"\xF0\x9F\x98", 0},
    };
    for (const auto& [text, offset] : cases)
        EXPECT_EQ(find_invalid_utf8(text), offset) << text;
}

/// Unicode 15, section 3.9, table 3-8: U+FFFD for each maximal subpart.
TEST(Utf8, EachMaximalSubpartIsReplacedOnce)
{
    EXPECT_EQ(replace_invalid_utf8("\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64"),
              "a\uFFFD\uFFFD\uFFFDb\uFFFDc\uFFFD\uFFFDd");
    EXPECT_EQ(replace_invalid_utf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
    EXPECT_EQ(replace_invalid_utf8("fine \u00e9"), "fine \u00e9");
}

TEST(Utf8, StripRemovesUnicodeWhitespaceAtTheEndsAlone)
{
    EXPECT_EQ(strip_whitespace(" \t\r\n a b \x1f\u0085\u00a0\u3000"), "a b");
    EXPECT_EQ(strip_whitespace("\u2003\u2028"), "");
    EXPECT_EQ(strip_whitespace(""), "");
    EXPECT_EQ(strip_whitespace("\u200b x"), "\u200b x"); // ZERO WIDTH SPACE is no whitespace
    EXPECT_EQ(strip_whitespace(" \u00e9 "), "\u00e9");
    EXPECT_EQ(strip_whitespace("\x85 \xE3\x80"), "\x85 \xE3\x80"); // bytes that are no UTF-8 stay
}

TEST(Utf8, CodePointsGoThereAndBack)
{
    for (const char32_t c : {U'\0', U'a', U'\u0080', U'\u07ff', U'\u0800', U'\uffff', U'\U00010000', U'\U0010ffff'}) {
        std::string text;
        append_utf8(text, c);
        ASSERT_EQ(find_invalid_utf8(text), std::nullopt);
        std::size_t position = 0;
        EXPECT_EQ(next_code_point(text, position), c);
        EXPECT_EQ(position, text.size());
    }
}

} // namespace
} // namespace selm
