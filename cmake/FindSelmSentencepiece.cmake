# selm::sentencepiece: the SentencePiece library.
find_path(SELM_SENTENCEPIECE_INCLUDE_DIR sentencepiece_processor.h)
find_library(SELM_SENTENCEPIECE_LIBRARY sentencepiece)
mark_as_advanced(SELM_SENTENCEPIECE_INCLUDE_DIR SELM_SENTENCEPIECE_LIBRARY)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(SelmSentencepiece REQUIRED_VARS SELM_SENTENCEPIECE_LIBRARY SELM_SENTENCEPIECE_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "Install SentencePiece (Debian: libsentencepiece-dev)")
if(SelmSentencepiece_FOUND AND NOT TARGET selm::sentencepiece)
    add_library(selm::sentencepiece INTERFACE IMPORTED)
    target_include_directories(selm::sentencepiece SYSTEM INTERFACE "${SELM_SENTENCEPIECE_INCLUDE_DIR}")
    target_link_libraries(selm::sentencepiece INTERFACE "${SELM_SENTENCEPIECE_LIBRARY}")
endif()
