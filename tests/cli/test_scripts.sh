#!/usr/bin/env bash
# The shell scripts: help, unknown options, and shellcheck where it is installed.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
cd "$SELM_SOURCE_DIR"

for script in deps build test quickstart; do
    expect 0 "usage: scripts/$script" bash "scripts/$script" --help
done
for script in deps build quickstart; do
    expect 64 'unknown option --nonsense' bash "scripts/$script" --nonsense
done
shell_files() {
    find scripts .ci tests benchmarks jobs slurm -type f -exec grep -lE '^#!.*bash' {} +
}
for file in $(shell_files); do
    expect 0 '' bash -n "$file"
    if command -v shellcheck >/dev/null; then
        expect 0 '' shellcheck -x "$file"
    fi
done

finish
