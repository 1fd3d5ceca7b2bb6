#include "program.hpp"

#include <chrono>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <optional>
#include <vector>

#include <Kokkos_Core.hpp>

#include "known_keys.hpp"
#include "option_table.hpp"
#include "selm/base/attempt.hpp"
#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/base/provenance.hpp"
#include "selm/base/stop.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/places.hpp"
#include "selm/comm/session.hpp"
#include "selm/comm/watchdog.hpp"

namespace selm::apps {

namespace {

/// The rank that a launcher gave this process, before MPI is up: help texts appear once and need no MPI.
bool is_first_process()
{
    for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"})
        if (const char* const value = std::getenv(name))
            return std::string(value) == "0";
    return true;
}

std::string short_usage(const ProgramSpec& spec)
{
    return cat(spec.name, ": ", spec.purpose, "\nusage: ", spec.name, " ", spec.example, "\n       ", spec.name,
               " --help lists all options\n");
}

/// Output that needs neither options' values nor MPI; nullopt when there is work to do.
std::optional<int> answer_without_work(const ProgramSpec& spec, const OptionTable& table, const std::vector<std::string>& arguments,
                                       const OptionTable::Request& request)
{
    const bool speak = is_first_process();
    if (arguments.empty()) {
        if (speak)
            std::cerr << short_usage(spec);
        return static_cast<int>(ExitCode::usage);
    }
    if (request.help) {
        if (speak)
            std::cout << table.help(spec.name, spec.purpose);
        return 0;
    }
    if (request.version) {
        if (speak)
            std::cout << software_version() << "\n" << build_description() << "\n";
        return 0;
    }
    return std::nullopt;
}

/// A phase's validate() speaks of "--name"; when a file set that name, the file is to blame, with its exit code.
Error blame_config(const Error& error, const OptionTable& table)
{
    const std::string message = error.what();
    const std::size_t begin = message.find("--");
    if (error.code() != ExitCode::usage || begin == std::string::npos)
        return error;
    const std::size_t end = std::min(message.find_first_of(" =:,.'\"", begin), message.size());
    const std::string place = table.config_place(message.substr(begin + 2, end - begin - 2));
    return place.empty() ? error : config_error(place + ": " + message);
}

void set_values(const ProgramSpec& spec, OptionTable& table, const OptionTable::Request& request, Communicator& world)
{
    if (!request.config.empty()) {
        const std::string text = root_string(world, "configuration file", [&]() -> std::string {
            try {
                return read_file(request.config);
            } catch (const Error& error) {
                throw config_error(error.what());
            }
        });
        table.read_config(text, request.config, all_known_keys());
    }
    table.apply();
    if (!spec.validate || request.print_config)
        return;
    try {
        spec.validate();
    } catch (const Error& error) {
        throw blame_config(error, table);
    }
}

/// Kokkos reads no command line here: 3.x would take --threads and --device for its own.
class KokkosSession {
  public:
    explicit KokkosSession(std::int64_t threads)
    {
#if KOKKOS_VERSION >= 30700
        Kokkos::initialize(Kokkos::InitializationSettings().set_num_threads(static_cast<int>(threads)));
#else
        Kokkos::InitArguments arguments;
        arguments.num_threads = static_cast<int>(threads);
        Kokkos::initialize(arguments);
#endif
    }
    ~KokkosSession() { Kokkos::finalize(); }
    KokkosSession(const KokkosSession&) = delete;
    KokkosSession& operator=(const KokkosSession&) = delete;
};

/// The values of CommonOptions that a program itself needs, wherever its phase holds them.
class CommonValues final : public OptionVisitor {
  public:
    std::int64_t threads = 1;
    double collective_timeout = 0;
    std::string device; ///< empty: the program has no such option, and computes nothing

    explicit CommonValues(const ProgramSpec& spec) { spec.describe(*this); }
    void option(const char* section, const char* name, std::string& value, const char*, OptionRole) override
    {
        if (std::string(section) == "run" && std::string(name) == "device")
            device = value;
    }
    void option(const char* section, const char* name, std::int64_t& value, const char*, OptionRole) override
    {
        if (std::string(section) == "run" && std::string(name) == "threads")
            threads = value;
    }
    void option(const char* section, const char* name, double& value, const char*, OptionRole) override
    {
        if (std::string(section) == "run" && std::string(name) == "collective-timeout")
            collective_timeout = value;
    }
    void option(const char*, const char*, bool&, const char*, OptionRole) override {}
    void option(const char*, const char*, std::vector<double>&, const char*, OptionRole) override {}
    void option(const char*, const char*, std::vector<std::string>&, const char*, OptionRole) override {}
};

/// Answers that a login node gives, where neither MPI nor a device may start.
bool is_alone(const ProgramSpec& spec, const OptionTable& table)
{
    return !spec.alone.empty() && table.switched_on(spec.alone);
}

/// A phase that stopped early does not say why when the reason is another copy of it.
void tell_of_newer_attempt(Communicator& world)
{
    agree(world, "attempt", [&] {
        const std::string newer = world.is_root() ? newer_attempt() : std::string();
        SELM_VALIDATE(newer.empty(), ExitCode::stopped, newer << "; this one stops and changes nothing there");
    });
}

/// Who runs where, before any work: most slow runs are ranks that were given one core together. Collective.
void tell_places(Communicator& world, const CommonValues& values)
{
    const std::vector<RankPlace> places = find_places(world, values.device == "cuda");
    for (const std::string& line : describe_places(places))
        log_root(LogLevel::info, line);
    for (const std::string& line : warn_of_shared_cores(places, values.threads))
        log_root(LogLevel::warning, line);
}

ExitCode run_body(const ProgramSpec& spec, OptionTable& table, const OptionTable::Request& request, Communicator& world,
                  const std::function<ExitCode(ProgramContext&)>& body)
{
    set_values(spec, table, request, world);
    if (request.print_config) {
        if (world.is_root())
            std::cout << table.config_text() << std::flush;
        return ExitCode::done;
    }
    agree(world, "attempt of the job", [&] {
        if (const char* const file = std::getenv("SELM_ATTEMPT"); file != nullptr && *file != '\0' && world.is_root())
            hold_attempt(file);
    });
    for (const std::string& warning : table.warnings())
        log_root(LogLevel::warning, warning);
    const CommonValues values(spec);
    set_collective_timeout(values.collective_timeout);
    std::optional<KokkosSession> kokkos;
    if (!is_alone(spec, table)) {
        if (!values.device.empty() && (spec.plans.empty() || !table.switched_on(spec.plans)))
            tell_places(world, values);
        kokkos.emplace(values.threads);
    }
    const std::string recipe = table.recipe_text();
    ProgramContext context{world, table.config_text(), recipe, hash_hex(recipe)};
    const ExitCode code = body(context);
    std::cout << std::flush;
    agree(world, "output", [] {
        SELM_VALIDATE(std::cout.good(), ExitCode::io, "writing to standard output failed (disk full or closed pipe?)");
    });
    if (code == ExitCode::stopped)
        tell_of_newer_attempt(world);
    return code;
}

std::string error_line(const ProgramSpec& spec, const Error& error)
{
    return cat(spec.name, ": error: ", error.what(), " [exit code ", static_cast<int>(error.code()), "]\n");
}

double exit_grace_s()
{
    const char* const text = std::getenv("SELM_EXIT_GRACE_S");
    const double seconds = text != nullptr ? std::atof(text) : 0;
    return seconds > 0 ? seconds : 60;
}

std::string rank_prefix(const Communicator& world)
{
    return cat("[rank ", world.rank(), "/", world.size(), "] ");
}

/// All ranks meet; the lowest with an Error tells it. Returns the code all of them exit with.
int leave_together(const ProgramSpec& spec, const MpiSession& session, ExitCode code, const std::optional<Error>& error)
{
    Communicator& world = session.world();
    const auto start = std::chrono::steady_clock::now();
    const std::uint64_t inquiries = watchdog_inquiries();
    if (error)
        tell_watchdogs_of_error();
    world.sleeping_barrier("end of the program", [&] {
        const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
        const bool missed = watchdog_inquiries() > inquiries; // the others have waited for their timeout already
        if (error && (missed || waited.count() > exit_grace_s())) {
            log_verbatim(cat(rank_prefix(world), error_line(spec, *error), rank_prefix(world),
                             "the other ranks did not come to this end: aborting them\n"));
            session.abort(static_cast<int>(error->code()));
        }
    });
    const std::int64_t speaker = all_reduce_value(world, static_cast<std::int64_t>(error ? world.rank() : world.size()),
                                                  ReduceOp::min, "end of the program");
    if (speaker == world.rank())
        log_verbatim(error_line(spec, *error));
    const auto own = static_cast<std::int64_t>(error ? error->code() : code);
    if (speaker == world.size())
        return static_cast<int>(all_reduce_value(world, own, ReduceOp::max, "end of the program"));
    auto codes = all_gather_value(world, own, "end of the program");
    return static_cast<int>(codes[static_cast<std::size_t>(speaker)]);
}

/// For job scripts, in the file that @p variable names: srun may report success when it could not start a single rank, and ranks
/// that die while MPI starts are started again. A mark that cannot be written is no start and no success to the script.
void leave_mark(const char* variable)
{
    if (const char* const file = std::getenv(variable); file != nullptr && *file != '\0')
        std::ofstream(file) << "yes\n";
}

int run_with_mpi(int argc, char** argv, const ProgramSpec& spec, OptionTable& table, const OptionTable::Request& request,
                 const std::function<ExitCode(ProgramContext&)>& body)
{
    const MpiSession session(argc, argv, spec.one_rank_works ? MpiStart::when_launched : MpiStart::always);
    Communicator& world = session.world(); // made together by all ranks: none is in MPI_Init any more
    if (world.is_root())
        leave_mark("SELM_START_FILE");
    try {
        ExitCode code = ExitCode::done;
        std::optional<Error> failure;
        try {
            code = run_body(spec, table, request, world, body);
        } catch (const Error& error) {
            failure = error;
            // An older copy may fail over files that the newer one tidied up.
            const std::string newer = world.is_root() ? newer_attempt() : std::string();
            if (!newer.empty() && error.code() != ExitCode::stopped)
                failure = Error(ExitCode::stopped, cat(newer, "; this one stops and changes nothing there (", error.what(), ")"));
        }
        const int left_with = leave_together(spec, session, code, failure);
        if (left_with == 0 && world.is_root())
            leave_mark("SELM_DONE_FILE");
        return left_with;
    } catch (const std::bad_alloc&) {
        log_verbatim(cat(rank_prefix(world), spec.name,
                         ": error: out of memory. Use fewer ranks on a node, fewer slots or smaller microbatches [exit code 70]\n"));
    } catch (const std::exception& error) {
        log_verbatim(cat(rank_prefix(world), spec.name, ": unexpected error: ", error.what(), " [exit code 70]\n"));
    }
    session.abort(static_cast<int>(ExitCode::internal));
}

/// Before the constructors of shared libraries, of which some take a long time: a stop signal that comes while a program
/// starts must not kill it.
[[gnu::used, gnu::section(".preinit_array")]] void (*const handlers_before_all)() = install_stop_handlers;

} // namespace

int run_program(int argc, char** argv, const ProgramSpec& spec, const std::function<ExitCode(ProgramContext&)>& body)
{
    install_stop_handlers();
    try {
        OptionTable table(spec.describe);
        const std::vector<std::string> arguments(argv + 1, argv + argc);
        const OptionTable::Request request = table.read_command_line(arguments, spec.positional);
        if (const auto code = answer_without_work(spec, table, arguments, request))
            return *code;
        if (is_alone(spec, table)) {
            const auto alone = make_single_communicator();
            return is_first_process() ? static_cast<int>(run_body(spec, table, request, *alone, body)) : 0;
        }
        return run_with_mpi(argc, argv, spec, table, request, body);
    } catch (const Error& error) {
        if (is_first_process())
            log_verbatim(error_line(spec, error));
        return static_cast<int>(error.code());
    } catch (const std::exception& error) {
        log_verbatim(cat(spec.name, ": unexpected error: ", error.what(), "\n"));
        return static_cast<int>(ExitCode::internal);
    }
}

} // namespace selm::apps
