#include "selm/text/chat_format.hpp"

#include <algorithm>
#include <array>
#include <filesystem>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/text/tokenizer.hpp"
#include "selm/text/utf8.hpp"

namespace selm {

struct ChatFormat::Definition {
    std::string_view name;
    std::string (*render)(std::span<const Message> messages, bool add_generation_prompt);
    std::string_view end_of_turn;
    std::string_view beginning; ///< first token of a rendered conversation; empty: none
    std::string_view bos;       ///< text that stands where the template has bos_token; empty: nowhere
    std::string_view eos;
    std::optional<std::int32_t> bos_id; ///< of the models that the format comes from
    std::optional<std::int32_t> eos_id;
    std::string_view source; ///< the Jinja template
};

namespace {

using Json = nlohmann::json;

constexpr std::string_view smollm2_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

std::string_view role_name(Role role)
{
    switch (role) {
    case Role::system:
        return "system";
    case Role::user:
        return "user";
    case Role::assistant:
        return "assistant";
    }
    throw internal_error(cat("there is no role ", static_cast<int>(role)));
}

void append_chatml_turn(std::string& out, std::string_view role, std::string_view content)
{
    out.append("<|im_start|>").append(role).append("\n").append(content).append("<|im_end|>\n");
}

std::string render_chatml(std::span<const Message> messages, bool add_generation_prompt)
{
    std::string out;
    for (const Message& message : messages)
        append_chatml_turn(out, role_name(message.role), message.content);
    if (add_generation_prompt)
        out += "<|im_start|>assistant\n";
    return out;
}

std::string render_smollm2(std::span<const Message> messages, bool add_generation_prompt)
{
    std::string out;
    if (!messages.empty() && messages.front().role != Role::system)
        append_chatml_turn(out, "system", smollm2_system);
    return out + render_chatml(messages, add_generation_prompt);
}

/// Zephyr's header belongs to the last message: an empty conversation has none.
std::string render_zephyr(std::span<const Message> messages, bool add_generation_prompt)
{
    std::string out;
    for (const Message& message : messages)
        out.append("<|").append(role_name(message.role)).append("|>\n").append(message.content).append("</s>\n");
    if (add_generation_prompt && !messages.empty())
        out += "<|assistant|>\n";
    return out;
}

void append_llama3_header(std::string& out, std::string_view role)
{
    out.append("<|start_header_id|>").append(role).append("<|end_header_id|>\n\n");
}

std::string render_llama3(std::span<const Message> messages, bool add_generation_prompt)
{
    std::string out = messages.empty() ? "" : "<|begin_of_text|>";
    for (const Message& message : messages) {
        append_llama3_header(out, role_name(message.role));
        out.append(strip_whitespace(message.content)).append("<|eot_id|>");
    }
    if (add_generation_prompt)
        append_llama3_header(out, "assistant");
    return out;
}

std::string render_phi3(std::span<const Message> messages, bool add_generation_prompt)
{
    std::string out;
    for (const Message& message : messages)
        out.append("<|").append(role_name(message.role)).append("|>\n").append(message.content).append("<|end|>\n");
    return out += add_generation_prompt ? "<|assistant|>\n" : "<|endoftext|>";
}

std::string render_phi3_first(std::span<const Message> messages, bool /*add_generation_prompt*/)
{
    std::string out = "<s>";
    for (const Message& message : messages) {
        if (message.role == Role::user)
            out.append("<|user|>\n").append(message.content).append("<|end|>\n<|assistant|>\n");
        else if (message.role == Role::assistant)
            out.append(message.content).append("<|end|>\n");
    }
    return out;
}

// Templates as the models' tokenizer_config.json have them, FIELD(x) for message['x'] or message.x.
constexpr std::string_view chatml_template =
    "{% for message in messages %}{{ '<|im_start|>' + FIELD(role) + '\\n' + FIELD(content) + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
constexpr std::string_view smollm2_template =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + FIELD(role) + '\\n' + FIELD(content) + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
constexpr std::string_view zephyr_template =
    "{% for message in messages %}\n"
    "{% if FIELD(role) == 'user' %}\n{{ '<|user|>\\n' + FIELD(content) + eos_token }}\n"
    "{% elif FIELD(role) == 'system' %}\n{{ '<|system|>\\n' + FIELD(content) + eos_token }}\n"
    "{% elif FIELD(role) == 'assistant' %}\n{{ '<|assistant|>\\n' + FIELD(content) + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}";
constexpr std::string_view llama3_template =
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + FIELD(role) + '<|end_header_id|>\\n\\n' + FIELD(content) | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";
constexpr std::string_view phi3_template =
    "{% for message in messages %}"
    "{% if FIELD(role) == 'system' %}{{ '<|system|>\\n' + FIELD(content) + '<|end|>\\n' }}"
    "{% elif FIELD(role) == 'user' %}{{ '<|user|>\\n' + FIELD(content) + '<|end|>\\n' }}"
    "{% elif FIELD(role) == 'assistant' %}{{ '<|assistant|>\\n' + FIELD(content) + '<|end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}";
constexpr std::string_view phi3_first_template =
    "{{ bos_token }}{% for message in messages %}"
    "{% if (FIELD(role) == 'user') %}{{ '<|user|>\\n' + FIELD(content) + '<|end|>\\n<|assistant|>\\n' }}"
    "{% elif (FIELD(role) == 'assistant') %}{{ FIELD(content) + '<|end|>\\n' }}{% endif %}{% endfor %}";

constexpr std::array<ChatFormat::Definition, 6> definitions{{
    {"chatml", render_chatml, "<|im_end|>", "", "", "", {}, {}, chatml_template},
    {"chatml-smollm2", render_smollm2, "<|im_end|>", "", "", "", {}, {}, smollm2_template},
    {"zephyr", render_zephyr, "</s>", "", "", "</s>", 1, 2, zephyr_template},
    {"llama3", render_llama3, "<|eot_id|>", "<|begin_of_text|>", "<|begin_of_text|>", "", 128000, 128009,
     llama3_template},
    {"phi3", render_phi3, "<|end|>", "", "", "<|endoftext|>", 1, 32000, phi3_template},
    {"phi3-2024-04", render_phi3_first, "<|end|>", "<s>", "<s>", "", 1, 32000, phi3_first_template},
}};

std::string list_of_names()
{
    std::string list;
    for (const ChatFormat::Definition& definition : definitions)
        list += (list.empty() ? "" : ", ") + std::string(definition.name);
    return list;
}

struct Template {
    std::string path;
    std::string text;
};

/// The default one of a list of named templates.
std::string default_template(const Json& entry, const std::string& path)
{
    if (entry.is_string())
        return entry.get<std::string>();
    if (entry.is_array())
        for (const Json& named : entry)
            if (named.is_object() && named.value("name", "") == "default" && named.contains("template") &&
                named["template"].is_string())
                return named["template"].get<std::string>();
    throw config_error(cat(path,
                           ": the entry chat_template is neither a text nor a list with a template named default. "
                           "Pass --chat-format NAME, one of: ",
                           list_of_names()));
}

/// As transformers: the file of its own goes before the entry in tokenizer_config.json.
Template read_template(const std::string& directory)
{
    const std::string own_file = directory + "/chat_template.jinja";
    if (std::filesystem::exists(own_file))
        return {own_file, read_file(own_file)};
    const std::string config = directory + "/tokenizer_config.json";
    if (std::filesystem::exists(config)) {
        Json root;
        try {
            root = Json::parse(read_file(config));
        } catch (const Json::exception& error) {
            throw config_error(cat(config, ": cannot be read (", error.what(), "). Is the file damaged?"));
        }
        if (root.is_object() && root.contains("chat_template") && !root["chat_template"].is_null())
            return {config, default_template(root["chat_template"], config)};
    }
    throw config_error(cat(directory,
                           ": no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), so "
                           "the format of its conversations is unknown. Pass --chat-format NAME, one of: ",
                           list_of_names()));
}

bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

/// The inside of a Jinja tag without blanks outside of quotes; quotes are ', the two characters \n in them a line end,
/// and literals that are added up are one.
std::string canonical_tag(std::string_view inside)
{
    std::string out;
    char quote = 0;
    for (std::size_t i = 0; i < inside.size(); ++i) {
        const char c = inside[i];
        if (quote != 0 && c == '\\' && inside.substr(i + 1, 1) == "n") {
            out += '\n';
            ++i;
        } else if (quote != 0 ? c == quote : c == '\'' || c == '"') {
            quote = quote != 0 ? '\0' : c;
            out += '\'';
            if (quote != 0 && out.size() > 3 && out.ends_with("'+'"))
                out.resize(out.size() - 3);
        } else if (quote != 0 || !is_blank(c)) {
            out += c;
        }
    }
    return out;
}

/// End of the tag that begins at @p begin: the position of its closing "}}" or "%}", npos where there is none.
std::size_t find_tag_end(std::string_view source, std::size_t begin)
{
    const std::string_view closing = source[begin + 1] == '{' ? "}}" : "%}";
    char quote = 0;
    for (std::size_t i = begin + 2; i < source.size(); ++i) {
        const char c = source[i];
        if (quote != 0)
            quote = c == quote ? '\0' : quote;
        else if (c == '\'' || c == '"')
            quote = c;
        else if (source.substr(i, 2) == closing)
            return i;
    }
    return std::string_view::npos;
}

/// Text between tags as Jinja prints it with trim_blocks and lstrip_blocks (transformers sets both).
std::string_view printed_text(std::string_view source, std::size_t begin, std::size_t end, bool trim_left,
                              bool after_block)
{
    std::string_view text = source.substr(begin, end - begin);
    if (after_block && text.starts_with('\n'))
        text.remove_prefix(1);
    while (trim_left && !text.empty() && is_blank(text.front()))
        text.remove_prefix(1);
    const std::string_view tag = source.substr(end, 3);
    const std::size_t line = end == 0 ? 0 : source.rfind('\n', end - 1) + 1; // npos + 1 = 0
    const bool alone_on_line =
        tag.starts_with("{%") && source.substr(line, end - line).find_first_not_of(" \t") == std::string_view::npos;
    while (!text.empty() && ((tag.ends_with('-') && is_blank(text.back())) ||
                             (alone_on_line && (text.back() == ' ' || text.back() == '\t'))))
        text.remove_suffix(1);
    return text;
}

/// A template in one way of writing; templates with equal canonical forms print the same.
std::string canonical(std::string_view source)
{
    std::string out;
    std::size_t position = 0;
    bool trim_left = false;
    bool after_block = false;
    for (;;) {
        const std::size_t begin = std::min({source.find("{{", position), source.find("{%", position), source.size()});
        out += printed_text(source, position, begin, trim_left, after_block);
        if (begin == source.size())
            return out;
        const std::size_t end = find_tag_end(source, begin);
        if (end == std::string_view::npos)
            return out += source.substr(begin); // no valid template: equal to none
        std::string_view inside = source.substr(begin + 2, end - begin - 2);
        trim_left = inside.ends_with('-');
        after_block = source[begin + 1] == '%';
        if (inside.starts_with('-'))
            inside.remove_prefix(1);
        if (inside.ends_with('-'))
            inside.remove_suffix(1);
        out += cat(source.substr(begin, 2), canonical_tag(inside), source.substr(end, 2));
        position = end + 2;
    }
}

/// A template with FIELD(x) as message['x'] or message.x.
std::string with_fields(std::string_view source, std::string_view before, std::string_view after)
{
    std::string out(source);
    for (std::size_t at = 0; (at = out.find("FIELD(", at)) != std::string::npos;) {
        const std::size_t end = out.find(')', at);
        const std::string field = cat("message", before, std::string_view(out).substr(at + 6, end - at - 6), after);
        out.replace(at, end + 1 - at, field);
    }
    return out;
}

/// The format whose template prints the same as @p source; null where none is known to.
const ChatFormat::Definition* match(std::string_view source)
{
    constexpr std::string_view no_header =
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}";
    const std::string given = canonical(source);
    for (const ChatFormat::Definition& definition : definitions)
        for (const std::string_view beginning : {std::string_view(), no_header})
            for (const std::string& body :
                 {with_fields(definition.source, "['", "']"), with_fields(definition.source, ".", "")})
                if (given == canonical(cat(beginning, body)))
                    return &definition;
    return nullptr;
}

/// A template writes bos_token or eos_token where the format has a fixed text: @p id must be that token.
void check_token(const ChatFormat::Definition& definition, const std::string& directory, const Tokenizer& tokenizer,
                 const char* what, std::optional<std::int32_t> id, std::string_view wanted)
{
    if (wanted.empty() || !id || tokenizer.token_text(*id) == wanted)
        return;
    throw config_error(cat(directory, ": the chat template is that of the format ", definition.name, ", but the ", what,
                           " is ", tokenizer.token_text(*id).value_or(cat("the unknown id ", *id)), " in place of ",
                           wanted, " (the prompts would differ from those the model was trained on). ",
                           "Pass --chat-format NAME, one of: ", list_of_names()));
}

} // namespace

ChatFormat ChatFormat::by_name(std::string_view name)
{
    for (const Definition& definition : definitions)
        if (definition.name == name)
            return ChatFormat(definition);
    throw config_error(
        cat("the chat format ", name, " does not exist. Pass --chat-format NAME, one of: ", list_of_names()));
}

ChatFormat ChatFormat::recognise(const std::string& directory, const Tokenizer& tokenizer)
{
    const Template found = read_template(directory);
    const Definition* definition = match(found.text);
    if (definition == nullptr)
        throw config_error(cat(found.path,
                               ": the chat template is not one of the known formats (the prompts would differ from "
                               "those the model was trained on). Pass --chat-format NAME, one of: ",
                               list_of_names()));
    const ChatFormat format(*definition);
    if (!tokenizer.token_id(format.end_of_turn()))
        throw config_error(
            cat(directory, ": the chat format ", format.name(), " ends answers with ", format.end_of_turn(),
                ", which the tokenizer does not have. Pass another --chat-format NAME, one of: ", list_of_names()));
    check_token(*definition, directory, tokenizer, "BOS token", tokenizer.bos_id(), definition->bos);
    check_token(*definition, directory, tokenizer, "EOS token", tokenizer.eos_id(), definition->eos);
    return format;
}

std::vector<std::string> ChatFormat::names()
{
    std::vector<std::string> all;
    for (const Definition& definition : definitions)
        all.emplace_back(definition.name);
    return all;
}

std::string ChatFormat::name() const
{
    return std::string(definition_->name);
}

std::string ChatFormat::render(std::span<const Message> messages, bool add_generation_prompt) const
{
    return definition_->render(messages, add_generation_prompt);
}

std::string ChatFormat::end_of_turn() const
{
    return std::string(definition_->end_of_turn);
}

std::optional<std::string> ChatFormat::beginning_of_sequence() const
{
    return definition_->beginning.empty() ? std::nullopt : std::optional(std::string(definition_->beginning));
}

SpecialIds ChatFormat::default_special_ids() const
{
    return {definition_->bos_id, definition_->eos_id};
}

} // namespace selm
