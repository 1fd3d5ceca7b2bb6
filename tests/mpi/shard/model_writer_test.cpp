#include "selm/shard/model_writer.hpp"

#include <csignal>
#include <filesystem>
#include <map>
#include <optional>

#include <gtest/gtest.h>
#include <sys/resource.h>

#include "mpi_test.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/rng.hpp"
#include "selm/model/model_files.hpp"
#include "shared_directory.hpp"

namespace selm {
namespace {

namespace fs = std::filesystem;
using test::test_world;

DecoderConfig odd_config()
{
    DecoderConfig config;
    config.model_type = "llama";
    config.vocabulary = 301;
    config.hidden = 36;
    config.intermediate = 52;
    config.layers = 2;
    config.heads = 3;
    config.kv_heads = 1;
    config.head_dim = 12;
    config.tied_embeddings = false;
    return config;
}

float value(std::size_t parameter, std::size_t element)
{
    return static_cast<float>(RandomStream(3, parameter, 0, element).next_normal());
}

/// All files of a directory, by name.
std::map<std::string, std::string> contents(const std::string& directory)
{
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::directory_iterator(directory))
        files[entry.path().filename().string()] = read_file(entry.path().string());
    return files;
}

struct Case {
    DType dtype;
    std::int64_t max_shard_bytes;
};

class ModelWriter : public ::testing::TestWithParam<Case> {
  protected:
    void SetUp() override
    {
        const auto specs = decoder_parameters(config);
        for (std::size_t p = 0; p < specs.size(); ++p) {
            auto& values = parameters.emplace_back(static_cast<std::size_t>(specs[p].elements()));
            for (std::size_t i = 0; i < values.size(); ++i)
                values[i] = value(p, i);
        }
    }

    /// What one process writes.
    void write_alone(const std::string& to, const Case& c) const
    {
        const auto read = [&](std::int64_t parameter, std::int64_t begin, std::span<float> out) {
            const auto& from = parameters[static_cast<std::size_t>(parameter)];
            std::copy_n(from.begin() + begin, out.size(), out.begin());
        };
        write_model_weights(to, config, ParameterReader(read), c.dtype, c.max_shard_bytes);
    }

    /// This rank's elements of every tensor: pieces of odd sizes, dealt to the ranks in turn, the last tensors first.
    void write_own(SafetensorsWriter& writer) const
    {
        constexpr std::int64_t piece = 1237;
        const auto specs = decoder_parameters(config);
        std::int64_t turn = 0;
        for (std::size_t p = specs.size(); p-- > 0;) {
            for (const ParameterSpec::Part& part : specs[p].parts) {
                const std::int64_t first = part.row_begin * specs[p].columns;
                const std::int64_t count = part.rows * specs[p].columns;
                for (std::int64_t begin = 0; begin < count; begin += piece) {
                    if (turn++ % test_world().size() != test_world().rank())
                        continue;
                    const auto values = std::span(parameters[p]).subspan(static_cast<std::size_t>(first + begin));
                    writer.write(part.name, begin, values.first(static_cast<std::size_t>(std::min(piece, count - begin))));
                }
            }
        }
    }

    std::string make_directory(const test::SharedDirectory& parent, const std::string& name) const
    {
        if (test_world().is_root())
            fs::create_directories(parent.path(name));
        test_world().barrier("directory");
        return parent.path(name);
    }

    const DecoderConfig config = odd_config();
    std::vector<std::vector<float>> parameters;
};

TEST_P(ModelWriter, FilesOfAllRanksAreByteEqualToThoseOfOneProcess)
{
    const Case c = GetParam();
    const test::SharedDirectory directory(test_world());
    const std::string one = make_directory(directory, "one");
    const std::string all = make_directory(directory, "all");
    if (test_world().is_root()) {
        write_alone(one, c);
        write_alone(all, {DType::f32, 9000}); // an earlier model in other files
    }
    test_world().barrier("the model of one process");
    SafetensorsWriter writer(all, model_tensors(config), c.dtype, "attempt", c.max_shard_bytes);
    write_model_collectively(writer, test_world(), [&] { write_own(writer); });
    const auto expected = contents(one);
    const auto found = contents(all);
    EXPECT_EQ(expected.size(), c.max_shard_bytes > 1'000'000 ? 1U : found.size());
    ASSERT_GE(found.size(), 1U);
    EXPECT_EQ(found.size() > 1, found.contains("model.safetensors.index.json"));
    EXPECT_TRUE(found == expected);
    test_world().barrier("compared");
}

TEST_P(ModelWriter, AFullDiskOnOneRankIsAnIoErrorOnAllAndLeavesNothing)
{
    const Case c = GetParam();
    const test::SharedDirectory directory(test_world());
    const std::string all = make_directory(directory, "all");
    const bool last = test_world().rank() == test_world().size() - 1;
    SafetensorsWriter writer(all, model_tensors(config), c.dtype, "attempt", c.max_shard_bytes);
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    std::optional<Error> error;
    try {
        write_model_collectively(writer, test_world(), [&] {
            if (last) {
                rlimit limit = before;
                limit.rlim_cur = 4096;
                ::setrlimit(RLIMIT_FSIZE, &limit);
            }
            write_own(writer);
        });
    } catch (const Error& caught) {
        error.emplace(caught);
    }
    ::setrlimit(RLIMIT_FSIZE, &before);
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code(), ExitCode::io);
    EXPECT_NE(std::string(error->what()).find(all + "/model"), std::string::npos) << error->what();
    test_world().barrier("rank 0 has tidied up");
    EXPECT_TRUE(fs::is_empty(all));
    test_world().barrier("looked");
}

TEST_P(ModelWriter, ADiskThatIsTooSmallIsHeardOfBeforeAnythingIsWritten)
{
    const Case c = GetParam();
    const test::SharedDirectory directory(test_world());
    const std::string all = make_directory(directory, "all");
    SafetensorsWriter writer(all, model_tensors(config), c.dtype, "attempt", c.max_shard_bytes);
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    if (test_world().is_root()) {
        rlimit limit = before;
        limit.rlim_cur = 4096;
        ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    bool wrote = false;
    EXPECT_THROW(write_model_collectively(writer, test_world(), [&] { wrote = true; }), Error);
    ::setrlimit(RLIMIT_FSIZE, &before);
    EXPECT_FALSE(wrote);
    test_world().barrier("rank 0 has tidied up");
    EXPECT_TRUE(fs::is_empty(all));
    test_world().barrier("looked");
}

TEST_P(ModelWriter, AnElementThatNobodyWritesIsNoticed)
{
    const Case c = GetParam();
    const test::SharedDirectory directory(test_world());
    const std::string all = make_directory(directory, "all");
    SafetensorsWriter writer(all, model_tensors(config), c.dtype, "attempt", c.max_shard_bytes);
    const auto all_but_one = [&] {
        if (test_world().rank() != 0)
            return;
        for (const SafetensorSpec& tensor : model_tensors(config)) {
            std::int64_t elements = 1;
            for (const std::int64_t extent : tensor.shape)
                elements *= extent;
            writer.write(tensor.name, 0,
                         std::vector<float>(static_cast<std::size_t>(elements - (tensor.name == "lm_head.weight" ? 1 : 0))));
        }
    };
    EXPECT_THROW(write_model_collectively(writer, test_world(), all_but_one), Error);
    test_world().barrier("rank 0 has tidied up");
    EXPECT_TRUE(fs::is_empty(all));
    test_world().barrier("looked");
}

INSTANTIATE_TEST_SUITE_P(Files, ModelWriter,
                         ::testing::Values(Case{DType::f32, 5'000'000'000}, Case{DType::bf16, 5'000'000'000},
                                           Case{DType::f32, 20'000}, Case{DType::bf16, 20'000}));

} // namespace
} // namespace selm
