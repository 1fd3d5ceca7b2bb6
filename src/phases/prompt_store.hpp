#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/data/preferences.hpp"

namespace selm {

/// Token ids of the prompts (generation header included, never cut) of rows [begin, end), once per node: its ranks tokenise
/// together into memory that they share. Construction and destruction are collective over the communicator.
class PromptStore {
  public:
    /// @param encode token ids of a conversation with the generation header.
    PromptStore(const PreferencesReader& prefs, std::int64_t begin, std::int64_t end,
                const std::function<std::vector<std::int32_t>(std::span<const Message>)>& encode, Communicator& comm);
    /// @param row index in prefs, within [begin, end). Valid for the life of the store.
    std::span<const std::int32_t> prompt(std::int64_t row) const;
    std::int64_t length(std::int64_t row) const { return static_cast<std::int64_t>(prompt(row).size()); }

  private:
    std::int64_t begin_;
    std::vector<std::int64_t> offsets_; // [rows + 1], in tokens
    std::unique_ptr<Communicator> node_;
    std::unique_ptr<NodeSharedMemory> memory_;
};

} // namespace selm
