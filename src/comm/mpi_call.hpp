#pragma once

#include <string_view>

#include <mpi.h>

namespace selm::comm {

/// Throws Error internal with the collective's label and MPI's own text unless @p status is MPI_SUCCESS.
void check_mpi(int status, const char* call, std::string_view label);

} // namespace selm::comm

#define SELM_MPI(label, call) ::selm::comm::check_mpi((call), #call, (label))
