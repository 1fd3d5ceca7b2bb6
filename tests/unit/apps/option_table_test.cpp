#include "option_table.hpp"

#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"

namespace selm::apps {
namespace {

using Words = std::vector<std::string>;

/// Options of a made-up program with every type, a name in two sections, and one in [run].
struct Sample {
    std::int64_t seed = 42;
    std::int64_t slots = 16;
    double temperature = 0.1;
    bool shuffle = true;
    bool verify = false;
    std::vector<double> rates = {5e-7};
    std::vector<std::string> rankers;
    std::string path = "a.h5";
    std::int64_t gen_tokens = 1, train_tokens = 2;

    void describe(OptionVisitor& visitor)
    {
        visitor.option("run", "seed", seed, "seed", OptionRole::recipe);
        visitor.option("gen", "slots", slots, "slots", OptionRole::operational);
        visitor.option("gen", "temperature", temperature, "temperature", OptionRole::recipe);
        visitor.option("gen", "tokens", gen_tokens, "tokens", OptionRole::recipe);
        visitor.option("gen", "path", path, "path", OptionRole::operational);
        visitor.option("gen", "verify", verify, "verify", OptionRole::operational);
        visitor.option("train", "shuffle", shuffle, "shuffle", OptionRole::recipe);
        visitor.option("train", "learning-rate", rates, "rates", OptionRole::recipe);
        visitor.option("train", "ranker", rankers, "rankers", OptionRole::recipe);
        visitor.option("train", "tokens", train_tokens, "tokens", OptionRole::recipe);
    }
};

const KnownKeys known{{"run", {"seed", "dtype"}},
                      {"gen", {"slots", "temperature", "tokens", "path", "verify", "policy"}},
                      {"train", {"shuffle", "learning-rate", "ranker", "tokens"}},
                      {"logp", {"model"}}};

struct Result {
    Sample values;
    ExitCode code = ExitCode::done;
    std::string message;
    std::string config_text, recipe_text;
    Words warnings;
    OptionTable::Request request;
};

Result read(const Words& arguments, const std::string& config = {}, const std::string& positional = {})
{
    Result result;
    try {
        OptionTable table([&](OptionVisitor& visitor) { result.values.describe(visitor); });
        result.request = table.read_command_line(arguments, positional);
        if (!config.empty())
            table.read_config(config, "f.cfg", known);
        table.apply();
        result.config_text = table.config_text();
        result.recipe_text = table.recipe_text();
        result.warnings = table.warnings();
    } catch (const Error& error) {
        result.code = error.code();
        result.message = error.what();
    }
    return result;
}

void expect_error(const Result& result, ExitCode code, const std::string& part)
{
    EXPECT_EQ(result.code, code) << result.message;
    EXPECT_NE(result.message.find(part), std::string::npos) << result.message << "\nlacks: " << part;
}

TEST(OptionTable, ReadsEveryTypeFromTheCommandLine)
{
    const auto values = read({"--seed", "7", "--slots=3", "--temperature", "1e-3", "--shuffle", "off", "--verify", "--learning-rate",
                              "5e-7,3e-7", "--ranker", "a:b", "--ranker", "c:d,e:f", "--path", "x y"})
                            .values;
    EXPECT_EQ(values.seed, 7);
    EXPECT_EQ(values.slots, 3);
    EXPECT_EQ(values.temperature, 1e-3);
    EXPECT_FALSE(values.shuffle);
    EXPECT_TRUE(values.verify);
    EXPECT_EQ(values.rates, (std::vector<double>{5e-7, 3e-7}));
    EXPECT_EQ(values.rankers, (Words{"a:b", "c:d", "e:f"}));
    EXPECT_EQ(values.path, "x y");
    EXPECT_EQ(read({"--slots", "-1"}).values.slots, -1) << "a negative number is a value, not an option";
    EXPECT_TRUE(read({"--verify", "--seed", "1"}).values.verify);
    EXPECT_FALSE(read({"--verify=off"}).values.verify);
    EXPECT_EQ(read({"--path", ""}).values.path, "");
}

TEST(OptionTable, CommandLineWinsOverFileOverDefault)
{
    const std::string config = "[run]\nseed = 1\n[gen]\nslots = 2\n[train]\nlearning-rate = 1,2\nranker = a:b\n";
    const auto values = read({"--seed", "9", "--learning-rate", "3"}, config).values;
    EXPECT_EQ(values.seed, 9);
    EXPECT_EQ(values.slots, 2);
    EXPECT_EQ(values.rates, (std::vector<double>{3})) << "the lists are not joined";
    EXPECT_EQ(values.rankers, (Words{"a:b"}));
    EXPECT_EQ(values.temperature, 0.1);
}

TEST(OptionTable, NamesInTwoSectionsNeedTheSection)
{
    const auto both = read({"--gen.tokens", "5", "--train.tokens", "6"});
    EXPECT_EQ(both.values.gen_tokens, 5);
    EXPECT_EQ(both.values.train_tokens, 6);
    expect_error(read({"--tokens", "5"}), ExitCode::usage, "--gen.tokens, --train.tokens");
    EXPECT_EQ(read({"--run.seed", "5"}).values.seed, 5);
    expect_error(read({"--run.seed", "5", "--seed", "6"}), ExitCode::usage, "given twice");
}

TEST(OptionTable, BadCommandLines)
{
    expect_error(read({"--temprature", "1"}), ExitCode::usage, "Did you mean --temperature?");
    expect_error(read({"--temp", "1"}), ExitCode::usage, "unknown option --temp");
    expect_error(read({"--slots", "many"}), ExitCode::usage, "--slots: 'many' is not a whole number");
    expect_error(read({"--slots", "3.5"}), ExitCode::usage, "not a whole number");
    expect_error(read({"--slots", "99999999999999999999"}), ExitCode::usage, "not a whole number");
    expect_error(read({"--temperature", "nan"}), ExitCode::usage, "not a number");
    expect_error(read({"--temperature", "1x"}), ExitCode::usage, "not a number");
    expect_error(read({"--learning-rate", "1,,2"}), ExitCode::usage, "list of numbers");
    expect_error(read({"--shuffle=maybe"}), ExitCode::usage, "neither on nor off");
    expect_error(read({"--slots", "1", "--slots", "2"}), ExitCode::usage, "given twice");
    expect_error(read({"--slots"}), ExitCode::usage, "slots");
    expect_error(read({"stray"}), ExitCode::usage, "unexpected argument 'stray'");
    expect_error(read({"-s", "3"}), ExitCode::usage, "'-s'");
    expect_error(read({"--ranker", "a,,b"}), ExitCode::usage, "empty element");
}

TEST(OptionTable, OnePositionalArgumentWhereTheProgramHasOne)
{
    EXPECT_EQ(read({"b.h5", "--verify"}, "", "path").values.path, "b.h5");
    expect_error(read({"b.h5", "c.h5"}, "", "path"), ExitCode::usage, "c.h5");
    expect_error(read({"b.h5", "--path", "c.h5"}, "", "path"), ExitCode::usage, "twice");
}

TEST(OptionTable, BadFilesNameFileLineAndKey)
{
    expect_error(read({}, "[gen]\n\ntemprature = 1\n"), ExitCode::configuration, "f.cfg:3: unknown key 'temprature' in [gen]");
    expect_error(read({}, "[gen]\n\ntemprature = 1\n"), ExitCode::configuration, "Did you mean 'temperature'?");
    expect_error(read({}, "[logp]\nmodle = x\n"), ExitCode::configuration, "f.cfg:2: unknown key 'modle' in [logp]");
    expect_error(read({}, "[run]\nslots = 3\n"), ExitCode::configuration, "belongs to [gen]");
    expect_error(read({}, "[genn]\nslots = 3\n"), ExitCode::configuration, "f.cfg:2: unknown section [genn]. Did you mean [gen]?");
    expect_error(read({}, "[gen]\nslots = many\n"), ExitCode::configuration, "f.cfg:2: slots = 'many' is not a whole number");
    expect_error(read({}, "[gen]\ntemp = 1\n"), ExitCode::configuration, "unknown key 'temp'");
}

TEST(OptionTable, OtherProgramsKeysAreCheckedAndLeftAlone)
{
    const auto result = read({}, "[run]\ndtype = bf16\n[logp]\nmodel = x\n[gen]\npolicy = y\n");
    EXPECT_EQ(result.code, ExitCode::done) << result.message;
    ASSERT_EQ(result.warnings.size(), 1U) << "[gen] is read by this program, but policy is not its option";
    EXPECT_NE(result.warnings[0].find("f.cfg:6: 'policy'"), std::string::npos) << result.warnings[0];
}

TEST(OptionTable, PrintedConfigurationReadsBackToItself)
{
    const auto first = read({"--path", " odd \"path\" # 1", "--temperature", "0.30000000000000004", "--shuffle", "off",
                             "--learning-rate", "5e-7,0.1", "--ranker", "reward:a b,file:c", "--train.tokens", "77"});
    ASSERT_EQ(first.code, ExitCode::done) << first.message;
    const auto second = read({}, first.config_text);
    ASSERT_EQ(second.code, ExitCode::done) << second.message;
    EXPECT_EQ(second.config_text, first.config_text);
    EXPECT_EQ(second.recipe_text, first.recipe_text);
    EXPECT_EQ(second.values.path, " odd \"path\" # 1");
    EXPECT_EQ(second.values.temperature, 0.30000000000000004);
    EXPECT_EQ(second.values.rankers, first.values.rankers);
    EXPECT_EQ(second.values.train_tokens, 77);
}

TEST(OptionTable, RecipeIsSortedAndHasNoOperationalKeys)
{
    EXPECT_EQ(read({"--slots", "99"}).recipe_text, "gen.temperature = 0.1\n"
                                                   "gen.tokens = 1\n"
                                                   "run.seed = 42\n"
                                                   "train.learning-rate = 5e-07\n"
                                                   "train.ranker = \n"
                                                   "train.shuffle = on\n"
                                                   "train.tokens = 2\n");
}

TEST(OptionTable, ConfigPlaceTellsWhoSetAValue)
{
    Sample sample;
    OptionTable table([&](OptionVisitor& visitor) { sample.describe(visitor); });
    table.read_command_line({"--seed", "3"});
    table.read_config("[run]\nseed = 1\n[gen]\nslots = 2\n", "f.cfg", known);
    EXPECT_EQ(table.config_place("slots"), "f.cfg:4");
    EXPECT_EQ(table.config_place("seed"), "") << "the command line won";
    EXPECT_EQ(table.config_place("temperature"), "");
}

TEST(OptionTable, GeneralRequests)
{
    const auto request = read({"--config", "x.cfg", "--print-config"}).request;
    EXPECT_EQ(request.config, "x.cfg");
    EXPECT_TRUE(request.print_config);
    EXPECT_FALSE(request.help);
    EXPECT_TRUE(read({"--help"}).request.help);
    EXPECT_TRUE(read({"--version"}).request.version);
    expect_error(read({"--config", "a", "--config", "b"}), ExitCode::usage, "--config");
    expect_error(read({"--config"}), ExitCode::usage, "config");
}

TEST(OptionTable, HelpListsEveryOptionWithItsDefault)
{
    Sample sample;
    const OptionTable table([&](OptionVisitor& visitor) { sample.describe(visitor); });
    const std::string help = table.help("selm_sample", "purpose");
    for (const char* part : {"selm_sample: purpose", "--seed", "--slots", "--gen.tokens", "--train.tokens", "--learning-rate",
                             "(default 16)", "(default on)", "(default 5e-07)", "--config", "--print-config", "[gen]", "[train]", "[run]"})
        EXPECT_NE(help.find(part), std::string::npos) << part << " is missing in\n" << help;
}

TEST(OptionTable, AKeyThatIsDescribedTwiceSetsBothVariables)
{
    std::int64_t first = 1;
    std::int64_t second = 1;
    OptionTable table([&](OptionVisitor& visitor) {
        visitor.option("run", "seed", first, "seed", OptionRole::recipe);
        visitor.option("run", "seed", second, "seed", OptionRole::recipe);
    });
    table.read_command_line({"--seed", "5"});
    table.apply();
    EXPECT_EQ(first, 5);
    EXPECT_EQ(second, 5);
}

TEST(KnownKeys, AreCollectedOnceEach)
{
    Sample sample;
    const auto describe = [&](OptionVisitor& visitor) { sample.describe(visitor); };
    const KnownKeys keys = collect_known_keys({describe, describe});
    EXPECT_EQ(keys.at("run"), (Words{"seed"}));
    EXPECT_EQ(keys.at("train"), (Words{"shuffle", "learning-rate", "ranker", "tokens"}));
}

} // namespace
} // namespace selm::apps
