#!/usr/bin/env bash
# How the ranks of a program end: one exit code, one message, nobody left waiting.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
tool=$SELM_TOOL_DIR/selm_program_tool

for ranks in 1 3; do
    expect 0 '^recipe [0-9a-f]{32}$' timeout 150 "$SELM_MPIEXEC" --oversubscribe --bind-to none -np $ranks "$tool" normally
    expect_count 1 '^recipe'
    expect 75 '' timeout 150 "$SELM_MPIEXEC" --oversubscribe --bind-to none -np $ranks "$tool" stopped
    for end in agreed agreed-in-window; do
        expect 65 'selm_program_tool: error: row 7 of x.h5 is bad' timeout 150 "$SELM_MPIEXEC" --oversubscribe --bind-to none -np $ranks "$tool" $end
        expect_count 1 'row 7'
        expect_count 1 'exit code 65'
    done
done
# Without mpirun.
expect 0 '^recipe' timeout 150 "$tool" normally
expect 65 'row 7' timeout 150 "$tool" agreed
# An error that the others do not share ends the job after the grace, told by the rank that has it.
expect 65 '\[rank 2/3\] selm_program_tool: error: only this rank knows' timeout 150 env SELM_EXIT_GRACE_S=1 "$SELM_MPIEXEC" --oversubscribe --bind-to none -np 3 "$tool" alone
# The unexpected ends the job at once.
expect 70 '\[rank 2/3\] selm_program_tool: unexpected error: index 9' timeout 150 "$SELM_MPIEXEC" --oversubscribe --bind-to none -np 3 "$tool" exception
if [ -e /dev/full ]; then
    # shellcheck disable=SC2016
    expect 74 'standard output' timeout 150 bash -c '"$1" full >/dev/full' _ "$tool"
fi
# The recipe's hash does not change with operational keys, and does with recipe keys.
hash_of() { "$tool" normally "$@" 2>/dev/null; }
first=$(hash_of)
[ "$first" = "$(hash_of --threads 2)" ] || fail "an operational key changed the recipe's hash"
[ "$first" != "$(hash_of --seed 1)" ] || fail "a recipe key did not change the recipe's hash"

finish
