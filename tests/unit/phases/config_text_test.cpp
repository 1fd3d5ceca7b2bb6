#include "selm/phases/config_text.hpp"

#include <gtest/gtest.h>

#include "selm/phases/generate.hpp"

namespace selm {
namespace {

TEST(ConfigText, OperationalKeysAreStoredButNotHashed)
{
    GenerateOptions options;
    const ConfigText before = config_text(options);
    options.slots = 3;
    options.output = "elsewhere.h5";
    const ConfigText operational = config_text(options);
    EXPECT_EQ(operational.recipe_hash, before.recipe_hash);
    EXPECT_NE(operational.ini.find("slots = 3\n"), std::string::npos) << operational.ini;
    options.temperature = 0.7;
    const ConfigText recipe = config_text(options);
    EXPECT_NE(recipe.recipe_hash, before.recipe_hash);
    EXPECT_NE(recipe.ini.find("temperature = 0.7\n"), std::string::npos) << recipe.ini;
}

TEST(ConfigText, KeysStandInTheirSections)
{
    const std::string ini = config_text(GenerateOptions{}).ini;
    const auto run = ini.find("[run]\n"), gen = ini.find("[gen]\n"), seed = ini.find("seed = 42\n"),
               slots = ini.find("slots = 16\n");
    ASSERT_NE(gen, std::string::npos);
    EXPECT_EQ(run, 0U);
    EXPECT_LT(seed, gen);
    EXPECT_GT(slots, gen);
    EXPECT_EQ(ini.find("[run]", 1), std::string::npos);
}

TEST(ConfigText, EveryKindOfValueIsWritten)
{
    std::string text = "a b";
    std::int64_t number = -5;
    double real = 5e-7;
    bool flag = true;
    std::vector<double> reals{5e-7, 0.1};
    std::vector<std::string> texts{"x", "y"};
    const ConfigText result = config_text([&](OptionVisitor& v) {
        v.option("s", "text", text, "", OptionRole::recipe);
        v.option("s", "number", number, "", OptionRole::recipe);
        v.option("s", "real", real, "", OptionRole::recipe);
        v.option("s", "flag", flag, "", OptionRole::recipe);
        v.option("s", "reals", reals, "", OptionRole::recipe);
        v.option("s", "texts", texts, "", OptionRole::recipe);
    });
    EXPECT_EQ(result.ini, "[s]\ntext = a b\nnumber = -5\nreal = 5e-07\nflag = on\nreals = 5e-07,0.1\ntexts = x,y\n");
}

} // namespace
} // namespace selm
