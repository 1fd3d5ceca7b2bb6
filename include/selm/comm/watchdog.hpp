#pragma once

#include <cstdint>

namespace selm {

/**
 * @brief Seconds that a rank waits in one collective before it finds out who is late; 0 (the default): for ever.
 *
 * Process wide, the same on all ranks. A rank that waited so long asks the ranks of the communicator, on a communicator
 * of the watchdog's own, where they are. Ranks inside a wait of this module answer; after a grace (a tenth of the timeout,
 * 0.5 s to 5 s) one rank tells on stderr which collective did not finish and who is late or elsewhere, and aborts all
 * ranks with exit code 70. A sleeping_barrier goes on waiting while all missing ranks show signs of life (they take or send
 * messages). Waits inside other libraries (collective HDF5 calls) are not watched.
 */
void set_collective_timeout(double seconds);
double collective_timeout();

/// How often another rank's watchdog has asked this rank so far. Not collective.
std::uint64_t watchdog_inquiries();

/// From now on watchdogs that ask this rank are told that it has an Error, which it will tell, and abort: they stay silent
/// for half a minute. Not collective.
void tell_watchdogs_of_error();

} // namespace selm
