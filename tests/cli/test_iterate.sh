#!/usr/bin/env bash
# selm_iter on a tiny model: a whole run, a rerun, a stop file, kills at random moments, another recipe, --status.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
bin=$SELM_BIN_DIR
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
make_tiny_run 13 24

iter() { # iter RANKS RUN ARGUMENTS...
    local ranks=$1 run=$2
    shift 2
    mpi "$ranks" timeout 120 "$bin/selm_iter" --config recipe.cfg --run "$run" --progress off "$@"
}
digests() { # of everything a run computed
    local t
    for t in 0 1 2; do
        "$bin/selm_inspect" --digest "$1/iter$t/test.h5"
    done
    for t in 1 2; do
        "$bin/selm_inspect" --digest "$1/iter$t/iter.h5"
        sha256sum < "$1/iter$t/policy/model.safetensors"
    done
}
same() { # same RUN A DESCRIPTION
    checks=$((checks + 1))
    [ "$(digests "$1")" = "$(digests "$2")" ] || fail "$1 and $2 differ ($3)"
}

# --- a whole run: what it prints and what it leaves
expect 0 'iteration 2' iter 2 whole
expect_count 2 '^iteration [12]$'
expect_count 2 'new answer was +best'
expect_count 2 'loss +[0-9.]+ = DPO'
expect_count 2 'held-out answers +mean ranker score'
expect_count 2 'train +[0-9]+ tokens/s'
for file in recipe.cfg manifest.json prefs.h5 test.h5 iter0/test.h5 iter1/iter.h5 iter2/policy/config.json iter1/policy/metrics.jsonl; do
    checks=$((checks + 1))
    [ -e "whole/$file" ] || fail "whole/$file is missing"
done
for file in iter0/test.h5 iter1/iter.h5 iter1/test.h5 iter2/iter.h5 iter2/test.h5; do
    expect 0 'verified' "$bin/selm_inspect" --verify "whole/$file"
done
checks=$((checks + 1))
leftovers=$(find whole -name '*.journal' -o -name '*.partial*')
[ -z "$leftovers" ] || fail "left behind: $leftovers"
# The first step of an iteration has learning rate 0 and loss log 2; the policy must have moved after it.
checks=$((checks + 1))
grep -q '"loss":0.69314' whole/iter1/policy/metrics.jsonl || fail "the first loss is not log 2"
checks=$((checks + 1))
[ "$(sha256sum < whole/iter1/policy/model.safetensors)" != "$(sha256sum < policy/model.safetensors)" ] || fail "training changed nothing"

# --- a dry run: the plan of the same recipe, without weights; the real run kept within the planned memory
mkdir shape
cp policy/config.json shape/
expect 0 'iteration 2: rows 6:12, policy RUN/iter1/policy' "$bin/selm_iter" --config recipe.cfg --policy shape --dry-run --ranks 64
expect_count 2 '3 optimizer steps of 2 rows, 1 of them warm-up'
expect_count 1 '^missing +policy weights: shape'
expect_count 1 'each with one owner among 64 ranks'
expect_count 1 '^rows +13 in 2 portion\(s\) of 6 \(1 unused\), 3 held out'
plan=$("$bin/selm_iter" --config recipe.cfg --dry-run --ranks 2 --format json)
planned=$(grep '"node_bytes"' <<<"$plan" | tail -1 | tr -dc 0-9)
used=$(sed 's/.*"peak_bytes":\([0-9]*\).*/\1/' whole/iter?/policy/metrics.jsonl | sort -n | tail -1)
checks=$((checks + 1))
if [ "$used" -le 0 ] || [ $((2 * used)) -gt "$planned" ]; then
    fail "training used $used bytes of each of two ranks, $planned were planned for both"
fi
checks=$((checks + 1))
[ ! -e RUN ] || fail "a dry run wrote something"
# A recipe that cannot run: one message, before anything is done.
expect 65 'rows for 14 iterations' "$bin/selm_iter" --config recipe.cfg --dry-run --iterations 14
expect 65 'train = nowhere.jsonl does not exist' "$bin/selm_iter" --config recipe.cfg --train nowhere.jsonl --train-rows 3: --dry-run
expect 65 'asks for more than the 10 rows' "$bin/selm_iter" --config recipe.cfg --rows-total 10 --dry-run
expect 78 'nowhere/config.json' "$bin/selm_iter" --config recipe.cfg --policy nowhere --dry-run
expect 78 'generate needs .* GiB on a node' "$bin/selm_iter" --config recipe.cfg --dry-run --node-memory 0.001
expect 78 'was made with another recipe: train.beta was 0.01, now 0.1' "$bin/selm_iter" --config recipe.cfg --train.beta 0.1 --run whole --dry-run
expect 64 'schedule round is not known' iter 2 refused --schedule round
checks=$((checks + 1))
[ ! -e refused ] || fail "a refused recipe left a run directory"

# --- a rerun finds everything done, on another number of ranks
before=$(digests whole)
expect 0 'iteration 2' iter 3 whole
checks=$((checks + 1))
[ "$(digests whole)" = "$before" ] || fail "a rerun changed a finished run"

# --- without mpirun, status reads only
expect 0 'iteration 2' "$bin/selm_iter" --run whole --status
expect_count 3 'test_rank +done'
expect 65 'no run directory' "$bin/selm_iter" --run policy --status

# --- another recipe is refused and the key named
expect 78 'train.beta was 0.01, now 0.1' iter 2 whole --train.beta 0.1
expect 0 'iteration 2' iter 2 whole --gen.slots 3

# --- STOP: exit 75, then on from there to the same results
mkdir stopped
touch stopped/STOP
expect 75 'stop requested' iter 2 stopped
rm stopped/STOP
expect 0 'iteration 2' iter 2 stopped
same stopped whole "stopped and continued"

# --- kill -9 of a rank as one file after the other appears, or a little later; then the run ends
kills=0
for file in prefs.h5 iter0/test.h5.journal iter0/test.h5 iter1/iter.h5.journal iter1/iter.h5 iter1/policy/metrics.jsonl iter1/policy/config.json \
    iter1/test.h5 iter2/iter.h5 iter2/policy/metrics.jsonl none; do
    if [ -e "killed/$file" ]; then continue; fi
    iter 2 killed >killed.log 2>&1 &
    launcher=$!
    if comes_to "$launcher" exists "killed/$file"; then
        sleep "0.0$((RANDOM % 4))"
        if kill -9 "$(ranks_of "$launcher" selm_iter | sort -R | head -1)" 2>/dev/null; then kills=$((kills + 1)); fi
    fi
    status=0
    wait "$launcher" || status=$?
done
echo "killed $kills times"
checks=$((checks + 2))
[ "$kills" -ge 5 ] || fail "only $kills kills hit the run"
[ "$status" -eq 0 ] || { fail "the killed run never ended"; cat killed.log; }
same killed whole "killed and rerun"

# --- a first iteration on the given pairs: they are not scored
expect 0 'the given pairs, no new answers' iter 2 dpo --first-iteration dpo --iterations 1
checks=$((checks + 1))
grep -q '"loss/optimism":0.0' dpo/iter1/policy/metrics.jsonl || fail "iterative DPO has an optimism term"

finish
