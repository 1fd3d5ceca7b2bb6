#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "selm/kernels/engine.hpp"

namespace selm {

/// One branch of a packed row: tokens after the trunk; the first `unscored` of them are not scored.
struct Branch {
    std::vector<std::int32_t> tokens;
    std::int64_t unscored = 0;
};

/**
 * @brief Several rows packed without padding: per row the prompt (trunk) once and each distinct response as a branch that
 * attends to the trunk and to itself, positions restarting after the trunk.
 *
 * selected[i] is the token whose hidden state predicts targets[i]; owner[i] says which branch (in order of addition)
 * the scored token belongs to.
 */
struct PackedBatch {
    std::vector<std::int32_t> tokens;    ///< [T]
    std::vector<std::int32_t> positions; ///< [T]
    std::vector<Segment> segments;
    std::vector<std::int64_t> selected;  ///< [R] indices into tokens
    std::vector<std::int32_t> targets;   ///< [R]
    std::vector<std::int32_t> owner;     ///< [R]
    std::int32_t branches = 0;

    /// Adds a row; every scored token of every branch is selected. Branches may be empty. @param trunk at least one token;
    /// or none, when every branch begins with an unscored token: the branches then have nothing in common.
    void add_scored(std::span<const std::int32_t> trunk, std::span<const Branch> branches);
    /// Adds a row; of every branch only the last token (of the trunk where the branch is empty) is selected, target -1.
    void add_last_token(std::span<const std::int32_t> trunk, std::span<const Branch> branches);
};

} // namespace selm
