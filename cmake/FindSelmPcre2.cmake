# selm::pcre2: the 8-bit PCRE2 library.
find_path(SELM_PCRE2_INCLUDE_DIR pcre2.h)
find_library(SELM_PCRE2_LIBRARY pcre2-8)
mark_as_advanced(SELM_PCRE2_INCLUDE_DIR SELM_PCRE2_LIBRARY)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(SelmPcre2 REQUIRED_VARS SELM_PCRE2_LIBRARY SELM_PCRE2_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "Install PCRE2 (Debian: libpcre2-dev)")
if(SelmPcre2_FOUND AND NOT TARGET selm::pcre2)
    add_library(selm::pcre2 INTERFACE IMPORTED)
    target_include_directories(selm::pcre2 SYSTEM INTERFACE "${SELM_PCRE2_INCLUDE_DIR}")
    target_compile_definitions(selm::pcre2 INTERFACE PCRE2_CODE_UNIT_WIDTH=8)
    target_link_libraries(selm::pcre2 INTERFACE "${SELM_PCRE2_LIBRARY}")
endif()
