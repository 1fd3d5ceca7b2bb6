#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "scratch.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/data/iteration.hpp"
#include "selm/h5/file.hpp"

namespace selm {

/**
 * @brief Generated answers on their way from the ranks that hold them to the ranks that write their blocks of an iteration file.
 *
 * Lengths go first; then texts, tokens and log-probs follow one after the other, each straight from the answers to its place in
 * the block, so that a rank holds one column of its block at a time.
 */
class AnswerBlocks {
  public:
    /**
     * @brief Collective.
     * @param rows keys in file order, the same on every rank. @param answers of this rank, in any order; borrowed.
     * @throws Error internal on every rank: a row without an answer or with two, an answer that is not of @p rows or malformed.
     */
    AnswerBlocks(const std::vector<std::int64_t>& rows, const std::vector<GeneratedAnswer>& answers, Communicator& comm);

    /// Writes /responses/generated. Collective.
    void write(h5::File& file);

  private:
    struct Head {
        std::int64_t position = 0, text_bytes = 0, tokens = 0, finish_reason = 0;
    };

    void find_positions(const std::vector<std::int64_t>& rows, const std::vector<GeneratedAnswer>& answers);
    void take_heads(const std::vector<std::vector<std::byte>>& received);
    /// This rank's answers for the block of rank @p r.
    std::span<const std::pair<std::int64_t, const GeneratedAnswer*>> for_rank(int r) const;
    /// One column of the block, valid until the next. @param bytes_of (answer) its part; @param length_of (head) the part's bytes.
    template<typename Bytes, typename Length>
    std::span<const std::byte> gather(const Bytes& bytes_of, const Length& length_of);

    Communicator& comm_;
    std::int64_t total_ = 0;                                             ///< rows of the file
    std::vector<std::pair<std::int64_t, const GeneratedAnswer*>> mine_;  ///< by position
    std::vector<std::vector<Head>> from_;                                ///< of the block's answers, by the rank that holds them
    std::vector<Head> block_;                                            ///< of the block, by position
    Scratch column_, outgoing_, incoming_;
};

} // namespace selm
