#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "selm/base/options.hpp"

namespace selm::apps {

/// section -> names of its keys, over all programs: a configuration file may hold any of them.
using KnownKeys = std::map<std::string, std::vector<std::string>>;

/// Collects the names that describe functions mention.
KnownKeys collect_known_keys(const std::vector<std::function<void(OptionVisitor&)>>& describe_functions);

/**
 * @brief The options of one program, bound to the variables that its describe function showed: command line over
 * configuration file over default.
 *
 * On the command line an option is --name, or --section.name, which is needed where several sections have the name.
 */
class OptionTable {
  public:
    using Describe = std::function<void(OptionVisitor&)>;

    /// The variables behind @p describe must outlive the table; their values now are the defaults.
    explicit OptionTable(const Describe& describe);

    /// What the command line asks for besides options.
    struct Request {
        std::string config; ///< --config FILE, or ""
        bool print_config = false;
        bool version = false;
        bool help = false;
    };
    /// Reads the command line (without the program's name); values are set later, by apply(). Call once.
    /// @param positional name of the option that an argument without -- sets, or "".
    /// @throws Error usage.
    Request read_command_line(const std::vector<std::string>& arguments, const std::string& positional = {});

    /// Reads a configuration file's text. Names are checked in all sections against @p known; values are taken for this
    /// program's keys. @throws Error configuration naming file, line and key.
    void read_config(const std::string& text, const std::string& file, const KnownKeys& known);

    /// Lines for the user about keys of sections that this program reads but does not use.
    const std::vector<std::string>& warnings() const { return warnings_; }

    /// Whether the command line has --name and not "--name off".
    bool switched_on(const std::string& name) const;

    /// Sets the variables. @throws Error usage (command line) or configuration (file) on a value that does not convert.
    void apply();

    /// The effective values as a configuration file that reads back to the same values.
    std::string config_text() const;

    /// Sorted "section.key = value" lines of the keys that change results.
    std::string recipe_text() const;

    /// The options by section, with values as defaults.
    std::string help(const std::string& program, const std::string& purpose) const;

    /// Where the value of --name came from: "FILE:LINE" for a configuration file, else "".
    std::string config_place(const std::string& name) const;

  private:
    using Variable = std::variant<std::string*, std::int64_t*, double*, bool*, std::vector<double>*, std::vector<std::string>*>;
    struct Entry {
        std::string section, name, help;
        OptionRole role = OptionRole::recipe;
        std::vector<Variable> variables; ///< more than one where the key is described twice
        bool on_command_line = false;
        std::vector<std::string> words; ///< as given on the command line
        std::string config_value;
        std::string place; ///< FILE:LINE where a configuration file sets it
    };
    class Collector;

    std::vector<std::size_t> entries_named(const std::string& name) const;
    Entry* find(const std::string& section, const std::string& name);
    std::string plain_or_qualified(const Entry& entry) const;
    std::string unknown_option_text(const std::string& name) const;
    std::vector<std::string> with_explicit_switches(const std::vector<std::string>& arguments) const;
    void check_known(const std::string& section, const std::string& key, const std::string& place, const KnownKeys& known);
    static std::string value_text(const Variable& variable);

    std::vector<Entry> entries_;
    std::vector<std::string> warnings_;
};

} // namespace selm::apps
