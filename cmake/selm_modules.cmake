# Targets of the modules and programs, and the flags that all of them share.

add_library(selm_flags INTERFACE)
# Flags for the C++ compiler; nvcc (*.cu) has its own.
function(selm_add_flags)
    foreach(flag IN LISTS ARGN)
        target_compile_options(selm_flags INTERFACE "$<$<NOT:$<COMPILE_LANGUAGE:CUDA>>:${flag}>")
    endforeach()
endfunction()
selm_add_flags(-Wall -Wextra)
if(SELM_WARNINGS_AS_ERRORS)
    # GCC 12 reports std::string's own operator+ as an overlapping copy (GCC bug 105651).
    selm_add_flags(-Werror $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-restrict>)
endif()
if(SELM_NATIVE)
    selm_add_flags(-march=native)
endif()
if(SELM_SANITIZE)
    selm_add_flags(-fsanitize=${SELM_SANITIZE} -fno-omit-frame-pointer)
    target_link_options(selm_flags INTERFACE -fsanitize=${SELM_SANITIZE})
endif()
if(SELM_ENABLE_CUDA)
    target_compile_definitions(selm_flags INTERFACE SELM_ENABLE_CUDA=1)
endif()

# Version and git commit, refreshed at every build, rewritten only when changed.
set(SELM_GENERATED_DIR "${CMAKE_BINARY_DIR}/generated")
string(TOUPPER "${CMAKE_BUILD_TYPE}" selm_build_type_upper)
set(selm_native_text "")
if(SELM_NATIVE)
    set(selm_native_text " -march=native")
endif()
set(selm_sanitize_text "")
if(SELM_SANITIZE)
    set(selm_sanitize_text " -fsanitize=${SELM_SANITIZE}")
endif()
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${selm_build_type_upper}}${selm_native_text}${selm_sanitize_text}" selm_flag_text)
string(JOIN ", " selm_library_text
       "MPI ${SELM_MPI_TEXT}" "HDF5 ${HDF5_VERSION}" "Kokkos ${SELM_KOKKOS_VERSION}" "LibTorch ${SELM_TORCH_VERSION}"
       "Arrow ${SELM_ARROW_VERSION}" "Boost ${Boost_VERSION_STRING}")
if(SELM_ENABLE_CUDA)
    string(APPEND selm_library_text ", CUDA ${CUDAToolkit_VERSION}, NCCL ${SELM_NCCL_VERSION}")
endif()
add_custom_target(selm_build_info
    COMMAND ${CMAKE_COMMAND} -DSOURCE_DIR=${CMAKE_SOURCE_DIR} -DOUTPUT=${SELM_GENERATED_DIR}/selm_build_info.hpp
            -DVERSION=${PROJECT_VERSION} "-DCOMPILER=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
            "-DFLAGS=${selm_flag_text}" "-DLIBRARIES=${selm_library_text}"
            -P ${CMAKE_SOURCE_DIR}/cmake/write_build_info.cmake
    BYPRODUCTS ${SELM_GENERATED_DIR}/selm_build_info.hpp
    VERBATIM)

# selm_add_module(NAME [MODULES m...] [PUBLIC lib...] [PRIVATE lib...]): target selm_NAME, alias selm::NAME, from
# src/NAME/*.cpp. MODULES are linked PUBLIC, because public headers include theirs. Without sources: an interface library.
# Files named cuda_* and nccl_* (.cpp, .cu) belong to the CUDA build alone. aten_* belong to the module there, and in the CPU build
# to a library that plugin_* load when they are wanted: selm_add_plugin.
function(selm_add_module name)
    cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "MODULES;PUBLIC;PRIVATE")
    file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/src/${name}/*.cpp" "${CMAKE_SOURCE_DIR}/src/${name}/*.cu")
    if(NOT SELM_ENABLE_CUDA)
        list(FILTER sources EXCLUDE REGEX "/(cuda|nccl|aten)_[^/]*$")
    else()
        list(FILTER sources EXCLUDE REGEX "/plugin_[^/]*$")
    endif()
    list(TRANSFORM arg_MODULES PREPEND "selm::")
    if(sources)
        add_library(selm_${name} STATIC ${sources})
        target_include_directories(selm_${name} PUBLIC "$<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/include>"
                                   PRIVATE "${CMAKE_SOURCE_DIR}/src/${name}")
        target_link_libraries(selm_${name} PUBLIC ${arg_MODULES} ${arg_PUBLIC} PRIVATE selm_flags ${arg_PRIVATE})
        set_target_properties(selm_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
        if(name STREQUAL "base")
            target_include_directories(selm_base PRIVATE "${SELM_GENERATED_DIR}")
            add_dependencies(selm_base selm_build_info)
        endif()
    else()
        add_library(selm_${name} INTERFACE)
        target_include_directories(selm_${name} INTERFACE "$<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/include>")
        target_link_libraries(selm_${name} INTERFACE ${arg_MODULES} ${arg_PUBLIC} ${arg_PRIVATE})
    endif()
    add_library(selm::${name} ALIAS selm_${name})
endfunction()

# selm_add_plugin(NAME MODULE m MODULES m... LIBRARIES lib...): lib/libselm_NAME.so from src/m/NAME_*.cpp, which module m loads by
# its name when it is wanted. Programs of the build directory have lib/ in their run path, installed ones too.
function(selm_add_plugin name)
    cmake_parse_arguments(PARSE_ARGV 1 arg "" "MODULE" "MODULES;LIBRARIES")
    file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/src/${arg_MODULE}/${name}_*.cpp")
    list(TRANSFORM arg_MODULES PREPEND "selm::")
    add_library(selm_${name} MODULE ${sources})
    target_include_directories(selm_${name} PRIVATE "${CMAKE_SOURCE_DIR}/include" "${CMAKE_SOURCE_DIR}/src/${arg_MODULE}")
    target_link_libraries(selm_${name} PRIVATE selm_flags ${arg_MODULES} ${arg_LIBRARIES})
    set_target_properties(selm_${name} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
    target_link_libraries(selm_${arg_MODULE} PRIVATE ${CMAKE_DL_LIBS})
    # Programs of other projects that use the installed module find the library as well.
    target_link_options(selm_${arg_MODULE} INTERFACE "$<INSTALL_INTERFACE:LINKER:-rpath,$<INSTALL_PREFIX>/${CMAKE_INSTALL_LIBDIR}>")
    add_dependencies(selm_${arg_MODULE} selm_${name})
    set_property(GLOBAL APPEND PROPERTY SELM_PLUGINS selm_${name})
endfunction()

# selm_add_programs(MODULES m... LIBRARIES lib...): library selm_apps from src/apps/*.cpp but selm_*.cpp; each
# src/apps/selm_*.cpp is a program in bin/.
function(selm_add_programs)
    cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "MODULES;LIBRARIES")
    file(GLOB library_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/src/apps/*.cpp")
    file(GLOB program_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/src/apps/selm_*.cpp")
    list(REMOVE_ITEM library_sources ${program_sources})
    list(TRANSFORM arg_MODULES PREPEND "selm::")
    if(library_sources)
        add_library(selm_apps STATIC ${library_sources})
        target_include_directories(selm_apps PUBLIC "${CMAKE_SOURCE_DIR}/src/apps")
        target_link_libraries(selm_apps PUBLIC ${arg_MODULES} PRIVATE selm_flags ${arg_LIBRARIES})
    else()
        add_library(selm_apps INTERFACE)
        target_link_libraries(selm_apps INTERFACE ${arg_MODULES} ${arg_LIBRARIES})
    endif()
    add_library(selm::apps ALIAS selm_apps)
    foreach(source IN LISTS program_sources)
        cmake_path(GET source STEM program)
        # selm_rank is the name of a program and of a module's library: the program's target then has another name.
        set(target ${program})
        if(TARGET ${program})
            set(target ${program}_program)
        endif()
        add_executable(${target} ${source})
        target_link_libraries(${target} PRIVATE selm_flags selm::apps)
        set_target_properties(${target} PROPERTIES OUTPUT_NAME ${program} RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
        set_property(GLOBAL APPEND PROPERTY SELM_PROGRAMS ${target})
    endforeach()
endfunction()
