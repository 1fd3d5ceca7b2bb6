#!/usr/bin/env bash
# A rank that does not come to a collective: the others name it and end, all with one exit code.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
tool=$SELM_TOOL_DIR/selm_program_tool

# run_late RANKS TIMEOUT END
run_late() { timeout 150 "$SELM_MPIEXEC" --oversubscribe --bind-to none -np "$1" "$tool" "$3" --collective-timeout "$2"; }

for ranks in 2 3 4; do
    last=$((ranks - 1))
    message="^\[rank 0/$ranks\] selm_program_tool: error: collective 'meeting point' \(call [0-9]+\) did not finish within 1 s: rank $last"
    expect 70 "$message \(host .+\) has not arrived and does not answer .*--collective-timeout" run_late $ranks 1 late
    expect_count 1 'did not finish'
    expect_count 0 'rank [0-9]+ \(host [^)]*\) is in'
done
expect 70 "$message .*has not arrived and does not answer" run_late 4 1 frozen
expect 70 "collective 'parameters of layer 3' \(call [0-9]+\) did not finish within 1 s: rank 2 " run_late 3 1 late-pending
expect_count 1 'did not finish'
# All ranks wait, the last one elsewhere: whoever speaks names both collectives.
expect 70 "rank 2 \(host .*\) is in 'another barrier' of another group|rank 0 \(host .*\) is in 'meeting point' of another group" run_late 3 1 elsewhere
expect_count 1 'did not finish'
# An error that the others wait for is told instead, by the rank that has it.
expect 65 '\[rank 2/3\] selm_program_tool: error: only this rank knows' run_late 3 1 alone
expect_count 0 'did not finish'
# Healthy runs: a rank that is slow but under the timeout; a rank that works for three timeouts while the others sleep.
expect 0 '^recipe' run_late 3 20 slow
expect 0 '^recipe' run_late 3 1 working
expect 0 '^recipe' run_late 2 0 slow
expect 64 'collective-timeout -1 is no number of seconds' "$tool" slow --collective-timeout=-1

finish
