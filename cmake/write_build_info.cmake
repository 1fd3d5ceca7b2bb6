# Script mode: writes OUTPUT (a header with version, git commit, compiler, flags, libraries), only when it changed.
set(commit "unknown")
find_program(GIT_PROGRAM git)
if(GIT_PROGRAM)
    execute_process(COMMAND ${GIT_PROGRAM} -c safe.directory=* -C ${SOURCE_DIR} rev-parse --short=12 HEAD
                    OUTPUT_VARIABLE text ERROR_QUIET RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT failed)
        set(commit "${text}")
        execute_process(COMMAND ${GIT_PROGRAM} -c safe.directory=* -C ${SOURCE_DIR} status --porcelain --untracked-files=no
                        OUTPUT_VARIABLE changes ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
        if(changes)
            string(APPEND commit "-modified")
        endif()
    endif()
endif()
set(text "#pragma once
#define SELM_BUILD_VERSION \"${VERSION}\"
#define SELM_BUILD_COMMIT \"${commit}\"
#define SELM_BUILD_COMPILER \"${COMPILER}\"
#define SELM_BUILD_FLAGS \"${FLAGS}\"
#define SELM_BUILD_LIBRARIES \"${LIBRARIES}\"
")
set(previous "")
if(EXISTS "${OUTPUT}")
    file(READ "${OUTPUT}" previous)
endif()
if(NOT previous STREQUAL text)
    file(WRITE "${OUTPUT}" "${text}")
endif()
