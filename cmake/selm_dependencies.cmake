# Third-party packages as targets: MPI::MPI_C selm::hdf5 selm::kokkos selm::torch selm::parquet selm::xsmm selm::pcre2
# selm::sentencepiece selm::xxhash nlohmann_json::nlohmann_json Boost::program_options GTest::gtest, and with
# SELM_ENABLE_CUDA selm::cuda selm::nccl.

find_package(Threads REQUIRED)

# --- MPI (the C interface; the C++ bindings of MPI-2 are left out)
find_package(MPI REQUIRED COMPONENTS C)
target_compile_definitions(MPI::MPI_C INTERFACE OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)
set(SELM_MPI_TEXT "${MPI_C_VERSION}")

# --- HDF5, parallel
find_package(SelmHdf5 REQUIRED)

# --- Boost.Program_options, nlohmann_json
find_package(Boost 1.74 REQUIRED COMPONENTS program_options)
find_package(nlohmann_json 3.11 REQUIRED)

# --- the ones with a find module of their own (cmake/Find*.cmake)
find_package(SelmKokkos REQUIRED)
find_package(SelmXsmm REQUIRED)
find_package(SelmPcre2 REQUIRED)
find_package(SelmSentencepiece REQUIRED)
find_package(SelmXxhash REQUIRED)

if(NOT SELM_PYTHON_SITE)
    # LibTorch's CUDA libraries need the nvidia wheels that .venv leaves out and .venv-reference has.
    set(selm_site_candidates "")
    if(SELM_ENABLE_CUDA)
        file(GLOB selm_site_candidates "${CMAKE_SOURCE_DIR}/.venv-reference/lib/python3*/site-packages")
    endif()
    if(NOT selm_site_candidates)
        file(GLOB selm_site_candidates "${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages")
    endif()
    if(selm_site_candidates)
        list(GET selm_site_candidates 0 selm_site)
        set(SELM_PYTHON_SITE "${selm_site}" CACHE PATH "site-packages directory with torch/ and pyarrow/" FORCE)
    endif()
endif()
if(SELM_ENABLE_CUDA)
    find_package(SelmCuda REQUIRED)
    find_package(SelmNccl 2.14 REQUIRED)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Shared) # the runtime that LibTorch loads: one per process
    set(CMAKE_CUDA_STANDARD 17)            # CMake 3.25 knows no C++20 flag for current nvcc
    enable_language(CUDA)
endif()
find_package(SelmTorch REQUIRED)
find_package(SelmParquet REQUIRED)

if(SELM_BUILD_TESTS)
    find_package(GTest REQUIRED)
    find_package(Python3 REQUIRED COMPONENTS Interpreter)
endif()
