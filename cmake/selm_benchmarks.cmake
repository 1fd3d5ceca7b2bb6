# benchmarks/X_benchmark.cpp becomes the program benchmarks/X_benchmark of the build directory, where Google Benchmark
# (Debian: libbenchmark-dev) is installed. Not part of `all`: ninja kernels_benchmark.
find_package(benchmark QUIET)
if(benchmark_FOUND)
    file(GLOB benchmark_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/benchmarks/*_benchmark.cpp")
    foreach(source IN LISTS benchmark_sources)
        cmake_path(GET source STEM name)
        add_executable(${name} EXCLUDE_FROM_ALL ${source})
        target_link_libraries(${name} PRIVATE selm_flags selm::kernels benchmark::benchmark)
        set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/benchmarks")
    endforeach()
endif()

# Programs of benchmarks/run. The Communicator beside plain MPI: benchmarks/comm/run. With the tests, since some of them run these.
function(selm_benchmark_program name source)
    add_executable(${name} "${CMAKE_SOURCE_DIR}/benchmarks/${source}")
    target_link_libraries(${name} PRIVATE selm_flags ${ARGN})
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/benchmarks")
    if(NOT SELM_BUILD_TESTS)
        set_target_properties(${name} PROPERTIES EXCLUDE_FROM_ALL ON)
    endif()
endfunction()

selm_benchmark_program(selm_comm_benchmark comm/selm_comm_benchmark.cpp selm::comm MPI::MPI_C)
selm_benchmark_program(selm_roofline_benchmark machine/selm_roofline_benchmark.cpp selm::kernels selm::comm)
selm_benchmark_program(selm_write_benchmark machine/selm_write_benchmark.cpp selm::data selm::comm)
selm_benchmark_program(selm_tokenizer_benchmark machine/selm_tokenizer_benchmark.cpp selm::text)
selm_benchmark_program(selm_adamw_benchmark machine/selm_adamw_benchmark.cpp selm::kernels nlohmann_json::nlohmann_json)
