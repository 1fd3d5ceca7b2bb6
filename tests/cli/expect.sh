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

# ranks_of LAUNCHER PROGRAM: the processes of PROGRAM that LAUNCHER started, however deep; never those of another test.
ranks_of() {
    local process name
    # shellcheck disable=SC2013 # the words are wanted
    for process in $(cat "/proc/$1/task"/*/children 2>/dev/null); do
        read -r name 2>/dev/null <"/proc/$process/comm" || continue
        if [ "$name" = "$2" ]; then echo "$process"; else ranks_of "$process" "$2"; fi
    done
}

# comes_to LAUNCHER CONDITION...: waits until CONDITION holds; false where LAUNCHER has ended before. It looks every few
# milliseconds: what is to be met lasts much longer, on a fast machine too.
comes_to() {
    local launcher=$1
    shift
    until "$@" 2>/dev/null; do
        kill -0 "$launcher" 2>/dev/null || return 1
        sleep 0.003
    done
}
exists() { compgen -G "$1" >/dev/null; }                                # exists PATTERN: a file of that name
holds() { [ "$(cat "$1"/* 2>/dev/null | wc -c)" -gt "$2" ]; }           # holds DIRECTORY BYTES: more than so many
has_lines() { [ "$(wc -l 2>/dev/null <"$1" || echo 0)" -ge "$2" ]; }    # has_lines FILE COUNT: at least so many

# freeze LAUNCHER PROGRAM CONDITION...: stops the processes of PROGRAM, `frozen`, in the moment when CONDITION holds.
freeze() {
    local launcher=$1 program=$2
    shift 2
    checks=$((checks + 1))
    comes_to "$launcher" "$@" || fail "$program had ended before: $*"
    frozen=$(ranks_of "$launcher" "$program")
    # shellcheck disable=SC2086
    kill -STOP $frozen || fail "there is no $program to stop"
}

# make_tiny_run ROWS MAX_NEW_TOKENS [LAYERS]: policy/, reward/ and recipe.cfg here: two iterations on real rows, three held-out prompts.
make_tiny_run() {
    "$SELM_TOOL_DIR/selm_tiny_model_tool" policy seed=1 "layers=${3:-2}"
    "$SELM_TOOL_DIR/selm_tiny_model_tool" reward seed=2 classifier
    cat >recipe.cfg <<CFG
[run]
policy = policy
train = $SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl
train-rows = 0:$1
test = $SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl
test-rows = 96:99
iterations = 2   # a comment
max-length = 192
max-prompt-length = 96
dtype = fp32
[import]
on-empty-answer = keep
[gen]
max-new-tokens = $2
on-long-prompt = skip
[rank]
ranker = reward:reward
[train]
learning-rate = 1e-3,5e-4
global-batch = 2
save-dtype = fp32
CFG
}

finish() {
    echo "$checks checks, $failures failures"
    [ "$failures" -eq 0 ] && [ "$checks" -gt 0 ]
}
