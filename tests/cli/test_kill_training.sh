#!/usr/bin/env bash
# kill -9 of training at five random moments, of one rank or of all; the same weights in the end. The long version is a soak test.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
export PYTHONDONTWRITEBYTECODE=1

expect 0 '^run 1: bit-equal' python3 "$SELM_SOURCE_DIR/tests/soak/kill_training.py" --kills 5 --moves 0 --seed 7 --layout 3 3 2
echo "$output"
checks=$((checks + 1))
[ "$(grep -c '^  kill ' <<<"$output")" -ge 4 ] || fail "fewer than four kills hit the training" # the last one may come too late

finish
