# cmake --install: a prefix that can be moved as a whole.
#   bin/             the programs (they find what lies in the prefix's lib/ by $ORIGIN; other libraries by absolute path)
#   lib/ include/    modules as static libraries, their headers; libselm_aten.so, which the programs load for --engine aten
#   lib/cmake/selm   find_package(selm [COMPONENTS module...]): targets selm::<module>
#   share/selm/      jobs, slurm, configs, scripts, modulefiles
#   share/doc/selm   documentation and licence
include(CMakePackageConfigHelpers)

set(selm_exported_modules base comm h5 data text kernels model algo shard rank phases)
set(selm_config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/selm")

# --- programs
get_property(selm_programs GLOBAL PROPERTY SELM_PROGRAMS)
file(RELATIVE_PATH selm_lib_from_bin "/p/${CMAKE_INSTALL_BINDIR}" "/p/${CMAKE_INSTALL_LIBDIR}")
set_property(TARGET ${selm_programs} PROPERTY INSTALL_RPATH "$ORIGIN/${selm_lib_from_bin}")
install(TARGETS ${selm_programs} RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
get_property(selm_plugins GLOBAL PROPERTY SELM_PLUGINS)
if(selm_plugins)
    install(TARGETS ${selm_plugins} LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
endif()

# --- modules. selm_flags is exported for what it adds when linking (sanitizers): modules link it PRIVATE.
set_property(TARGET selm_flags PROPERTY EXPORT_NAME flags)
set(selm_module_targets selm_flags)
# What each module needs, from its link libraries: the package file finds nothing that the wanted modules do not need.
set(SELM_MODULE_NEEDS "")
foreach(module IN LISTS selm_exported_modules)
    set_property(TARGET selm_${module} PROPERTY EXPORT_NAME ${module})
    list(APPEND selm_module_targets selm_${module})
    get_target_property(type selm_${module} TYPE)
    if(type STREQUAL "INTERFACE_LIBRARY")
        get_target_property(libraries selm_${module} INTERFACE_LINK_LIBRARIES)
    else()
        get_target_property(libraries selm_${module} LINK_LIBRARIES)
    endif()
    list(FILTER libraries INCLUDE REGEX "::")
    list(REMOVE_DUPLICATES libraries)
    string(APPEND SELM_MODULE_NEEDS "set(selm_${module}_needs ${libraries})\n")
endforeach()
install(TARGETS ${selm_module_targets} EXPORT selm_targets
        ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(DIRECTORY "${CMAKE_SOURCE_DIR}/include/selm" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.hpp")

# --- the CMake package, with the find modules of third-party libraries
install(EXPORT selm_targets NAMESPACE selm:: FILE selmTargets.cmake DESTINATION "${selm_config_dir}")
configure_package_config_file("${CMAKE_SOURCE_DIR}/cmake/selmConfig.cmake.in" "${CMAKE_BINARY_DIR}/generated/selmConfig.cmake"
                              INSTALL_DESTINATION "${selm_config_dir}")
write_basic_package_version_file("${CMAKE_BINARY_DIR}/generated/selmConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
file(GLOB selm_find_modules CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/cmake/FindSelm*.cmake")
install(FILES ${selm_find_modules} "${CMAKE_BINARY_DIR}/generated/selmConfig.cmake"
              "${CMAKE_BINARY_DIR}/generated/selmConfigVersion.cmake" DESTINATION "${selm_config_dir}")

# --- data: directories as they are, whatever they hold
foreach(directory jobs slurm configs)
    if(IS_DIRECTORY "${CMAKE_SOURCE_DIR}/${directory}")
        install(DIRECTORY "${CMAKE_SOURCE_DIR}/${directory}" DESTINATION "${CMAKE_INSTALL_DATADIR}/selm" USE_SOURCE_PERMISSIONS
                PATTERN "__pycache__" EXCLUDE)
    endif()
endforeach()
# Scripts that make model directories; those that build and test belong to the source tree.
install(DIRECTORY "${CMAKE_SOURCE_DIR}/scripts" DESTINATION "${CMAKE_INSTALL_DATADIR}/selm" USE_SOURCE_PERMISSIONS
        FILES_MATCHING PATTERN "*.py" PATTERN "requirements.txt" PATTERN "__pycache__" EXCLUDE)
install(FILES "${CMAKE_SOURCE_DIR}/benchmarks/selm_bench/__init__.py" "${CMAKE_SOURCE_DIR}/benchmarks/selm_bench/machine.py"
        DESTINATION "${CMAKE_INSTALL_DATADIR}/selm/benchmarks/selm_bench") # what benchmarks/scaling uses of it
install(DIRECTORY "${CMAKE_SOURCE_DIR}/benchmarks/scaling" DESTINATION "${CMAKE_INSTALL_DATADIR}/selm/benchmarks" USE_SOURCE_PERMISSIONS
        PATTERN "__pycache__" EXCLUDE)
install(FILES "${CMAKE_SOURCE_DIR}/packaging/modulefiles/selm.lua" DESTINATION "${CMAKE_INSTALL_DATADIR}/selm/modulefiles/selm"
        RENAME "${PROJECT_VERSION}.lua")
install(DIRECTORY "${CMAKE_SOURCE_DIR}/docs/" DESTINATION "${CMAKE_INSTALL_DOCDIR}" FILES_MATCHING PATTERN "*.md")
install(FILES "${CMAKE_SOURCE_DIR}/LICENSE" "${CMAKE_SOURCE_DIR}/README.md" "${CMAKE_SOURCE_DIR}/CITATION.cff"
        DESTINATION "${CMAKE_INSTALL_DOCDIR}")
