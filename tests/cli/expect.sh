# shellcheck shell=bash
# Sourced by the shell tests: expect CODE PATTERN COMMAND... runs a command and checks its exit code and its output
# (standard output and error together, against an extended regular expression). finish ends the test.

failures=0
checks=0
output=

fail() {
    failures=$((failures + 1))
    echo "FAILED: $*"
}

expect() {
    local code=$1 pattern=$2 actual=0
    shift 2
    checks=$((checks + 1))
    output=$("$@" 2>&1 </dev/null) || actual=$?
    if [ "$actual" -ne "$code" ]; then
        fail "exit code $actual instead of $code: $*"
        echo "$output"
    elif ! grep -Eq -- "$pattern" <<<"$output"; then
        fail "no line matches '$pattern': $*"
        echo "$output"
    fi
}

# expect_count N PATTERN: the last output has the pattern on exactly N lines.
expect_count() {
    local count
    checks=$((checks + 1))
    count=$(grep -Ec -- "$2" <<<"$output" || true)
    if [ "$count" -ne "$1" ]; then
        fail "$count lines instead of $1 match '$2'"
        echo "$output"
    fi
}

# On N ranks: mpi N COMMAND...
mpi() {
    local ranks=$1
    shift
    "${SELM_MPIEXEC:-mpirun}" --oversubscribe --bind-to none -np "$ranks" "$@"
}

finish() {
    echo "$checks checks, $failures failures"
    [ "$failures" -eq 0 ] && [ "$checks" -gt 0 ]
}
