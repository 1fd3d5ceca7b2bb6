// Uses selm::phases of an installed selm, and with it all modules and their libraries: verifies the file that is its argument.
#include <cstdio>
#include <exception>

#include "selm/phases/inspect.hpp"

int main(int argc, char** argv) {
    try {
        selm::verify_file(argc > 1 ? argv[1] : "");
        std::puts("the file is whole");
        return 0;
    } catch (const std::exception& error) {
        std::printf("error: %s\n", error.what());
        return 1;
    }
}
