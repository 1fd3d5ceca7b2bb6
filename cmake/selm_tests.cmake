# Tests. ctest labels: unit, mpi, oracle (Python references), cli (shell), slurm (batch scripts on a real SLURM; long
# ones also faults), layering, gpu (the CUDA build alone; skipped where no device is visible), soak (random faults; only with ctest -C soak).
# Every test has a time limit.

# Seconds that a test may take; sanitized programs are several times slower.
set(selm_time_factor 1)
if(SELM_SANITIZE)
    set(selm_time_factor 5)
endif()
math(EXPR selm_test_timeout "120 * ${selm_time_factor}")
math(EXPR selm_test_watchdog "100 * ${selm_time_factor}")
math(EXPR selm_oracle_timeout "1800 * ${selm_time_factor}")
math(EXPR selm_cli_timeout "600 * ${selm_time_factor}")

set(selm_test_modules base comm h5 data text kernels model algo shard rank phases apps)
set(selm_modules_with_kokkos kernels model shard rank phases apps)
set(selm_test_environment
    "OMP_NUM_THREADS=1"
    "OMPI_ALLOW_RUN_AS_ROOT=1"
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    "OMPI_MCA_mpi_yield_when_idle=1"
    "OMPI_MCA_rmaps_base_oversubscribe=1"
    "OMPI_MCA_hwloc_base_binding_policy=none"
    "OMPI_MCA_btl_vader_single_copy_mechanism=none"
    "LSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/support/lsan.supp:print_suppressions=0"
    "UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1"
    "SELM_BIN_DIR=${CMAKE_BINARY_DIR}/bin"
    "SELM_TOOL_DIR=${CMAKE_BINARY_DIR}/tests"
    "SELM_SOURCE_DIR=${CMAKE_SOURCE_DIR}"
    "SELM_SMOLLM2_DIR=${SELM_SMOLLM2_DIR}"
    "SELM_REFERENCE_PYTHON=${SELM_REFERENCE_PYTHON}"
    "SELM_MPIEXEC=${MPIEXEC_EXECUTABLE}")

# MPI unloads its plug-ins when it ends, so that leaks in them have no names to suppress; memory is checked for leaks by the unit
# tests, which use no MPI.
set(selm_mpi_environment ${selm_test_environment} "ASAN_OPTIONS=detect_leaks=0")

# A directory of its own for the files of each test's MPI: one program that ends removes what is empty of the shared one, also
# beneath another that is just starting.
function(selm_mpi_session_directory name variable)
    set(directory "${CMAKE_BINARY_DIR}/ompi/${name}")
    file(MAKE_DIRECTORY "${directory}")
    set(${variable} "OMPI_MCA_orte_tmpdir_base=${directory}" PARENT_SCOPE)
endfunction()

# Flags that let a laptop run more ranks than it has cores.
execute_process(COMMAND ${MPIEXEC_EXECUTABLE} --version OUTPUT_VARIABLE selm_mpiexec_version ERROR_QUIET)
set(selm_mpiexec_flags "")
if(selm_mpiexec_version MATCHES "Open MPI|OpenRTE|open-mpi")
    set(selm_mpiexec_flags --oversubscribe --bind-to none)
endif()

function(selm_test_program target main_source module)
    add_executable(${target} ${main_source} ${ARGN})
    target_include_directories(${target} PRIVATE "${CMAKE_SOURCE_DIR}/tests/support" "${CMAKE_SOURCE_DIR}/src/${module}")
    target_link_libraries(${target} PRIVATE selm_flags selm::${module} GTest::gtest nlohmann_json::nlohmann_json)
    target_compile_definitions(${target} PRIVATE SELM_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
    if(module IN_LIST selm_modules_with_kokkos)
        target_link_libraries(${target} PRIVATE selm::kokkos)
        target_compile_definitions(${target} PRIVATE SELM_TEST_WITH_KOKKOS)
    endif()
    if(module MATCHES "^(kernels|model)$") # tests/support/aten_parts_on_cpu.hpp
        target_link_libraries(${target} PRIVATE selm::torch)
        target_include_directories(${target} PRIVATE "${CMAKE_SOURCE_DIR}/src/kernels")
    endif()
    set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
endfunction()

foreach(module IN LISTS selm_test_modules)
    file(GLOB unit_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/unit/${module}/*.cpp")
    if(unit_sources)
        selm_test_program(unit_${module} "${CMAKE_SOURCE_DIR}/tests/support/unit_main.cpp" ${module} ${unit_sources})
        add_test(NAME unit_${module} COMMAND unit_${module})
        set_tests_properties(unit_${module} PROPERTIES LABELS unit TIMEOUT ${selm_test_timeout} ENVIRONMENT "${selm_test_environment}")
    endif()

    file(GLOB mpi_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/mpi/${module}/*.cpp")
    if(mpi_sources)
        selm_test_program(mpi_${module} "${CMAKE_SOURCE_DIR}/tests/support/mpi_main.cpp" ${module} ${mpi_sources})
        target_link_libraries(mpi_${module} PRIVATE selm::comm)
        foreach(ranks RANGE 1 4)
            add_test(NAME mpi_${module}_np${ranks}
                     COMMAND ${MPIEXEC_EXECUTABLE} ${selm_mpiexec_flags} ${MPIEXEC_NUMPROC_FLAG} ${ranks}
                             $<TARGET_FILE:mpi_${module}>)
            selm_mpi_session_directory(mpi_${module}_np${ranks} session_directory)
            set_tests_properties(mpi_${module}_np${ranks} PROPERTIES
                LABELS mpi TIMEOUT ${selm_test_timeout} PROCESSORS ${ranks}
                ENVIRONMENT "${selm_mpi_environment};${session_directory};SELM_TEST_WATCHDOG_S=${selm_test_watchdog}")
        endforeach()
    endif()
endforeach()

# --- on CUDA devices: the parameter `cuda` of the kernels' tests, and tests/gpu/MODULE on 1 to 4 ranks
if(SELM_ENABLE_CUDA)
    set(selm_gpu_properties LABELS gpu TIMEOUT ${selm_test_timeout} RUN_SERIAL TRUE SKIP_REGULAR_EXPRESSION "no CUDA device is visible")
    add_test(NAME gpu_kernels COMMAND unit_kernels "--gtest_filter=*/*cuda:*.cuda")
    set_tests_properties(gpu_kernels PROPERTIES ${selm_gpu_properties} ENVIRONMENT "${selm_test_environment}")
    foreach(module comm)
        file(GLOB gpu_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/gpu/${module}/*.cpp")
        if(gpu_sources)
            selm_test_program(gpu_${module} "${CMAKE_SOURCE_DIR}/tests/support/mpi_main.cpp" ${module} ${gpu_sources})
            target_link_libraries(gpu_${module} PRIVATE selm::comm selm::kernels)
            foreach(ranks RANGE 1 4)
                add_test(NAME gpu_${module}_np${ranks}
                         COMMAND ${MPIEXEC_EXECUTABLE} ${selm_mpiexec_flags} ${MPIEXEC_NUMPROC_FLAG} ${ranks}
                                 $<TARGET_FILE:gpu_${module}>)
                set_tests_properties(gpu_${module}_np${ranks} PROPERTIES ${selm_gpu_properties} PROCESSORS ${ranks}
                    ENVIRONMENT "${selm_mpi_environment};SELM_TEST_WATCHDOG_S=${selm_test_watchdog}")
            endforeach()
        endif()
    endforeach()
endif()

# --- tests/support/tools/NAME.cpp: a program that Python references talk to, linked to the modules whose headers it includes
file(GLOB tool_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/support/tools/*.cpp")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${tool_sources})
foreach(source IN LISTS tool_sources)
    cmake_path(GET source STEM name)
    file(STRINGS "${source}" tool_modules REGEX "^#include \"selm/")
    list(TRANSFORM tool_modules REPLACE "^#include \"selm/([^/]+)/.*$" "selm::\\1")
    file(STRINGS "${source}" tool_apps REGEX "^#include \"program.hpp\"")
    if(tool_apps)
        list(APPEND tool_modules selm::apps)
    endif()
    list(REMOVE_DUPLICATES tool_modules)
    add_executable(${name} ${source})
    target_link_libraries(${name} PRIVATE selm_flags ${tool_modules} nlohmann_json::nlohmann_json)
    target_include_directories(${name} PRIVATE "${CMAKE_SOURCE_DIR}/tests/support")
    target_compile_definitions(${name} PRIVATE SELM_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
endforeach()

# --- Python references: only with the reference environment (scripts/test sets it)
if(SELM_REFERENCE_PYTHON)
    file(GLOB oracle_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/oracle/test_*.py")
    foreach(source IN LISTS oracle_sources)
        cmake_path(GET source STEM name)
        string(REGEX REPLACE "^test_" "" name "${name}")
        add_test(NAME oracle_${name} COMMAND ${SELM_REFERENCE_PYTHON} -m pytest -q -p no:cacheprovider "${source}")
        selm_mpi_session_directory(oracle_${name} session_directory)
        set_tests_properties(oracle_${name} PROPERTIES LABELS oracle TIMEOUT ${selm_oracle_timeout}
            ENVIRONMENT "${selm_mpi_environment};${session_directory}")
    endforeach()
endif()

# --- the programs from a shell
file(GLOB cli_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/cli/test_*.sh")
foreach(source IN LISTS cli_sources)
    cmake_path(GET source STEM name)
    string(REGEX REPLACE "^test_" "" name "${name}")
    add_test(NAME cli_${name} COMMAND bash "${source}")
    selm_mpi_session_directory(cli_${name} session_directory)
    set_tests_properties(cli_${name} PROPERTIES LABELS cli TIMEOUT ${selm_cli_timeout} SKIP_RETURN_CODE 77
        ENVIRONMENT "${selm_mpi_environment};${session_directory}")
endforeach()

# --- batch scripts, most of them on a SLURM of virtual nodes that the test starts (skipped where none can be made)
file(GLOB job_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/tests/jobs/test_*.sh")
foreach(source IN LISTS job_sources)
    cmake_path(GET source STEM name)
    string(REGEX REPLACE "^test_" "" name "${name}")
    # Faults in each phase take minutes each, most of them waiting for SLURM to notice: ctest -L slurm -LE faults leaves them out.
    set(labels slurm)
    if(name MATCHES "^(signals|resubmit|power|split)$")
        list(APPEND labels faults)
    endif()
    add_test(NAME slurm_${name} COMMAND bash "${source}")
    set_tests_properties(slurm_${name} PROPERTIES LABELS "${labels}" TIMEOUT 1800 SKIP_RETURN_CODE 77 RUN_SERIAL TRUE
        ENVIRONMENT "${selm_mpi_environment}")
endforeach()
# Random faults for half an hour: only with ctest -C soak -L soak.
add_test(NAME soak COMMAND bash "${CMAKE_SOURCE_DIR}/tests/jobs/soak.sh" CONFIGURATIONS soak)
set_tests_properties(soak PROPERTIES LABELS soak TIMEOUT 3600 SKIP_RETURN_CODE 77 RUN_SERIAL TRUE ENVIRONMENT "${selm_mpi_environment}")
add_test(NAME soak_kill_training COMMAND ${Python3_EXECUTABLE} -B "${CMAKE_SOURCE_DIR}/tests/soak/kill_training.py" CONFIGURATIONS soak)
set_tests_properties(soak_kill_training PROPERTIES LABELS soak TIMEOUT 7200 RUN_SERIAL TRUE ENVIRONMENT "${selm_mpi_environment}")

# --- who may include whom
add_test(NAME layering COMMAND ${Python3_EXECUTABLE} "${CMAKE_SOURCE_DIR}/tests/layering/check_layering.py" "${CMAKE_SOURCE_DIR}")
add_test(NAME layering_self_check
         COMMAND ${Python3_EXECUTABLE} "${CMAKE_SOURCE_DIR}/tests/layering/check_layering.py" --self-check)
set_tests_properties(layering layering_self_check PROPERTIES LABELS layering TIMEOUT 60)
