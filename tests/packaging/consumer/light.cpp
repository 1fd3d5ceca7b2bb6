// Uses selm::text and selm::algo of an installed selm: prints a rendered prompt and a loss.
#include <cstdio>
#include <vector>

#include "selm/algo/losses.hpp"
#include "selm/text/chat_format.hpp"

int main() {
    const std::vector<selm::Message> messages = {{selm::Role::user, "Hello"}};
    const std::string prompt = selm::ChatFormat::by_name("zephyr").render(messages, true);
    const selm::SelmLoss loss = selm::selm_loss(selm::RowLogProbs{}, 0.001, 0.01);
    std::printf("%sloss %.6f\n", prompt.c_str(), loss.loss);
}
