# shellcheck shell=bash
# recipe_value FILE KEY DEFAULT: a key of a recipe's section [run], for shells on machines where no program may run.
recipe_value() {
    local value
    value=$(awk -v key="$2" '
        /^[ \t]*\[/ { in_run = ($0 ~ /^[ \t]*\[[ \t]*run[ \t]*\]/); next }
        in_run && /^[ \t]*[^#; \t]/ && index($0, "=") {
            name = substr($0, 1, index($0, "=") - 1)
            text = substr($0, index($0, "=") + 1)
            gsub(/^[ \t]+|[ \t\r]+$/, "", name)
            if (name != key) next
            if (match(text, /^[ \t]*"([^"\\]|\\.)*"/)) { # quoted
                text = substr(text, RSTART, RLENGTH)
                sub(/^[ \t]*"/, "", text); sub(/"$/, "", text); gsub(/\\"/, "\"", text); gsub(/\\\\/, "\\", text)
            } else {
                sub(/(^|[ \t])[#;].*$/, "", text)
                gsub(/^[ \t]+|[ \t\r]+$/, "", text)
            }
            print text
        }' "$1" | tail -n 1)
    echo "${value:-$3}"
}
