# selm::xxhash: the xxHash library (0.8 or later: XXH3 is stable from there).
find_path(SELM_XXHASH_INCLUDE_DIR xxhash.h)
find_library(SELM_XXHASH_LIBRARY xxhash)
mark_as_advanced(SELM_XXHASH_INCLUDE_DIR SELM_XXHASH_LIBRARY)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(SelmXxhash REQUIRED_VARS SELM_XXHASH_LIBRARY SELM_XXHASH_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "Install xxHash (Debian: libxxhash-dev)")
if(SelmXxhash_FOUND AND NOT TARGET selm::xxhash)
    add_library(selm::xxhash INTERFACE IMPORTED)
    target_include_directories(selm::xxhash SYSTEM INTERFACE "${SELM_XXHASH_INCLUDE_DIR}")
    target_link_libraries(selm::xxhash INTERFACE "${SELM_XXHASH_LIBRARY}")
endif()
