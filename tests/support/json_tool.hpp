#pragma once

#include <functional>
#include <fstream>
#include <iostream>
#include <map>
#include <string>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"

namespace selm::test {

/// main of a tool with one argument: runs @p body on it; an error becomes one line on stderr and its exit code.
inline int tool_main(int argc, char** argv, const char* usage, const std::function<void(const std::string& argument)>& body)
{
    if (argc != 2) {
        std::cerr << "usage: " << usage << "\n";
        return 64;
    }
    try {
        body(argv[1]);
    } catch (const Error& error) {
        std::cerr << error.what() << "\n";
        return static_cast<int>(error.code());
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 70;
    }
    return 0;
}

/// One JSON request a line on stdin, one JSON answer a line on stdout.
inline void answer_lines(const std::function<nlohmann::json(const nlohmann::json& request)>& answer)
{
    for (std::string line; std::getline(std::cin, line);)
        std::cout << answer(nlohmann::json::parse(line)).dump() << "\n";
}

/// main of a tool whose request, a JSON file, says in "op" which of the @p operations it is for.
inline int request_main(int argc, char** argv, const char* usage,
                        const std::map<std::string, std::function<void(const nlohmann::json& request)>>& operations)
{
    return tool_main(argc, argv, usage, [&](const std::string& file) {
        std::ifstream in(file);
        const nlohmann::json request = nlohmann::json::parse(in);
        const std::string operation = request["op"];
        if (operations.count(operation) == 0)
            throw usage_error("unknown op " + operation);
        operations.at(operation)(request);
    });
}

/// "text" of a request, or the bytes that its "hex" spells: JSON holds valid UTF-8 alone.
inline std::string text_of(const nlohmann::json& request)
{
    if (!request.contains("hex"))
        return request["text"];
    const std::string hex = request["hex"];
    std::string bytes;
    for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
        bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
    return bytes;
}

} // namespace selm::test
