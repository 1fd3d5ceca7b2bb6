#pragma once

#include <cstdint>
#include <string>

namespace selm {

/// Who speaks; the values are those stored in /prompts/messages/role.
enum class Role : std::uint8_t { system = 0, user = 1, assistant = 2 };

/// One turn of a conversation; content is UTF-8.
struct Message {
    Role role = Role::user;
    std::string content;
};

/// Index of an answer within a row, in the fixed candidate order of all files.
enum class Candidate : std::int32_t { generated = 0, chosen = 1, rejected = 2 };
inline constexpr int candidates_per_row = 3;

} // namespace selm
