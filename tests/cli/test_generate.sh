#!/usr/bin/env bash
# selm_gen with a real model: the same data whatever the ranks and slots, after a killed rank, after a stop, on 64 ranks.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
bin=$SELM_BIN_DIR
model=$SELM_SMOLLM2_DIR
if [ ! -f "$model/model.safetensors" ]; then
    echo "skipped: no SmolLM2 in $model (scripts/make_smollm2.py makes it)"
    exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# The 24 shortest prompts of the sample's first 300 rows: the test is about ranks, not about reading.
python3 - "$SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl" sample.jsonl <<'PY'
import json, sys
rows = open(sys.argv[1], encoding="utf-8").read().split("\n")[:300]
rows.sort(key=lambda row: len(json.loads(row)["prompt"]))
open(sys.argv[2], "w", encoding="utf-8").write("\n".join(rows[:24]) + "\n")
PY
expect 0 'imported 24 rows' "$bin/selm_import" --input sample.jsonl --output prefs.h5 --on-empty-answer keep

gen() { # gen RANKS OUTPUT ARGUMENTS...
    local ranks=$1 output=$2
    shift 2
    mpi "$ranks" "$bin/selm_gen" --data prefs.h5 --policy "$model" --output "$output" --max-new-tokens 24 --progress off "$@"
}
digest_of() { "$bin/selm_inspect" --digest "$1"; }
same_as_alone() {
    checks=$((checks + 1))
    [ "$(digest_of "$1")" = "$(digest_of alone.h5)" ] || fail "$1 differs from alone.h5 ($2)"
}

expect 0 'rows 24, generated now 24' gen 1 alone.h5 --slots 3
expect 0 'verified' "$bin/selm_inspect" --verify alone.h5
expect 0 'complete already|already complete' gen 2 alone.h5
expect 0 'rows 24, generated now 24' gen 3 three.h5 --slots 16
same_as_alone three.h5 "3 ranks"

# A rank is killed when a random share of the rows is journalled; another number of ranks goes on.
gen 3 killed.h5 --slots 1 >killed.log 2>&1 &
launcher=$!
comes_to "$launcher" holds killed.h5.journal $((2000 + RANDOM % 4000)) || fail "the ranks were done before one was killed: $(cat killed.log)"
kill -9 "$(ranks_of "$launcher" selm_gen | sort -R | head -1)" || fail "there was no rank to kill"
checks=$((checks + 1))
if wait "$launcher"; then fail "exit code 0 although a rank was killed"; fi
[ ! -e killed.h5 ] || fail "an output appeared although a rank was killed"
[ -d killed.h5.journal ] || fail "no journal was left"
expect 0 'rows 24, generated now [1-9][0-9]*, from the journal [1-9]' gen 2 killed.h5
now=$(sed -n 's/.*generated now \([0-9]*\), from the journal \([0-9]*\),.*/\1 \2/p' <<<"$output")
[ "$((${now% *} + ${now#* }))" -eq 24 ] || fail "rows were generated twice: $output"
same_as_alone killed.h5 "killed and resumed"
[ ! -e killed.h5.journal ] || fail "the journal stayed"

# A stop request ends with code 75 and everything saved; the same command goes on.
checks=$((checks + 1))
gen 2 stopped.h5 --slots 1 --stop-file STOP >stopped.log 2>&1 &
launcher=$!
freeze "$launcher" selm_gen holds stopped.h5.journal 2000
touch STOP
sleep 0.6 # ranks look for the file twice a second
# shellcheck disable=SC2086
kill -CONT $frozen
status=0
wait "$launcher" || status=$?
[ "$status" -eq 75 ] || fail "exit code $status instead of 75: $(cat stopped.log)"
[ ! -e stopped.h5 ] || fail "an output appeared although the run was stopped"
rm STOP
expect 0 'rows 24, generated now [1-9]' gen 1 stopped.h5
same_as_alone stopped.h5 "stopped and resumed"

# More ranks than rows, on one node: one copy of the weights, little else.
gen 64 many.h5 >many.log 2>&1 &
launcher=$!
largest=0
while kill -0 "$launcher" 2>/dev/null; do
    total=0
    for process in $(ranks_of "$launcher" selm_gen); do
        kib=$(awk '/^Pss:/ {print $2}' "/proc/$process/smaps_rollup" 2>/dev/null || true)
        total=$((total + ${kib:-0}))
    done
    [ "$total" -gt "$largest" ] && largest=$total
    sleep 1
done
wait "$launcher" || fail "64 ranks: exit code $?: $(cat many.log)"
checks=$((checks + 1))
echo "64 ranks: at most $((largest / 1024)) MiB together (proportional set size)"
[ "$largest" -gt 0 ] || fail "no rank was seen"
[ "$largest" -lt $((16 * 1024 * 1024)) ] || fail "64 ranks took $((largest / 1024)) MiB"
same_as_alone many.h5 "64 ranks"

finish
