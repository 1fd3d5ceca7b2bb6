#include "selm/h5/file.hpp"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include <gtest/gtest.h>

#include "selm/base/files.hpp"
#include "selm/h5/publish.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

/// The error that reading @p path ends in.
Error open_error(const std::string& path)
{
    try {
        (void)h5::File::open(path);
    } catch (const Error& error) {
        return error;
    }
    ADD_FAILURE() << path << " was opened";
    return internal_error("none");
}

class FileTest : public ::testing::Test {
  protected:
    test::TemporaryDirectory directory;
    std::unique_ptr<Communicator> comm = make_single_communicator();
};

TEST_F(FileTest, GivesBackEveryTypeAndAttribute)
{
    const std::string path = directory.path("a.h5");
    {
        h5::File file = h5::File::create(path, *comm);
        file.write_blocks("/g/bytes", std::vector<std::uint8_t>{0, 7, 255});
        file.write_blocks("/g/ints", std::vector<std::int32_t>{-1, 2, 3, 4, 5, 6}, {3});
        file.write_blocks("/g/deep/longs", std::vector<std::int64_t>{std::numeric_limits<std::int64_t>::min()});
        file.write_blocks("/floats", std::vector<float>{0.5F, -0.0F});
        file.write_blocks("/doubles", std::vector<double>{std::numeric_limits<double>::quiet_NaN(), 1e300});
        file.write_blocks("/empty", std::vector<double>{});
        file.set_attribute("/", "text", std::string("größer \n✓"));
        file.set_attribute("/", "nothing", std::string());
        file.set_attribute("/g", "count", std::int64_t{1} << 40);
        file.set_attribute("/floats", "scale", 0.25);
        file.set_attribute("/floats", "scale", 0.125); // replaces
        file.close();
    }
    const h5::File file = h5::File::open(path);
    EXPECT_EQ(file.datasets(), (std::vector<std::string>{"/doubles", "/empty", "/floats", "/g/bytes", "/g/deep/longs", "/g/ints"}));
    EXPECT_EQ(file.children("/g"), (std::vector<std::string>{"bytes", "deep", "ints"}));
    EXPECT_TRUE(file.is_group("/g/deep"));
    EXPECT_FALSE(file.is_group("/floats"));
    EXPECT_FALSE(file.exists("/g/none/at/all"));
    EXPECT_EQ(file.read<std::uint8_t>("/g/bytes"), (std::vector<std::uint8_t>{0, 7, 255}));
    EXPECT_EQ(file.info("/g/ints").shape, (std::vector<std::int64_t>{2, 3}));
    EXPECT_EQ(file.read_rows<std::int32_t>("/g/ints", 1, 1), (std::vector<std::int32_t>{4, 5, 6}));
    EXPECT_EQ(file.read<std::int64_t>("/g/deep/longs").front(), std::numeric_limits<std::int64_t>::min());
    EXPECT_TRUE(std::signbit(file.read<float>("/floats")[1]));
    EXPECT_TRUE(std::isnan(file.read<double>("/doubles")[0]));
    EXPECT_TRUE(file.read<double>("/empty").empty());
    EXPECT_EQ(file.string_attribute("/", "text"), "größer \n✓");
    EXPECT_EQ(file.string_attribute("/", "nothing"), "");
    EXPECT_EQ(file.int_attribute("/g", "count"), std::int64_t{1} << 40);
    EXPECT_EQ(file.double_attribute("/floats", "scale"), 0.125);
    EXPECT_EQ(file.attributes("/").size(), 2U);
    EXPECT_FALSE(file.attribute("/", "absent"));
}

TEST_F(FileTest, RefusesAnotherTypeAndRowsThatDoNotExist)
{
    const std::string path = directory.path("a.h5");
    {
        h5::File file = h5::File::create(path, *comm);
        file.write_blocks("/a", std::vector<float>{1, 2, 3});
        file.close();
    }
    const h5::File file = h5::File::open(path);
    EXPECT_THROW(file.read<double>("/a"), Error);
    EXPECT_THROW(file.read_rows<float>("/a", 1, 3), Error);
    EXPECT_THROW(file.read_rows<float>("/a", -1, 1), Error);
    EXPECT_THROW(file.read<float>("/b"), Error);
    EXPECT_THROW(file.read<float>("/a/b"), Error);
    EXPECT_THROW(file.string_attribute("/", "format"), Error);
    try {
        (void)file.read<double>("/a");
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_NE(std::string(error.what()).find("/a holds float32, not float64"), std::string::npos) << error.what();
        EXPECT_NE(std::string(error.what()).find(path), std::string::npos);
    }
}

TEST_F(FileTest, SaysWhyAFileCannotBeRead)
{
    const auto expect = [](const Error& error, const std::string& words) {
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    };
    expect(open_error(directory.path("none.h5")), "does not exist");
    expect(open_error(directory.path("")), "is a directory");
    expect(open_error(directory.write("empty.h5", "")), "is empty");
    expect(open_error(directory.write("text.h5", "hello, I am no HDF5 file\n")), "is not an HDF5 file");

    const std::string whole = directory.path("whole.h5");
    {
        h5::File file = h5::File::create(whole, *comm);
        file.write_blocks("/a", std::vector<double>(10000, 1.0));
        file.close();
    }
    const std::string content = read_file(whole);
    expect(open_error(directory.write("cut.h5", content.substr(0, content.size() / 2))), "is truncated");
    std::string broken = content;
    for (std::size_t i = 12; i < 60; ++i)
        broken[i] = static_cast<char>(~broken[i]); // within the superblock
    expect(open_error(directory.write("broken.h5", broken)), "cannot be opened");
}

TEST_F(FileTest, CreationSaysWhatIsInTheWay)
{
    try {
        (void)h5::File::create(directory.path("no/such/directory/a.h5"), *comm);
        FAIL() << "created";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::io);
        EXPECT_NE(std::string(error.what()).find("No such file or directory"), std::string::npos) << error.what();
    }
}

TEST_F(FileTest, TextsAreABlobAndOffsets)
{
    const std::string path = directory.path("a.h5");
    {
        h5::File file = h5::File::create(path, *comm);
        file.write_texts("/t/text", std::vector<std::string>{"ab", "", "çd"});
        file.write_texts("/none/text", std::vector<std::string>{});
        file.close();
    }
    const h5::File file = h5::File::open(path);
    EXPECT_EQ(file.read_text("/t/text", 0, 5), "abçd");
    EXPECT_EQ(file.read<std::int64_t>("/t/text_offsets"), (std::vector<std::int64_t>{0, 2, 2, 5}));
    EXPECT_EQ(file.read<std::int64_t>("/none/text_offsets"), (std::vector<std::int64_t>{0}));
    EXPECT_THROW(file.read_text("/t/text", 3, 3), Error);
}

TEST_F(FileTest, CopiesATreeWithTypesAndAttributes)
{
    const std::string from = directory.path("from.h5");
    const std::string to = directory.path("to.h5");
    {
        h5::File file = h5::File::create(from, *comm);
        file.write_blocks("/a/x", std::vector<std::int32_t>{1, 2, 3, 4}, {2});
        file.write_blocks("/a/empty", std::vector<float>{});
        file.write_blocks("/a/y/z", std::vector<std::uint8_t>{9});
        file.write_blocks("/b", std::vector<double>{0.5});
        file.set_attribute("/", "title", std::string("t"));
        file.set_attribute("/a/x", "unit", std::string("s"));
        file.create_group("/a/hollow");
        file.close();
        const h5::File source = h5::File::open(from);
        h5::File target = h5::File::create(to, *comm);
        target.copy_tree(source, "/", {"/a/y"});
        target.close();
    }
    const h5::File file = h5::File::open(to);
    EXPECT_EQ(file.datasets(), (std::vector<std::string>{"/a/empty", "/a/x", "/b"}));
    EXPECT_EQ(file.info("/a/x").type, h5::ElementType::int32);
    EXPECT_EQ(file.info("/a/x").shape, (std::vector<std::int64_t>{2, 2}));
    EXPECT_EQ(file.read<std::int32_t>("/a/x"), (std::vector<std::int32_t>{1, 2, 3, 4}));
    EXPECT_EQ(file.read<double>("/b"), (std::vector<double>{0.5}));
    EXPECT_EQ(file.string_attribute("/", "title"), "t");
    EXPECT_EQ(file.string_attribute("/a/x", "unit"), "s");
    EXPECT_TRUE(file.is_group("/a/hollow"));
}

TEST_F(FileTest, PublishingIsAllOrNothing)
{
    const std::string path = directory.path("a.h5");
    h5::write_and_publish(path, *comm, [](h5::File& file) { file.write_blocks("/a", std::vector<double>{1}); });
    EXPECT_EQ(h5::File::open(path).read<double>("/a").front(), 1);
    EXPECT_THROW(h5::write_and_publish(path, *comm, [](h5::File& file) {
        file.write_blocks("/a", std::vector<double>{2});
        throw data_error("no");
    }), Error);
    EXPECT_EQ(h5::File::open(path).read<double>("/a").front(), 1);
    std::size_t files = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory.path("")))
        ++files;
    EXPECT_EQ(files, 1U) << "a partial file was left";
}

} // namespace
} // namespace selm
