#include "model_files.hpp"

#include <filesystem>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"

namespace selm {

std::vector<std::int32_t> end_of_sequence_ids(const std::string& directory)
{
    for (const char* name : {"generation_config.json", "config.json"}) {
        const std::string path = cat(directory, "/", name);
        if (!std::filesystem::exists(path))
            continue;
        const auto config = nlohmann::json::parse(read_file(path), nullptr, false);
        SELM_VALIDATE(config.is_object(), ExitCode::configuration,
                      path << ": not a JSON object (damaged?). Copy it anew");
        const auto value = config.find("eos_token_id");
        if (value == config.end() || value->is_null())
            continue;
        std::vector<std::int32_t> ids;
        const auto list = value->is_array() ? *value : nlohmann::json::array({*value});
        for (const auto& id : list) {
            SELM_VALIDATE(id.is_number_integer(), ExitCode::configuration,
                          path << ": eos_token_id is " << value->dump() << ". It must be a token id or a list of them");
            ids.push_back(id.get<std::int32_t>());
        }
        return ids;
    }
    return {};
}

} // namespace selm
