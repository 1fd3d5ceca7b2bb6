// Damaged and foreign files: each is one error that names the file and what is wrong.

#include <gtest/gtest.h>

#include "preference_rows.hpp"
#include "selm/base/files.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/journal.hpp"
#include "selm/h5/publish.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

class DataTest : public ::testing::Test {
  protected:
    std::string preferences(const std::string& name, std::int64_t n = 4)
    {
        write_preferences(directory.path(name), test::preference_rows(n), {}, *comm);
        return directory.path(name);
    }

    /// A copy of @p path in which @p change replaces the datasets named in @p except.
    std::string damaged(const std::string& path, const std::vector<std::string>& except, const std::function<void(h5::File&)>& change)
    {
        const std::string copy = directory.path("damaged.h5");
        const h5::File source = h5::File::open(path);
        h5::write_and_publish(copy, *comm, [&](h5::File& file) {
            file.copy_tree(source, "/", except);
            change(file);
        });
        return copy;
    }

    static std::string error_of(const std::string& path)
    {
        try {
            const PreferencesReader reader(path);
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_data);
            EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
            return error.what();
        }
        return "no error";
    }

    static void expect(const std::string& message, const std::string& words)
    {
        EXPECT_NE(message.find(words), std::string::npos) << message;
    }

    test::TemporaryDirectory directory;
    std::unique_ptr<Communicator> comm = make_single_communicator();
};

TEST_F(DataTest, AnotherKindOrVersionIsRefused)
{
    const std::string path = preferences("a.h5");
    EXPECT_EQ(format_of(path), "selm-prefs");
    EXPECT_EQ(error_of(path), "no error");
    try {
        const IterationReader reader(path);
        FAIL();
    } catch (const Error& error) {
        expect(error.what(), "is a selm-prefs file (a selm-iteration file was expected)");
    }
    expect(error_of(damaged(path, {}, [](h5::File& file) { file.set_attribute("/", "format_version", std::int64_t{99}); })),
           "has format version 99 (this program reads version 1)");
    const std::string bare = directory.path("bare.h5");
    h5::write_and_publish(bare, *comm, [](h5::File& file) { file.create_group("/a"); });
    expect(error_of(bare), "has no format attribute");
    EXPECT_EQ(format_of(bare), "");
}

TEST_F(DataTest, InconsistentDatasetsAreFound)
{
    const std::string path = preferences("a.h5");
    expect(error_of(damaged(path, {"/scores"}, [](h5::File&) {})), "has no dataset /scores");
    expect(error_of(damaged(path, {"/scores"}, [](h5::File& file) { file.write_blocks("/scores", std::vector<float>(8), {2}); })),
           "/scores holds float32, not float64");
    expect(error_of(damaged(path, {"/prompts/text_offsets"}, [](h5::File& file) {
        file.write_blocks("/prompts/text_offsets", std::vector<std::int64_t>{0, 5, 4, 6, 14});
    })), "/prompts/text_offsets falls at entry 2");
    expect(error_of(damaged(path, {"/prompts/text_offsets"}, [](h5::File& file) {
        file.write_blocks("/prompts/text_offsets", std::vector<std::int64_t>{0, 1, 2, 3, 4});
    })), "/prompts/text_offsets ends at 4 where 14 elements are stored");
    expect(error_of(damaged(path, {"/prompts/text_offsets"}, [](h5::File& file) {
        file.write_blocks("/prompts/text_offsets", std::vector<std::int64_t>{});
    })), "/prompts/text_offsets does not start at 0");
    expect(error_of(damaged(path, {"/prompts/row"}, [](h5::File& file) { file.write_blocks("/prompts/row", std::vector<std::int64_t>{0, 1, 2}); })),
           "/prompts/row has 3 entries (4 were expected");
    expect(error_of(damaged(path, {"/prompts/messages/role"}, [](h5::File& file) {
        file.write_blocks("/prompts/messages/role", std::vector<std::uint8_t>{1, 1, 1, 1, 1, 1, 1, 9});
    })), "/prompts/messages/role holds 9");
}

TEST_F(DataTest, DigestSeesEveryByteButNoAttributeAndNoLayout)
{
    const std::string path = preferences("a.h5");
    const std::string digest = data_digest(path);
    EXPECT_EQ(digest.size(), 32U);
    EXPECT_EQ(data_digest(damaged(path, {}, [](h5::File& file) { file.set_attribute("/", "x", 1.0); })), digest);
    EXPECT_EQ(data_digest(damaged(path, {}, [](h5::File& file) { file.write_blocks("/timing/a", std::vector<double>{1}); })), digest);
    EXPECT_EQ(data_digest(damaged(path, {}, [](h5::File& file) { file.write_blocks("/provenance/a", std::vector<double>{1}); })), digest);
    EXPECT_NE(data_digest(damaged(path, {}, [](h5::File& file) { file.write_blocks("/timings", std::vector<double>{1}); })), digest);
    auto rows = test::preference_rows(4);
    rows[3].rejected.back() = 'X';
    write_preferences(directory.path("b.h5"), rows, {}, *comm);
    EXPECT_NE(data_digest(directory.path("b.h5")), digest);
    // The same bytes in another shape are other data.
    const auto shaped = [&](const char* name, const std::vector<std::int64_t>& row_shape) {
        h5::write_and_publish(directory.path(name), *comm, [&](h5::File& file) { file.write_blocks("/a", std::vector<double>(6), row_shape); });
        return data_digest(directory.path(name));
    };
    EXPECT_NE(shaped("c.h5", {2}), shaped("d.h5", {3}));
}

TEST_F(DataTest, PairsDigestBindsPairsAndTexts)
{
    const PreferencesReader prefs(preferences("a.h5"));
    const auto make = [&](const std::string& text, std::int32_t best) {
        const std::string path = directory.path("iter.h5");
        write_iteration(path, prefs, {0}, {{.row = 0, .text = text, .tokens = {}, .logprobs = {}, .finish_reason = FinishReason::elsewhere}}, {}, {}, *comm);
        update_iteration(path, *comm, {}, [&](h5::File& file) {
            write_ranking(file, 1, {{.position = 0, .scores = {1, 2, 3}, .ranks = {3, 2, 1}, .best = best, .worst = 0, .rankers = {}}},
                          {.rankers = {}, .update_rule = "best-worst", .attributes = {}}, *comm);
        });
        return IterationReader(path).pairs_digest();
    };
    const std::string digest = make("text", 2);
    EXPECT_EQ(make("text", 2), digest);
    EXPECT_NE(make("texT", 2), digest);
    EXPECT_NE(make("text", 1), digest);
}

TEST_F(DataTest, TruncatedFileIsAnError)
{
    const std::string path = preferences("a.h5", 40);
    const std::string content = read_file(path);
    expect(error_of(directory.write("cut.h5", content.substr(0, content.size() - 100))), "is truncated");
}

TEST(Payload, ReadsBackAndRefusesTooShortOnes)
{
    PayloadWriter out;
    out.value(std::int32_t{7});
    out.array(std::span<const float>(std::vector<float>{1, 2}));
    out.text("abc");
    const std::vector<std::byte> bytes = out.bytes();
    PayloadReader in(bytes);
    EXPECT_EQ(in.value<std::int32_t>(), 7);
    EXPECT_EQ(in.array<float>(), (std::vector<float>{1, 2}));
    EXPECT_EQ(in.text(), "abc");
    EXPECT_TRUE(in.at_end());
    for (std::size_t size = 0; size < bytes.size(); ++size) {
        PayloadReader cut(std::span<const std::byte>(bytes).first(size));
        EXPECT_THROW((cut.value<std::int32_t>(), cut.array<float>(), cut.text()), Error) << size;
    }
}

} // namespace
} // namespace selm
