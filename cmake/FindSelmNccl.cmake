# selm::nccl: NVIDIA's collectives. Looked for in NCCL_ROOT, in the CUDA toolkit, in the usual places, and in the wheel
# nvidia-nccl of SELM_PYTHON_SITE (which has libnccl.so.2 without the name libnccl.so). src/comm/nccl_backend.cpp needs the
# non-blocking communicators and ncclCommFinalize of 2.14.
include(FindPackageHandleStandardArgs)
find_package(SelmCuda REQUIRED)
set(selm_nccl_wheel "${SELM_PYTHON_SITE}/nvidia/nccl")
find_path(SELM_NCCL_INCLUDE_DIR nccl.h HINTS "${NCCL_ROOT}/include" "$ENV{NCCL_ROOT}/include" ${CUDAToolkit_INCLUDE_DIRS}
          "${selm_nccl_wheel}/include")
find_library(SELM_NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS "${NCCL_ROOT}/lib" "${NCCL_ROOT}/lib64" "$ENV{NCCL_ROOT}/lib"
             "${CUDAToolkit_LIBRARY_DIR}" "${selm_nccl_wheel}/lib")
mark_as_advanced(SELM_NCCL_INCLUDE_DIR SELM_NCCL_LIBRARY)
set(SELM_NCCL_VERSION "")
if(SELM_NCCL_INCLUDE_DIR)
    file(STRINGS "${SELM_NCCL_INCLUDE_DIR}/nccl.h" selm_nccl_lines REGEX "^#define NCCL_(MAJOR|MINOR|PATCH) ")
    string(REGEX REPLACE "[^0-9;]" "" selm_nccl_lines "${selm_nccl_lines}")
    string(REPLACE ";" "." SELM_NCCL_VERSION "${selm_nccl_lines}")
endif()
find_package_handle_standard_args(SelmNccl REQUIRED_VARS SELM_NCCL_LIBRARY SELM_NCCL_INCLUDE_DIR VERSION_VAR SELM_NCCL_VERSION
    REASON_FAILURE_MESSAGE "NCCL (nccl.h and libnccl) is missing: the CUDA build moves gradients between GPUs with it. Install libnccl-dev or set NCCL_ROOT to a directory with include/nccl.h and lib/")
if(SelmNccl_FOUND AND NOT TARGET selm::nccl)
    add_library(selm::nccl INTERFACE IMPORTED)
    target_include_directories(selm::nccl SYSTEM INTERFACE "${SELM_NCCL_INCLUDE_DIR}")
    target_link_libraries(selm::nccl INTERFACE "${SELM_NCCL_LIBRARY}" selm::cuda)
endif()
