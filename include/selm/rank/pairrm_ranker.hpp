#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "selm/model/pair_model.hpp"
#include "selm/rank/pairrm_inputs.hpp"
#include "selm/rank/ranker.hpp"

namespace selm {

/**
 * @brief PairRM (Jiang, Ren & Lin 2023): the logits of all ordered pairs of a row's candidates, and from them the
 * scores of pair_scores(). Candidates whose token sequences are equal (after cutting) share their logits, and so tie
 * exactly.
 */
struct PairRmRankerParts {
    PairModel& model;                  ///< borrowed
    const UnigramTokenizer& tokenizer; ///< borrowed
    PairLimits limits;
    PairRankMode mode = PairRankMode::per_row;
    std::int64_t tokens_per_batch = 4096;
    std::string directory;
    std::string digest;
};
/// batch_rows() is blender_batch_rows in blender mode.
/// @throws Error configuration when tokenizer and model do not belong together.
std::unique_ptr<Ranker> make_pairrm_ranker(PairRmRankerParts parts);

} // namespace selm
