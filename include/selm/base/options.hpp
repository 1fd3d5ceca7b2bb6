#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace selm {

/// Does a key change the results (and so belong to the recipe's hash), or only how the work is done?
enum class OptionRole { recipe, operational };

/**
 * @brief Receives the options of a phase. Phases describe their options to a visitor; apps/ turn the description into
 * Boost.Program_options for the command line and the INI file, into --print-config and into the recipe's hash.
 *
 * Sections: run gen rank logp train. A key in `run` is shared by all programs. Booleans are written on|off.
 * Lists are comma separated in a file (`learning-rate = 5e-7,3e-7`), and comma separated or repeated on the command line.
 */
class OptionVisitor {
  public:
    virtual ~OptionVisitor() = default;
    virtual void option(const char* section, const char* name, std::string& value, const char* help, OptionRole role) = 0;
    virtual void option(const char* section, const char* name, std::int64_t& value, const char* help, OptionRole role) = 0;
    virtual void option(const char* section, const char* name, double& value, const char* help, OptionRole role) = 0;
    virtual void option(const char* section, const char* name, bool& value, const char* help, OptionRole role) = 0;
    virtual void option(const char* section, const char* name, std::vector<double>& value, const char* help, OptionRole role) = 0;
    virtual void option(const char* section, const char* name, std::vector<std::string>& value, const char* help, OptionRole role) = 0;
};

/// Options common to all programs ([run] section unless noted).
struct CommonOptions {
    std::int64_t seed = 42;
    std::int64_t threads = 1;          ///< per rank
    std::string device = "cpu";        ///< cpu | cuda
    std::string dtype = "bf16";        ///< bf16 | fp32
    std::string engine = "auto";       ///< auto | xsmm | aten
    std::string progress = "auto";     ///< auto | on | off
    double collective_timeout = 1800;  ///< seconds that a rank waits in one collective; 0: for ever
    double walltime_margin = 0;        ///< seconds before the end of the batch job at which to stop; 0: not

    void describe(OptionVisitor& visitor);
    /// @throws Error usage on a word that is not listed above; Error configuration when CUDA is asked for but not built.
    void validate() const;
};

/// Keys that generation, log-probs and training must agree on ([run]).
struct EncodingOptions {
    std::string encoding = "chat";           ///< chat | recipe (the authors': selm/text/recipe_encoding.hpp)
    std::string chat_format;                 ///< empty: recognised from the model directory
    std::string bos_token, eos_token;        ///< recipe: id or text of a token, BOS also "none"; empty: the tokenizer's
    std::int64_t max_length = 1024;          ///< tokens of prompt + response
    std::int64_t max_prompt_length = 512;    ///< tokens
    std::string on_long_row = "stop";        ///< stop | cap: recipe rows that are longer than the model's context

    void describe(OptionVisitor& visitor);
    void describe_tokens(OptionVisitor& visitor); ///< all but on-long-row: what needs no model
    void validate() const;
};

} // namespace selm
