# selm::torch: LibTorch.
# CPU: from the pip wheel in SELM_PYTHON_SITE. libtorch_cpu.so and libc10.so are linked directly: the
# wheel's own TorchConfig insists on a CUDA toolkit. libtorch_cpu.so needs libcudart and libcupti when it is loaded;
# the wheels nvidia-cuda-runtime and nvidia-cuda-cupti bring them (nvidia/cu13/lib).
# CUDA (SELM_ENABLE_CUDA): the wheel's (or the site's) TorchConfig.
include(FindPackageHandleStandardArgs)
set(selm_torch_root "${SELM_PYTHON_SITE}/torch")
set(SELM_TORCH_VERSION "unknown")
if(EXISTS "${selm_torch_root}/version.py")
    file(STRINGS "${selm_torch_root}/version.py" selm_torch_line REGEX "^__version__ = ")
    string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" SELM_TORCH_VERSION "${selm_torch_line}")
endif()

if(SELM_ENABLE_CUDA)
    if(CMAKE_CUDA_ARCHITECTURES AND NOT TORCH_CUDA_ARCH_LIST)
        message(FATAL_ERROR "Set TORCH_CUDA_ARCH_LIST beside CMAKE_CUDA_ARCHITECTURES (for example 9.0 and 90)")
    endif()
    # A wheel's CUDA libraries need the nvidia wheels beside it; without them the programs fail to link, name by name.
    if(EXISTS "${selm_torch_root}/lib/libtorch_nvshmem.so" AND NOT EXISTS "${SELM_PYTHON_SITE}/nvidia/cusparselt")
        message(FATAL_ERROR "LibTorch in ${SELM_PYTHON_SITE} lacks the nvidia wheels that its CUDA libraries need. "
                            "Run scripts/deps --reference, or set SELM_PYTHON_SITE to a site-packages directory of a whole `pip install torch`")
    endif()
    find_package(Torch REQUIRED HINTS "${selm_torch_root}/share/cmake/Torch")
    add_library(selm::torch INTERFACE IMPORTED)
    target_include_directories(selm::torch SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})
    # libtorch.so of the 2.11 wheel exports a copy of std::filesystem that calls null pointers beside an older libstdc++: the
    # real one has to come first.
    target_link_libraries(selm::torch INTERFACE "-Wl,--push-state,--no-as-needed,-lstdc++,--pop-state" ${TORCH_LIBRARIES})
    # Installed programs too must find a wheel that lies in the source tree.
    target_link_options(selm::torch INTERFACE "LINKER:-rpath,${TORCH_INSTALL_PREFIX}/lib")
    set(SelmTorch_FOUND TRUE)
    return()
endif()

find_library(SELM_TORCH_CPU_LIBRARY torch_cpu HINTS "${selm_torch_root}/lib" NO_CACHE)
find_library(SELM_C10_LIBRARY c10 HINTS "${selm_torch_root}/lib" NO_CACHE)
find_path(SELM_TORCH_INCLUDE_DIR ATen/ATen.h HINTS "${selm_torch_root}/include" NO_CACHE)
find_package_handle_standard_args(SelmTorch
    REQUIRED_VARS SELM_TORCH_CPU_LIBRARY SELM_C10_LIBRARY SELM_TORCH_INCLUDE_DIR VERSION_VAR SELM_TORCH_VERSION
    REASON_FAILURE_MESSAGE "Run scripts/deps, or set SELM_PYTHON_SITE to a site-packages directory with torch/")
if(SelmTorch_FOUND AND NOT TARGET selm_torch_cpu)
    cmake_path(GET SELM_TORCH_CPU_LIBRARY PARENT_PATH selm_torch_lib_dir)
    add_library(selm_c10 SHARED IMPORTED)
    set_target_properties(selm_c10 PROPERTIES IMPORTED_LOCATION "${SELM_C10_LIBRARY}")
    add_library(selm_torch_cpu SHARED IMPORTED)
    set_target_properties(selm_torch_cpu PROPERTIES IMPORTED_LOCATION "${SELM_TORCH_CPU_LIBRARY}")
    target_include_directories(selm_torch_cpu SYSTEM INTERFACE
        "${SELM_TORCH_INCLUDE_DIR}" "${SELM_TORCH_INCLUDE_DIR}/torch/csrc/api/include")
    target_link_libraries(selm_torch_cpu INTERFACE selm_c10)
    set(selm_cuda_runtime_dir "${SELM_PYTHON_SITE}/nvidia/cu13/lib")
    if(IS_DIRECTORY "${selm_cuda_runtime_dir}")
        target_link_options(selm_torch_cpu INTERFACE
            "LINKER:-rpath,${selm_torch_lib_dir}" "LINKER:-rpath,${selm_cuda_runtime_dir}"
            "LINKER:-rpath-link,${selm_cuda_runtime_dir}")
    endif()
    add_library(selm::torch INTERFACE IMPORTED)
    target_link_libraries(selm::torch INTERFACE selm_torch_cpu)
endif()
