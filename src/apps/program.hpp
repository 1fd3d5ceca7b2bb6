#pragma once

#include <functional>
#include <iostream>
#include <string>

#include "selm/base/error.hpp"
#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"

namespace selm::apps {

/// What a program is: its options and how to use it.
struct ProgramSpec {
    std::string name;                                ///< selm_gen
    std::string purpose;                             ///< one line
    std::string example;                             ///< arguments of a typical call
    std::function<void(OptionVisitor&)> describe;    ///< binds the options' variables
    std::function<void()> validate;                  ///< after the values are set; may be empty
    std::string positional;                          ///< option that an argument without -- sets; may be empty
    std::string alone = {};                          ///< switch with which one process works, without MPI and Kokkos; may be empty
    bool one_rank_works = false;                     ///< started by itself, not by a launcher, it runs without MPI
    std::string plans = {};                          ///< switch with which nothing is computed, so that ranks' places do not matter; may be empty
};

/// What a program's body gets.
struct ProgramContext {
    Communicator& world;
    std::string config_text; ///< effective configuration, as an INI file
    std::string recipe_text; ///< sorted "section.key = value" lines of the keys that change results
    std::string recipe_hash; ///< of recipe_text
};

/**
 * @brief The life of a program: stop handlers, MPI, options (command line over --config over default), Kokkos, the body,
 * and the end of all ranks with one exit code.
 *
 * An Error is told once: by rank 0 where all ranks have it (the rule), else by the lowest rank that has one. A rank with an
 * Error that the others do not share would leave them waiting for ever: after a grace of 60 s (SELM_EXIT_GRACE_S), or
 * when their watchdog asks for it (--collective-timeout), it tells its Error and aborts the job. Exceptions other than Error abort at once with code 70.
 */
int run_program(int argc, char** argv, const ProgramSpec& spec, const std::function<ExitCode(ProgramContext&)>& body);

} // namespace selm::apps
