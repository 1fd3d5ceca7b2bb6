#include "selm/model/safetensors.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/model/model_files.hpp"
#include "temporary_directory.hpp"
#include "tiny_model.hpp"

namespace selm {
namespace {

using test::TemporaryDirectory;
namespace fs = std::filesystem;

std::string safetensors_bytes(const std::string& header, const std::string& data)
{
    std::string bytes(8, '\0');
    for (std::size_t i = 0; i < 8; ++i)
        bytes[i] = static_cast<char>(header.size() >> (8 * i) & 0xFF);
    return bytes + header + data;
}

/// The exit code and message that opening (and, when given, reading) ends in.
Error failure_of(const std::function<void()>& body)
{
    try {
        body();
    } catch (const Error& error) {
        return error;
    }
    return {ExitCode::done, "no error"};
}

SafetensorSource source(const std::string& name, const std::vector<std::int64_t>& shape, const std::vector<float>& values)
{
    return {name, shape, [values](std::int64_t begin, std::span<float> out) {
                std::copy_n(values.begin() + begin, out.size(), out.begin());
            }};
}

std::vector<float> numbers(std::size_t count)
{
    std::vector<float> values(count);
    for (std::size_t i = 0; i < count; ++i)
        values[i] = std::sin(static_cast<float>(i)) * 3;
    return values;
}

std::vector<SafetensorSource> three_tensors()
{
    return {source("b", {4, 5}, numbers(20)), source("a", {7}, numbers(7)), source("c", {2, 3, 2}, numbers(12))};
}

TEST(Safetensors, TensorsThatTheDecoderDoesNotUseAreNamed)
{
    const DecoderConfig config = test::tiny_config(true);
    const test::TinyParameters parameters(config);
    const TemporaryDirectory temporary;
    const std::string directory = temporary.path(".");
    write_model_weights(directory, config, parameters.tensors, DType::f32);
    check_model_tensors(SafetensorsReader(directory), config, directory);

    std::vector<SafetensorSource> tensors;
    for (const ParameterSpec& spec : decoder_parameters(config))
        for (const ParameterSpec::Part& part : spec.parts)
            tensors.push_back(source(part.name, part.shape, numbers(static_cast<std::size_t>(part.rows * spec.columns))));
    tensors.push_back(source("lm_head.weight", {config.vocabulary, config.hidden},
                             numbers(static_cast<std::size_t>(config.vocabulary * config.hidden))));
    tensors.push_back(source("model.layers.1.self_attn.rotary_emb.inv_freq", {3}, numbers(3)));
    write_safetensors(directory, tensors, DType::f32);
    check_model_tensors(SafetensorsReader(directory), config, directory);

    for (const std::string name : {"model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"}) {
        auto with_another = tensors;
        with_another.push_back(source(name, {2}, numbers(2)));
        write_safetensors(directory, with_another, DType::f32);
        const SafetensorsReader reader(directory);
        const Error error = failure_of([&] { check_model_tensors(reader, config, directory); });
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
}

TEST(Safetensors, F32RoundTripIsExact)
{
    const TemporaryDirectory directory;
    write_safetensors(directory.path(""), three_tensors(), DType::f32);
    const SafetensorsReader reader(directory.path(""));
    EXPECT_EQ(reader.tensors().size(), 3U);
    EXPECT_EQ(reader.tensors().at("c").shape, (std::vector<std::int64_t>{2, 3, 2}));
    std::vector<float> out(20);
    reader.read_f32("b", {4, 5}, 0, out);
    EXPECT_EQ(out, numbers(20));
    reader.read_f32("b", {4, 5}, 13, std::span(out).first(4));
    EXPECT_EQ(out[3], numbers(20)[16]);
}

TEST(Safetensors, ATensorIsSeenWhereItLiesInTheFile)
{
    for (const DType dtype : {DType::f32, DType::bf16}) {
        const TemporaryDirectory directory;
        write_safetensors(directory.path(""), three_tensors(), dtype);
        const SafetensorsReader reader(directory.path(""));
        const Tensor b = reader.view("b", {4, 5});
        ASSERT_FALSE(b.empty());
        EXPECT_EQ(b.dtype, dtype);
        EXPECT_EQ(b.rows, 4);
        EXPECT_EQ(b.stride, 5);
        std::vector<float> read(20);
        reader.read_f32("b", {4, 5}, 0, read);
        EXPECT_EQ(dtype == DType::f32 ? b.row_f32(2)[3] : bf16_to_float(b.bf16()[13]), read[13]);
        EXPECT_EQ(reader.view("a", {7}).columns, 7);
        EXPECT_EQ(failure_of([&] { reader.view("b", {5, 4}); }).code(), ExitCode::bad_data);
        EXPECT_EQ(failure_of([&] { reader.view("d", {1}); }).code(), ExitCode::bad_data);
    }
    const TemporaryDirectory directory; // one byte of padding too few, and a type that must be converted
    std::string odd = R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F16","shape":[1],"data_offsets":[4,6]}})";
    odd.resize(odd.size() / 8 * 8 + 9, ' ');
    directory.write("model.safetensors", safetensors_bytes(odd, std::string(6, '\1')));
    const SafetensorsReader reader(directory.path(""));
    EXPECT_TRUE(reader.view("x", {1}).empty());
    EXPECT_TRUE(reader.view("y", {1}).empty());
}

TEST(Safetensors, Bf16IsRoundedToNearestEven)
{
    const TemporaryDirectory directory;
    const std::vector<float> values = {1.0F, 1.00390625F, 1.01171875F, -3.1415927F, 0.0F,
                                       std::numeric_limits<float>::infinity()};
    write_safetensors(directory.path(""), {source("w", {6}, values)}, DType::bf16);
    const SafetensorsReader reader(directory.path(""));
    EXPECT_EQ(reader.tensors().at("w").dtype, "BF16");
    std::vector<float> out(6);
    reader.read_f32("w", {6}, 0, out);
    EXPECT_EQ(out, (std::vector<float>{1.0F, 1.0F, 1.015625F, -3.140625F, 0.0F, std::numeric_limits<float>::infinity()}));
}

TEST(Safetensors, LargeTensorsAreWrittenInBlocks)
{
    const TemporaryDirectory directory;
    const std::int64_t elements = (std::int64_t{1} << 20) + 12345;
    std::size_t largest = 0;
    const auto read = [&](std::int64_t begin, std::span<float> out) {
        largest = std::max(largest, out.size());
        for (std::size_t i = 0; i < out.size(); ++i)
            out[i] = static_cast<float>(begin + static_cast<std::int64_t>(i));
    };
    write_safetensors(directory.path(""), {{"w", {elements}, read}}, DType::f32);
    EXPECT_LE(largest, std::size_t{1} << 20);
    std::vector<float> out(2);
    SafetensorsReader(directory.path("")).read_f32("w", {elements}, elements - 2, out);
    EXPECT_EQ(out[1], static_cast<float>(elements - 1));
}

TEST(Safetensors, F16IsWidenedExactly)
{
    const TemporaryDirectory directory;
    const std::vector<std::uint16_t> halves = {0x3C00, 0xC000, 0x0001, 0x7BFF, 0x8000, 0x7C00, 0x3555, 0x83FF};
    const std::string data(reinterpret_cast<const char*>(halves.data()), 16);
    directory.write("model.safetensors",
                    safetensors_bytes(R"({"h":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", data));
    std::vector<float> out(8);
    SafetensorsReader(directory.path("")).read_f32("h", {8}, 0, out);
    const float infinity = std::numeric_limits<float>::infinity();
    EXPECT_EQ(out, (std::vector<float>{1, -2, 0x1p-24F, 65504, -0.0F, infinity, 0.333251953125F, -0x1.ff8p-15F}));
    EXPECT_TRUE(std::signbit(out[4]));
}

TEST(Safetensors, ShardsHoldTheSameModelAndHaveTheSameDigest)
{
    const TemporaryDirectory one;
    const TemporaryDirectory many;
    write_safetensors(one.path(""), three_tensors(), DType::f32);
    write_safetensors(many.path(""), three_tensors(), DType::f32, 90);
    EXPECT_TRUE(fs::exists(many.path("model-00002-of-00002.safetensors")));
    EXPECT_TRUE(fs::exists(many.path("model.safetensors.index.json")));
    EXPECT_FALSE(fs::exists(many.path("model.safetensors")));
    const SafetensorsReader reader(many.path(""));
    std::vector<float> out(12);
    reader.read_f32("c", {2, 3, 2}, 0, out);
    EXPECT_EQ(out, numbers(12));
    EXPECT_EQ(reader.digest(), SafetensorsReader(one.path("")).digest());
}

TEST(Safetensors, DigestSeesValuesNamesAndShapes)
{
    const auto digest = [](const SafetensorSource& tensor) {
        const TemporaryDirectory directory;
        write_safetensors(directory.path(""), {tensor}, DType::f32);
        return SafetensorsReader(directory.path("")).digest();
    };
    auto changed = numbers(6);
    changed[5] = std::nextafter(changed[5], 10.0F);
    const std::string base = digest(source("w", {6}, numbers(6)));
    EXPECT_EQ(base, digest(source("w", {6}, numbers(6))));
    EXPECT_NE(base, digest(source("w", {6}, changed)));
    EXPECT_NE(base, digest(source("v", {6}, numbers(6))));
    EXPECT_NE(base, digest(source("w", {2, 3}, numbers(6))));
}

TEST(Safetensors, AnEarlierModelInTheDirectoryDoesNotShineThrough)
{
    const TemporaryDirectory directory;
    write_safetensors(directory.path(""), three_tensors(), DType::f32);
    write_safetensors(directory.path(""), three_tensors(), DType::f32, 60); // three shards
    write_safetensors(directory.path(""), three_tensors(), DType::f32, 90); // two
    EXPECT_EQ(SafetensorsReader(directory.path("")).tensors().at("a").file.substr(directory.path("").size()),
              "/model-00002-of-00002.safetensors");
    write_safetensors(directory.path(""), {source("w", {6}, numbers(6))}, DType::f32);
    EXPECT_EQ(std::distance(fs::directory_iterator(directory.path("")), {}), 1);
    EXPECT_TRUE(SafetensorsReader(directory.path("")).has("w"));
}

TEST(Safetensors, AFailedWriteLeavesNothing)
{
    const TemporaryDirectory directory;
    auto tensors = three_tensors();
    tensors[2].read = [](std::int64_t, std::span<float>) { throw io_error("gone"); };
    EXPECT_THROW(write_safetensors(directory.path(""), tensors, DType::f32), Error);
    EXPECT_THROW(write_safetensors(directory.path(""), tensors, DType::f32, 60), Error);
    EXPECT_TRUE(fs::is_empty(directory.path("")));
}

TEST(Safetensors, AFullDiskIsAnIoErrorThatNamesTheFile)
{
    const Error error = failure_of([] { write_safetensors("/nonexistent-directory", three_tensors(), DType::f32); });
    EXPECT_EQ(error.code(), ExitCode::io);
    EXPECT_NE(std::string(error.what()).find("/nonexistent-directory/model.safetensors"), std::string::npos);
}

struct Malformed {
    const char* name;
    std::string bytes;
    const char* message;
};

std::string two_tensors(const std::string& first, const std::string& second, std::size_t data_bytes)
{
    return safetensors_bytes(cat(R"({"first":{"dtype":"F32",)", first, R"(},"second":{"dtype":"F32",)", second, "}}"),
                             std::string(data_bytes, 'x'));
}

std::vector<Malformed> malformed_files()
{
    const auto one = [](const std::string& entry, std::size_t data_bytes) {
        return safetensors_bytes(cat(R"({"first":)", entry, "}"), std::string(data_bytes, 'x'));
    };
    const std::string good = R"("shape":[2],"data_offsets":[0,8])";
    std::string deep = R"({"first":)";
    deep += std::string(50'000, '[') + std::string(50'000, ']') + "}";
    return {
        {"empty", "", "0 bytes"},
        {"shorter_than_a_length", "abc", "3 bytes"},
        {"length_beyond_the_file", std::string("\x40\0\0\0\0\0\0\0{}", 10), "header length 64"},
        {"absurd_length", std::string(8, '\xff') + "{}", "header length 18446744073709551615"},
        {"no_json", safetensors_bytes("{\"first\": nope", ""), "not valid JSON"},
        {"not_an_object", safetensors_bytes("[1, 2]", ""), "not a JSON object"},
        {"deep", safetensors_bytes(deep, ""), "nested deeper"},
        {"invalid_utf8", safetensors_bytes("{\"\xff\":1}", ""), "not valid JSON"},
        {"name_twice", safetensors_bytes(cat(R"({"first":{"dtype":"F32",)", good, R"(},"first":{"dtype":"F32",)", good, "}}"),
                                         std::string(8, 'x')), "'first' occurs twice"},
        {"key_twice", one(R"({"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]})", 8), "'dtype' occurs twice"},
        {"entry_is_a_number", one("3", 0), "tensor 'first'"},
        {"no_dtype", one(R"({"shape":[2],"data_offsets":[0,8]})", 8), "tensor 'first': 'dtype'"},
        {"unknown_dtype", one(R"({"dtype":"Q4","shape":[2],"data_offsets":[0,8]})", 8), "tensor 'first': unknown dtype 'Q4'"},
        {"no_shape", one(R"({"dtype":"F32","data_offsets":[0,8]})", 8), "tensor 'first': 'shape'"},
        {"negative_shape", one(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})", 8), "tensor 'first': 'shape'"},
        {"fractional_shape", one(R"({"dtype":"F32","shape":[2.5],"data_offsets":[0,8]})", 8), "tensor 'first': 'shape'"},
        {"huge_shape", one(R"({"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]})", 0), "tensor 'first': shape"},
        {"wrong_size", one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})", 8), "tensor 'first': shape [3] of F32"},
        {"wrong_dtype_size", one(R"({"dtype":"BF16","shape":[2],"data_offsets":[0,8]})", 8), "tensor 'first': shape [2] of BF16"},
        {"beyond_the_end", one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 7), "tensor 'first': data_offsets [0, 8]"},
        {"backwards", one(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})", 8), "tensor 'first': data_offsets [8, 0]"},
        {"three_offsets", one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,8]})", 8), "tensor 'first': data_offsets"},
        {"overlap", two_tensors(good, R"("shape":[2],"data_offsets":[4,12])", 12), "tensor 'second' overlaps"},
        {"same_place", two_tensors(good, good, 8), "overlaps"},
        {"hole_at_the_start", one(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})", 12), "tensor 'first' follows a hole"},
        {"hole", two_tensors(good, R"("shape":[1],"data_offsets":[12,16])", 16), "tensor 'second' follows a hole"},
        {"bytes_left_over", one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 11), "3 bytes at the end"},
    };
}

class MalformedSafetensors : public ::testing::TestWithParam<Malformed> {};

TEST_P(MalformedSafetensors, IsOneErrorThatNamesFileAndTensor)
{
    const TemporaryDirectory directory;
    const std::string path = directory.write("model.safetensors", GetParam().bytes);
    const Error error = failure_of([&] { SafetensorsReader reader(directory.path("")); });
    EXPECT_EQ(error.code(), ExitCode::bad_data);
    EXPECT_NE(std::string(error.what()).find("model.safetensors"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(GetParam().message), std::string::npos) << error.what();
}

INSTANTIATE_TEST_SUITE_P(All, MalformedSafetensors, ::testing::ValuesIn(malformed_files()),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(Safetensors, ReadingNamesTheTensorThatDoesNotFit)
{
    const TemporaryDirectory directory;
    directory.write("model.safetensors",
                    safetensors_bytes(R"({"ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                                      R"("w":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}})",
                                      std::string(16, '\0')));
    const SafetensorsReader reader(directory.path(""));
    std::vector<float> out(2);
    const auto message = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
        const Error error = failure_of([&] { reader.read_f32(name, shape, 0, out); });
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        return std::string(error.what());
    };
    EXPECT_NE(message("v", {2}).find("tensor 'v' is missing"), std::string::npos);
    EXPECT_NE(message("w", {1, 2}).find("tensor 'w' has shape [2, 1], but config.json calls for [1, 2]"), std::string::npos);
    out.resize(1);
    EXPECT_NE(message("ids", {1}).find("tensor 'ids' has dtype I64"), std::string::npos);
}

TEST(Safetensors, AnIndexThatDisagreesWithItsFilesIsRefused)
{
    const auto with_index = [](const std::string& weight_map) {
        const TemporaryDirectory directory;
        write_safetensors(directory.path(""), three_tensors(), DType::f32, 90); // b | a, c
        directory.write("model.safetensors.index.json", cat(R"({"metadata":{},"weight_map":)", weight_map, "}"));
        const Error error = failure_of([&] { SafetensorsReader reader(directory.path("")); });
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_NE(std::string(error.what()).find("model.safetensors.index.json"), std::string::npos);
        return std::string(error.what());
    };
    const std::string one = "\"model-00001-of-00002.safetensors\"";
    const std::string two = "\"model-00002-of-00002.safetensors\"";
    EXPECT_NE(with_index(cat(R"({"b":)", one, R"(,"a":"model-00003-of-00003.safetensors"})"))
                  .find("tensor 'a' is in model-00003-of-00003.safetensors, which does not exist"), std::string::npos);
    EXPECT_NE(with_index(cat(R"({"b":)", one, R"(,"a":)", two, R"(,"c":)", two, R"(,"d":)", two, "}")).find("tensor 'd'"),
              std::string::npos);
    EXPECT_NE(with_index(cat(R"({"b":)", one, R"(,"a":)", one, "}")).find("tensor 'a' is said to be in"), std::string::npos);
    EXPECT_NE(with_index(cat(R"({"b":)", one, R"(,"a":)", two, "}")).find("tensor 'c'"), std::string::npos);
    EXPECT_NE(with_index(R"({"b":"../elsewhere.safetensors"})").find("is no file name"), std::string::npos);
    EXPECT_NE(with_index(cat(R"({"b":)", one, R"(,"b":)", one, "}")).find("'b' occurs twice"), std::string::npos);
    EXPECT_NE(with_index("[]").find("'weight_map'"), std::string::npos);
}

TEST(Safetensors, NoModelIsAConfigurationError)
{
    const TemporaryDirectory directory;
    const Error error = failure_of([&] { SafetensorsReader reader(directory.path("")); });
    EXPECT_EQ(error.code(), ExitCode::configuration);
}

} // namespace
} // namespace selm
