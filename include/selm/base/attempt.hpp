#pragma once

#include <string>

namespace selm {

/*
 * Attempts. A node that is cut off goes on computing while its job is started again elsewhere, so two copies of a program
 * may work at one output. Each claims the next number of the place that it writes (docs/FORMATS.md, "Attempts"); what is
 * unfinished has names of its own, and a copy looks before every rename whether its number is still the newest.
 *
 * What this process has claimed is kept here, on rank 0, which alone renames and removes shared files. Nothing is collective.
 */

/// Claims a run directory: RUN/attempts/NNNNNN. Nothing new when this process (or the job script) has claimed it already.
/// @throws Error io, or stopped when a newer attempt has the place.
void claim_run(const std::string& run);
/// Claims an output file or directory: .attempts/NAME-NNNNNN beside it. One in a claimed run directory needs none.
/// @throws Error as claim_run().
void claim_output(const std::string& path);
/// Takes over the claim of a run directory that the job script made (SELM_ATTEMPT). @throws Error configuration: no such file.
void hold_attempt(const std::string& file);

/// In words, a newer attempt at anything that this process has claimed; empty: there is none. Cheap (looks for one file).
std::string newer_attempt();
/// True when this process shall stop: @p stop_file exists (empty: none), or there is a newer attempt.
bool told_to_stop(const std::string& stop_file);
/// Before @p path is replaced or removed. @throws Error stopped when a newer attempt has claimed it or what it lies in.
void check_newest_attempt(const std::string& path);

/// Tells this process from all others on any node; part of the names of unfinished files.
const std::string& process_tag();

} // namespace selm
