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

# The Communicator beside plain MPI: benchmarks/comm/run. With the tests, since one of them runs it.
add_executable(selm_comm_benchmark "${CMAKE_SOURCE_DIR}/benchmarks/comm/selm_comm_benchmark.cpp")
target_link_libraries(selm_comm_benchmark PRIVATE selm_flags selm::comm MPI::MPI_C)
set_target_properties(selm_comm_benchmark PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/benchmarks")
if(NOT SELM_BUILD_TESTS)
    set_target_properties(selm_comm_benchmark PROPERTIES EXCLUDE_FROM_ALL ON)
endif()
