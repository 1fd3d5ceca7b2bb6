#include "option_table.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <set>
#include <sstream>
#include <string_view>
#include <type_traits>

#include <boost/program_options.hpp>

#include "config_file.hpp"
#include "selm/base/error.hpp"

namespace po = boost::program_options;

namespace selm::apps {

namespace {

/// The shortest decimal text that reads back as the same double.
std::string shortest(double value)
{
    std::array<char, 32> buffer{};
    const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
    return {buffer.data(), result.ptr};
}

template<typename Number>
bool parse_number(const std::string& text, Number& value)
{
    const char* const end = text.data() + text.size();
    const auto result = std::from_chars(text.data(), end, value);
    return result.ec == std::errc() && result.ptr == end && !text.empty();
}

/// Splits at commas; blanks around an element do not count. "" is the empty list.
std::vector<std::string> split_list(const std::string& text)
{
    std::vector<std::string> parts;
    if (text.find_first_not_of(" \t") == std::string::npos)
        return parts;
    std::istringstream in(text + ",");
    for (std::string part; std::getline(in, part, ',');) {
        const std::size_t begin = part.find_first_not_of(" \t");
        parts.push_back(begin == std::string::npos ? "" : part.substr(begin, part.find_last_not_of(" \t") - begin + 1));
    }
    return parts;
}

std::string read_value(std::string& variable, const std::string& text)
{
    variable = text;
    return {};
}

std::string read_value(std::int64_t& variable, const std::string& text)
{
    return parse_number(text, variable) ? "" : "is not a whole number";
}

std::string read_value(double& variable, const std::string& text)
{
    return parse_number(text, variable) && std::isfinite(variable) ? "" : "is not a number";
}

std::string read_value(bool& variable, const std::string& text)
{
    variable = text == "on";
    return text == "on" || text == "off" ? "" : "is neither on nor off";
}

std::string read_value(std::vector<double>& variable, const std::string& text)
{
    variable.clear();
    for (const std::string& part : split_list(text)) {
        double value = 0;
        if (!parse_number(part, value) || !std::isfinite(value))
            return "is not a list of numbers (write 5e-7,3e-7)";
        variable.push_back(value);
    }
    return variable.empty() ? "is an empty list" : "";
}

std::string read_value(std::vector<std::string>& variable, const std::string& text)
{
    variable = split_list(text);
    return std::find(variable.begin(), variable.end(), "") == variable.end() ? "" : "has an empty element";
}

template<typename T>
const char* value_name()
{
    if constexpr (std::is_same_v<T, bool>)
        return "on|off";
    else if constexpr (std::is_same_v<T, std::int64_t>)
        return "N";
    else if constexpr (std::is_same_v<T, double>)
        return "X";
    else if constexpr (std::is_same_v<T, std::vector<double>>)
        return "X,X...";
    else if constexpr (std::is_same_v<T, std::vector<std::string>>)
        return "TEXT,...";
    else
        return "TEXT";
}

/// Visitor whose six calls end in one template.
template<typename Derived>
class AnyVisitor : public OptionVisitor {
  public:
    void option(const char* s, const char* n, std::string& v, const char* h, OptionRole r) override { self().add(s, n, v, h, r); }
    void option(const char* s, const char* n, std::int64_t& v, const char* h, OptionRole r) override { self().add(s, n, v, h, r); }
    void option(const char* s, const char* n, double& v, const char* h, OptionRole r) override { self().add(s, n, v, h, r); }
    void option(const char* s, const char* n, bool& v, const char* h, OptionRole r) override { self().add(s, n, v, h, r); }
    void option(const char* s, const char* n, std::vector<double>& v, const char* h, OptionRole r) override
    {
        self().add(s, n, v, h, r);
    }
    void option(const char* s, const char* n, std::vector<std::string>& v, const char* h, OptionRole r) override
    {
        self().add(s, n, v, h, r);
    }

  private:
    Derived& self() { return static_cast<Derived&>(*this); }
};

class NameCollector final : public AnyVisitor<NameCollector> {
  public:
    KnownKeys keys;
    template<typename T>
    void add(const char* section, const char* name, T&, const char*, OptionRole)
    {
        auto& names = keys[section];
        if (std::find(names.begin(), names.end(), name) == names.end())
            names.emplace_back(name);
    }
};

std::string did_you_mean(const std::string& suggestion)
{
    return suggestion.empty() ? "" : ". Did you mean " + suggestion + "?";
}

constexpr const char* general_options[] = {"config", "print-config", "version", "help"};

} // namespace

KnownKeys collect_known_keys(const std::vector<std::function<void(OptionVisitor&)>>& describe_functions)
{
    NameCollector collector;
    for (const auto& describe : describe_functions)
        describe(collector);
    return collector.keys;
}

class OptionTable::Collector final : public AnyVisitor<OptionTable::Collector> {
  public:
    explicit Collector(OptionTable& table) : table_(table) {}
    template<typename T>
    void add(const char* section, const char* name, T& variable, const char* help, OptionRole role)
    {
        Entry* entry = table_.find(section, name);
        if (entry == nullptr) {
            table_.entries_.push_back({section, name, help, role, {}, false, {}, {}, {}});
            entry = &table_.entries_.back();
        }
        entry->variables.emplace_back(&variable);
        SELM_EXPECT(entry->variables.front().index() == entry->variables.back().index());
    }

  private:
    OptionTable& table_;
};

OptionTable::OptionTable(const Describe& describe)
{
    Collector collector(*this);
    describe(collector);
}

std::vector<std::size_t> OptionTable::entries_named(const std::string& name) const
{
    std::vector<std::size_t> found;
    for (std::size_t i = 0; i < entries_.size(); ++i)
        if (entries_[i].name == name)
            found.push_back(i);
    // [run] holds what all programs share: its keys need no section in front.
    const auto shared = std::find_if(found.begin(), found.end(), [&](std::size_t i) { return entries_[i].section == "run"; });
    return shared == found.end() ? found : std::vector<std::size_t>{*shared};
}

OptionTable::Entry* OptionTable::find(const std::string& section, const std::string& name)
{
    const auto found = std::find_if(entries_.begin(), entries_.end(),
                                    [&](const Entry& entry) { return entry.section == section && entry.name == name; });
    return found == entries_.end() ? nullptr : &*found;
}

std::string OptionTable::plain_or_qualified(const Entry& entry) const
{
    const auto same_name = entries_named(entry.name);
    const bool plain = same_name.size() == 1 && entries_[same_name.front()].section == entry.section;
    return plain ? entry.name : entry.section + "." + entry.name;
}

std::string OptionTable::unknown_option_text(const std::string& name) const
{
    const auto same_name = entries_named(name);
    if (same_name.size() > 1) {
        std::string list;
        for (const std::size_t i : same_name)
            list += cat(list.empty() ? "" : ", ", "--", entries_[i].section, ".", name);
        return cat("--", name, " is ambiguous: several sections have it. Write one of ", list);
    }
    std::vector<std::string> names(std::begin(general_options), std::end(general_options));
    for (const Entry& entry : entries_)
        names.push_back(plain_or_qualified(entry));
    const std::string nearest = nearest_word(name, names);
    return cat("unknown option --", name, did_you_mean(nearest.empty() ? "" : "--" + nearest), " (see --help)");
}

/// "--switch" alone means on; Boost would swallow or demand the next word.
std::vector<std::string> OptionTable::with_explicit_switches(const std::vector<std::string>& arguments) const
{
    std::set<std::string> switches{"--print-config", "--version", "--help"};
    for (const Entry& entry : entries_) {
        if (!std::holds_alternative<bool*>(entry.variables.front()))
            continue;
        switches.insert("--" + entry.section + "." + entry.name);
        switches.insert("--" + plain_or_qualified(entry));
    }
    std::vector<std::string> result;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const bool has_word = i + 1 < arguments.size() && (arguments[i + 1] == "on" || arguments[i + 1] == "off");
        if (switches.count(arguments[i]) == 0 || has_word)
            result.push_back(arguments[i]);
        else
            result.push_back(arguments[i] + "=on");
    }
    return result;
}

OptionTable::Request OptionTable::read_command_line(const std::vector<std::string>& arguments, const std::string& positional)
{
    po::options_description description;
    const auto add = [&](const std::string& name) { description.add_options()(name.c_str(), po::value<std::vector<std::string>>()); };
    for (const char* name : general_options)
        add(name);
    std::set<std::string> plain;
    for (const Entry& entry : entries_) {
        add(entry.section + "." + entry.name);
        if (plain_or_qualified(entry) == entry.name && plain.insert(entry.name).second)
            add(entry.name);
    }
    Request request;
    try {
        namespace style = po::command_line_style;
        const auto parsed = po::command_line_parser(with_explicit_switches(arguments))
                                .options(description)
                                .style(style::allow_long | style::long_allow_adjacent | style::long_allow_next)
                                .allow_unregistered()
                                .run();
        for (const auto& option : parsed.options) {
            if (option.position_key >= 0 || option.string_key.empty()) {
                const std::string word = option.value.empty() ? "" : option.value.front();
                SELM_VALIDATE(!positional.empty() && !word.starts_with('-'), ExitCode::usage,
                              "unexpected argument '" << word << "'. Options start with -- (see --help)");
                Entry& entry = entries_.at(entries_named(positional).front());
                SELM_VALIDATE(!entry.on_command_line, ExitCode::usage, "more than one " << positional << " is given: '" << word << "'");
                entry.on_command_line = true;
                entry.words = {word};
                continue;
            }
            if (option.unregistered)
                throw usage_error(unknown_option_text(option.string_key));
            const std::string value = option.value.empty() ? "" : option.value.front();
            const bool on = value != "off";
            if (option.string_key == "config") {
                SELM_VALIDATE(request.config.empty() && !value.empty(), ExitCode::usage, "--config takes one file, once");
                request.config = value;
            } else if (option.string_key == "print-config") {
                request.print_config = on;
            } else if (option.string_key == "version") {
                request.version = on;
            } else if (option.string_key == "help") {
                request.help = on;
            } else {
                const std::size_t dot = option.string_key.find('.');
                Entry& entry = dot == std::string::npos
                                   ? entries_.at(entries_named(option.string_key).front())
                                   : *find(option.string_key.substr(0, dot), option.string_key.substr(dot + 1));
                const bool list = std::holds_alternative<std::vector<double>*>(entry.variables.front()) ||
                                  std::holds_alternative<std::vector<std::string>*>(entry.variables.front());
                SELM_VALIDATE(list || !entry.on_command_line, ExitCode::usage, "--" << option.string_key << " is given twice");
                entry.on_command_line = true;
                entry.words.push_back(value);
            }
        }
    } catch (const po::error& error) {
        throw usage_error(cat(error.what(), " (see --help)"));
    }
    return request;
}

void OptionTable::check_known(const std::string& section, const std::string& key, const std::string& place, const KnownKeys& known)
{
    const auto found = known.find(section);
    if (found == known.end()) {
        std::vector<std::string> sections;
        std::string list;
        for (const auto& [name, keys] : known) {
            sections.push_back(name);
            list += cat(list.empty() ? "" : " ", "[", name, "]");
        }
        const std::string nearest = nearest_word(section, sections);
        throw config_error(cat(place, ": unknown section [", section, "]", did_you_mean(nearest.empty() ? "" : "[" + nearest + "]"),
                               " Sections are ", list));
    }
    if (std::find(found->second.begin(), found->second.end(), key) != found->second.end())
        return;
    for (const auto& [other, keys] : known)
        if (std::find(keys.begin(), keys.end(), key) != keys.end())
            throw config_error(cat(place, ": unknown key '", key, "' in [", section, "]: it belongs to [", other, "]"));
    const std::string nearest = nearest_word(key, found->second);
    throw config_error(cat(place, ": unknown key '", key, "' in [", section, "]",
                           did_you_mean(nearest.empty() ? "" : "'" + nearest + "'")));
}

void OptionTable::read_config(const std::string& text, const std::string& file, const KnownKeys& known)
{
    for (const ConfigLine& line : parse_config(text, file)) {
        const std::string place = cat(file, ":", line.line);
        check_known(line.section, line.key, place, known);
        if (Entry* const entry = find(line.section, line.key)) {
            entry->config_value = line.value;
            entry->place = place;
            continue;
        }
        const bool reads_section = std::any_of(entries_.begin(), entries_.end(),
                                               [&](const Entry& entry) { return entry.section == line.section; });
        if (reads_section && line.section != "run")
            warnings_.push_back(cat(place, ": '", line.key, "' in [", line.section, "] is not an option of this program; ignored"));
    }
}

bool OptionTable::switched_on(const std::string& name) const
{
    return std::any_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
        return entry.name == name && entry.on_command_line && entry.words.back() == "on";
    });
}

void OptionTable::apply()
{
    for (Entry& entry : entries_) {
        if (!entry.on_command_line && entry.place.empty())
            continue;
        std::string text = entry.config_value;
        if (entry.on_command_line) {
            text.clear();
            for (const std::string& word : entry.words)
                text += (&word == &entry.words.front() ? "" : ",") + word;
        }
        for (const Variable& variable : entry.variables) {
            const std::string problem = std::visit([&](auto* target) { return read_value(*target, text); }, variable);
            if (problem.empty())
                continue;
            if (entry.on_command_line)
                throw usage_error(cat("--", plain_or_qualified(entry), ": '", text, "' ", problem));
            throw config_error(cat(entry.place, ": ", entry.name, " = '", text, "' ", problem));
        }
    }
}

std::string OptionTable::value_text(const Variable& variable)
{
    return std::visit(
        [](const auto* target) -> std::string {
            using T = std::remove_cvref_t<decltype(*target)>;
            if constexpr (std::is_same_v<T, std::string>) {
                return *target;
            } else if constexpr (std::is_same_v<T, bool>) {
                return *target ? "on" : "off";
            } else if constexpr (std::is_same_v<T, std::int64_t>) {
                return std::to_string(*target);
            } else if constexpr (std::is_same_v<T, double>) {
                return shortest(*target);
            } else {
                std::string text;
                for (const auto& element : *target) {
                    text += text.empty() ? "" : ",";
                    if constexpr (std::is_same_v<T, std::vector<double>>)
                        text += shortest(element);
                    else
                        text += element;
                }
                return text;
            }
        },
        variable);
}

std::string OptionTable::config_text() const
{
    std::vector<std::string> sections;
    for (const Entry& entry : entries_)
        if (std::find(sections.begin(), sections.end(), entry.section) == sections.end())
            sections.push_back(entry.section);
    std::string text;
    for (const std::string& section : sections) {
        text += cat(text.empty() ? "" : "\n", "[", section, "]\n");
        for (const Entry& entry : entries_)
            if (entry.section == section)
                text += cat(entry.name, " = ", quote_config_value(value_text(entry.variables.front())), "\n");
    }
    return text;
}

std::string OptionTable::recipe_text() const
{
    std::set<std::string> lines;
    for (const Entry& entry : entries_)
        if (entry.role == OptionRole::recipe)
            lines.insert(cat(entry.section, ".", entry.name, " = ", quote_config_value(value_text(entry.variables.front())), "\n"));
    std::string text;
    for (const std::string& line : lines)
        text += line;
    return text;
}

std::string OptionTable::help(const std::string& program, const std::string& purpose) const
{
    constexpr unsigned width = 110;
    std::vector<std::string> sections;
    for (const Entry& entry : entries_)
        if (entry.section != "run" && std::find(sections.begin(), sections.end(), entry.section) == sections.end())
            sections.push_back(entry.section);
    sections.emplace_back("run");
    std::ostringstream out;
    out << program << ": " << purpose << "\n\nusage: " << program << " [--config FILE] [OPTION...]\n\n";
    for (const std::string& section : sections) {
        po::options_description group("[" + section + "]", width, width / 2);
        for (const Entry& entry : entries_) {
            if (entry.section != section)
                continue;
            const std::string value = value_text(entry.variables.front());
            const char* const name = std::visit([](auto* target) { return value_name<std::remove_cvref_t<decltype(*target)>>(); },
                                                entry.variables.front());
            group.add_options()(plain_or_qualified(entry).c_str(), po::value<std::string>()->value_name(name),
                                (entry.help + (value.empty() ? "" : " (default " + value + ")")).c_str());
        }
        if (!group.options().empty())
            out << group << "\n";
    }
    po::options_description general("program", width, width / 2);
    general.add_options()("config", po::value<std::string>()->value_name("FILE"),
                          "INI file with the sections above; the command line wins over it")(
        "print-config", "print the effective configuration and exit")("version", "print version and build, and exit")(
        "help", "print this and exit");
    out << general << "\nA key in a file stands in the section in brackets above; on the command line --section.name works too.\n"
        << "Exit codes: 0 done, 64 command line, 65 data, 70 internal, 74 input/output, 75 stopped (run again), 78 configuration.\n";
    return out.str();
}

std::string OptionTable::config_place(const std::string& name) const
{
    for (const Entry& entry : entries_)
        if ((entry.name == name || entry.section + "." + entry.name == name) && !entry.on_command_line && !entry.place.empty())
            return entry.place;
    return {};
}

} // namespace selm::apps
