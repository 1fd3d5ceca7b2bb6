# selm::cuda: the CUDA runtime (shared: the one that LibTorch loads), for C++ sources that call it. Kernels in *.cu are
# compiled by language CUDA, which cmake/selm_dependencies.cmake enables.
include(FindPackageHandleStandardArgs)
find_package(CUDAToolkit 12 QUIET)
if(TARGET CUDA::cudart AND NOT TARGET selm::cuda)
    add_library(selm::cuda INTERFACE IMPORTED)
    target_link_libraries(selm::cuda INTERFACE CUDA::cudart)
endif()
find_package_handle_standard_args(SelmCuda REQUIRED_VARS CUDAToolkit_BIN_DIR CUDA_cudart_LIBRARY VERSION_VAR CUDAToolkit_VERSION
    REASON_FAILURE_MESSAGE "The CUDA build needs CUDA toolkit 12 or later: put nvcc into PATH or set CUDAToolkit_ROOT, or build without SELM_ENABLE_CUDA")
