# selm::xsmm: LIBXSMM (static in Debian: libxsmm and, in place of a BLAS, libxsmmnoblas).
find_path(SELM_XSMM_INCLUDE_DIR libxsmm.h PATH_SUFFIXES libxsmm)
find_library(SELM_XSMM_LIBRARY xsmm)
find_library(SELM_XSMM_NOBLAS_LIBRARY xsmmnoblas)
mark_as_advanced(SELM_XSMM_INCLUDE_DIR SELM_XSMM_LIBRARY SELM_XSMM_NOBLAS_LIBRARY)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(SelmXsmm REQUIRED_VARS SELM_XSMM_LIBRARY SELM_XSMM_NOBLAS_LIBRARY SELM_XSMM_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "Install LIBXSMM (Debian: libxsmm-dev) or add its prefix to CMAKE_PREFIX_PATH")
if(SelmXsmm_FOUND AND NOT TARGET selm::xsmm)
    add_library(selm::xsmm INTERFACE IMPORTED)
    target_include_directories(selm::xsmm SYSTEM INTERFACE "${SELM_XSMM_INCLUDE_DIR}")
    target_link_libraries(selm::xsmm INTERFACE "${SELM_XSMM_LIBRARY}" "${SELM_XSMM_NOBLAS_LIBRARY}" ${CMAKE_DL_LIBS}
                          Threads::Threads m)
    # Its stand-ins for BLAS (sgemm_ and others) stop the program: no other library may find them instead of its own.
    cmake_path(GET SELM_XSMM_NOBLAS_LIBRARY FILENAME selm_noblas_name)
    if(selm_noblas_name MATCHES "\\.a$")
        target_link_options(selm::xsmm INTERFACE "LINKER:--exclude-libs,${selm_noblas_name}")
    endif()
endif()
