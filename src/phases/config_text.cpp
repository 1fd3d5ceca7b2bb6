#include "selm/phases/config_text.hpp"

#include <array>
#include <charconv>
#include <set>
#include <utility>
#include <vector>

#include "selm/base/error.hpp"
#include "selm/base/hash.hpp"

namespace selm {
namespace {

/// The shortest decimal text that reads back as the same double.
std::string shortest(double value)
{
    std::array<char, 32> buffer{};
    const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
    return {buffer.data(), result.ptr};
}

class Collector final : public OptionVisitor {
  public:
    void option(const char* s, const char* n, std::string& v, const char*, OptionRole r) override { add(s, n, v, r); }
    void option(const char* s, const char* n, std::int64_t& v, const char*, OptionRole r) override
    {
        add(s, n, std::to_string(v), r);
    }
    void option(const char* s, const char* n, double& v, const char*, OptionRole r) override
    {
        add(s, n, shortest(v), r);
    }
    void option(const char* s, const char* n, bool& v, const char*, OptionRole r) override
    {
        add(s, n, v ? "on" : "off", r);
    }
    void option(const char* s, const char* n, std::vector<double>& v, const char*, OptionRole r) override
    {
        std::string text;
        for (const double value : v)
            text.append(text.empty() ? "" : ",").append(shortest(value));
        add(s, n, text, r);
    }
    void option(const char* s, const char* n, std::vector<std::string>& v, const char*, OptionRole r) override
    {
        std::string text;
        for (const std::string& value : v)
            text.append(text.empty() ? "" : ",").append(value);
        add(s, n, text, r);
    }

    ConfigText text() const
    {
        ConfigText result;
        for (const auto& [section, lines] : sections_)
            result.ini += cat(result.ini.empty() ? "" : "\n", "[", section, "]\n", lines);
        Hasher hasher;
        for (const std::string& line : recipe_)
            hasher.update(line + "\n");
        result.recipe_hash = hasher.hex();
        return result;
    }

  private:
    void add(const std::string& section, const char* name, const std::string& value, OptionRole role)
    {
        if (role == OptionRole::recipe)
            recipe_.insert(cat(section, ".", name, " = ", value));
        for (auto& [known, lines] : sections_) {
            if (known == section) {
                lines += cat(name, " = ", value, "\n");
                return;
            }
        }
        sections_.emplace_back(section, cat(name, " = ", value, "\n"));
    }

    std::vector<std::pair<std::string, std::string>> sections_;
    std::set<std::string> recipe_;
};

} // namespace

ConfigText config_text(const std::function<void(OptionVisitor&)>& describe)
{
    Collector collector;
    describe(collector);
    return collector.text();
}

} // namespace selm
