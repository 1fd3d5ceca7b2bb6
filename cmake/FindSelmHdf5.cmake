# selm::hdf5: parallel HDF5 and the MPI it needs (language C must be enabled; FindMPI's target MPI::MPI_C must exist).
set(HDF5_PREFER_PARALLEL ON)
find_package(HDF5 COMPONENTS C)
if(HDF5_FOUND AND NOT HDF5_IS_PARALLEL)
    message(FATAL_ERROR "HDF5 ${HDF5_VERSION} was found without MPI support (all ranks write one file together). "
                        "Install the parallel HDF5 (Debian: libhdf5-openmpi-dev) or point HDF5_ROOT at one.")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(SelmHdf5 REQUIRED_VARS HDF5_C_LIBRARIES VERSION_VAR HDF5_VERSION
    REASON_FAILURE_MESSAGE "Install the parallel HDF5 (Debian: libhdf5-openmpi-dev) or point HDF5_ROOT at one")
if(SelmHdf5_FOUND AND NOT TARGET selm::hdf5)
    add_library(selm::hdf5 INTERFACE IMPORTED)
    target_link_libraries(selm::hdf5 INTERFACE hdf5::hdf5 MPI::MPI_C)
endif()
