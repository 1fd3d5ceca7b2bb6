#!/usr/bin/env bash
# Two copies of a program at one output, as when a node is cut off and its job started again: the older one stops by itself, the newer
# one's result is that of an undisturbed run, whether the older one runs on beside it or wakes up when all is done.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
bin=$SELM_BIN_DIR
work=$(mktemp -d)
older=
# shellcheck disable=SC2317 # called by the trap
clean() {
    if [ -n "$older" ]; then kill -KILL "$older" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap clean EXIT
cd "$work"
"$SELM_TOOL_DIR/selm_tiny_model_tool" policy seed=1
"$SELM_TOOL_DIR/selm_tiny_model_tool" deep seed=1 layers=16 # its training takes much longer than it takes to stop it
"$SELM_TOOL_DIR/selm_tiny_model_tool" reward seed=2 classifier
expect 0 'imported 120 rows' "$bin/selm_import" --input "$SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl" --rows 0:120 --output prefs.h5 \
    --on-empty-answer keep

gen() { # gen OUTPUT
    "$bin/selm_gen" --data prefs.h5 --policy policy --output "$1" --max-new-tokens 320 --max-length 512 --max-prompt-length 96 \
        --on-long-prompt skip --dtype fp32 --slots 2 --progress off
}
train() { # train OUTPUT
    "$bin/selm_train" --objective bradley-terry --trainable all --data prefs.h5 --rows 0:80 --policy deep --output "$1" --dtype fp32 \
        --save-dtype fp32 --max-length 192 --max-prompt-length 96 --global-batch 2 --checkpoint-every 5 --progress off
}
digest_of() { "$bin/selm_inspect" --digest "$1"; }
# What the older copy may not touch: names and contents of all that the output consists of.
content() { find "$1" "$1".* -type f ! -name '*.log' -exec sha256sum {} + 2>/dev/null | sort; }
# The program below process $1 (a shell, perhaps replaced by the program): singletons of MPI have a helper process, which goes on.
program_of() {
    local process name
    for process in "$1" $(cat "/proc/$1/task"/*/children 2>/dev/null); do
        read -r name 2>/dev/null <"/proc/$process/comm" || continue
        if [[ $name == selm_* ]]; then
            echo "$process"
            return
        fi
    done
}
# start_and_freeze PROGRAM OUTPUT CONDITION...: starts the older copy and stops it where the condition holds.
start_and_freeze() {
    local program=$1 output=$2
    shift 2
    first_size=
    "$program" "$output" >"$output.log" 2>&1 &
    older=$!
    comes_to "$older" "$@" || fail "the older copy of $program had ended before: $*"
    kill -STOP "$(program_of "$older")" || fail "there is no older copy of $program to stop"
}
# journalled FILE: the journal has grown since it was seen first (with its header alone, perhaps): a row is in it.
journalled() {
    local size
    size=$(stat -c %s "$1" 2>/dev/null) || return 1
    [ "$size" -gt 0 ] || return 1
    [ -n "$first_size" ] || first_size=$size
    [ "$size" -gt "$first_size" ]
}
# wake OUTPUT [WORD]: the older copy goes on; it ends with 75 and says why.
wake() {
    local code=0
    checks=$((checks + 2))
    kill -CONT "$(program_of "$older")"
    wait "$older" || code=$?
    older=
    if [ "$code" -ne 75 ] || ! grep -q "a newer attempt, [23], has taken over .*$1 .*changes nothing there" "$1.log"; then
        fail "the older copy of $1 ended with $code"
        cat "$1.log"
    fi
}
# beside PROGRAM OUTPUT CLAIM: the newer copy, and the older one wakes up as soon as that has claimed the output.
beside() {
    local newer code=0 tries=6000
    checks=$((checks + 1))
    "$1" "$2" >newer.out 2>&1 &
    newer=$!
    until [ -e "$3" ] || ((--tries == 0)); do sleep 0.005; done
    wake "$2"
    wait "$newer" || code=$?
    output=$(cat newer.out)
    [ "$code" -eq 0 ] || fail "the newer copy of $2 ended with $code: $output"
}
unfinished() { find . -name '*.journal' -o -name '*.partial*'; }

expect 0 'rows 120, generated now' gen alone.h5
alone=$(digest_of alone.h5)
rows=$(sed -n 's/^rows 120, generated now \([0-9]*\),.*/\1/p' <<<"$output")
twice() { # no row that was journalled is generated again
    local counts
    counts=$(sed -n 's/^rows 120, generated now \([0-9]*\), from the journal \([0-9]*\),.*/\1+\2/p' <<<"$output")
    checks=$((checks + 2))
    [ "$((counts))" = "$rows" ] || fail "$counts rows are not $rows"
    [ "${counts#*+}" -gt 0 ] || fail "nothing was taken from the journal"
}

# Both at work.
journal=attempt-000001-rank-000000.log
start_and_freeze gen beside.h5 journalled beside.h5.journal/$journal
beside gen beside.h5 .attempts/beside.h5-000002
twice
[ "$(digest_of beside.h5)" = "$alone" ] || fail "beside.h5 differs from alone.h5"

# The older one wakes up when the newer one is done, and its output was ranked.
start_and_freeze gen after.h5 journalled after.h5.journal/$journal
expect 0 'rows 120, generated now' gen after.h5
twice
checks=$((checks + 2))
[ "$(digest_of after.h5)" = "$alone" ] || fail "after.h5 differs from alone.h5"
expect 0 'rows 120' "$bin/selm_rank" --iter after.h5 --ranker reward:reward --dtype fp32 --max-length 512 --max-prompt-length 96 \
    --progress off
before=$(content after.h5)
wake after.h5
[ "$(content after.h5)" = "$before" ] || fail "the older copy changed after.h5"

whole_training() { # whole_training OUTPUT
    checks=$((checks + 2))
    cmp alone/model.safetensors "$1/model.safetensors" || fail "the weights of $1 differ"
    [ "$(sed -n 's/^{"step":\([0-9]*\),.*/\1/p' "$1/metrics.jsonl")" = "$(seq 40)" ] || fail "the metrics of $1 are not those of 40 steps"
}
expect 0 'optimizer steps 40' train alone
start_and_freeze train beside test -e beside/checkpoints/step-000010.json
beside train beside .attempts/beside-000002
whole_training beside
start_and_freeze train after test -e after/checkpoints/step-000010.json
expect 0 'optimizer steps 40 .resumed' train after
before=$(content after)
wake after
whole_training after
checks=$((checks + 1))
[ "$(content after)" = "$before" ] || fail "the older copy changed after"

# A whole run, and a wrong recipe for it, which must not stop the right one.
cat >recipe.cfg <<CFG
[run]
policy = policy
train = $SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl
train-rows = 0:80
iterations = 1
max-length = 512
max-prompt-length = 96
dtype = fp32
[import]
on-empty-answer = keep
[gen]
max-new-tokens = 320
on-long-prompt = skip
slots = 1
[rank]
ranker = reward:reward
[train]
global-batch = 8
save-dtype = fp32
CFG
run() { "$bin/selm_iter" --config recipe.cfg --run "$1" --progress off; }
expect 0 'iteration 1' run whole
start_and_freeze run taken test -s taken/iter1/iter.h5.journal/$journal
expect 78 'made with another recipe' "$bin/selm_iter" --config recipe.cfg --run taken --seed 7
checks=$((checks + 1))
[ "$(ls taken/attempts)" = 000001 ] || fail "a refused recipe took over the run"
expect 0 'iteration 1' run taken
before=$(content taken)
wake taken
checks=$((checks + 3))
[ "$(content taken)" = "$before" ] || fail "the older copy changed the run"
[ "$(digest_of taken/iter1/iter.h5)" = "$(digest_of whole/iter1/iter.h5)" ] || fail "the rows of the run that was taken over differ"
cmp whole/iter1/policy/model.safetensors taken/iter1/policy/model.safetensors || fail "the policy of the run that was taken over differs"
# What a job script claimed holds for the programs that it starts.
mkdir -p script/attempts
touch script/attempts/000001
expect 0 'iteration 1' env SELM_ATTEMPT=script/attempts/000001 "$bin/selm_iter" --config recipe.cfg --run script --progress off
touch script/attempts/000002
rm -r script/iter1
expect 75 'newer attempt, 2, has taken over' env SELM_ATTEMPT=script/attempts/000001 "$bin/selm_iter" --config recipe.cfg --run script --progress off
expect 78 'SELM_ATTEMPT names nowhere' env SELM_ATTEMPT=nowhere "$bin/selm_iter" --config recipe.cfg --run script --progress off
checks=$((checks + 1))
[ -z "$(unfinished)" ] || fail "unfinished files are left: $(unfinished)"
finish
