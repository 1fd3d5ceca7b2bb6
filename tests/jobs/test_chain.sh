#!/usr/bin/env bash
# slurm/submit_chain.sh on two nodes: the results of selm_iter; a failing phase; what --resume submits.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 2 880 "${BASH_SOURCE[0]}"
make_recipe 16 9
chain=$SELM_SOURCE_DIR/slurm/submit_chain.sh
echo "all --nodes=2 --ntasks-per-node=1 --time=30" >phases.cfg

expect 0 '^state: squeue' "$chain" --config recipe.cfg --run chained --phases phases.cfg
expect_count 8 '^[0-9]+  (gen|rank|logp|train) of iteration [12]$'
last=$(sed -n 's/^\([0-9]*\)  iter .*/\1/p' <<<"$output")
state=$(sed -n 's/^state: //p' <<<"$output")
expect 64 'still in the queue' "$chain" --run chained --phases phases.cfg --resume
expect 0 "^job $last +iter of iteration 2 +PENDING" selm_iter --run chained --status
mpi 2 selm_iter --config recipe.cfg --run reference --progress off >reference.log 2>&1
ends_as COMPLETED "$last"
same reference chained "selm_iter on two ranks, and the chain"
expect 0 'COMPLETED' bash -c "$state"
expect_count 9 'COMPLETED'
expect 0 "^job $last +iter of iteration 2 +COMPLETED" selm_iter --run chained --status
expect_count 15 ' done +[0-9]+ (rows|steps)' # the import, four phases of two iterations, held-out answers and their scores three times
expect 0 'iteration 2' cat "selm-iter-2-$last.out" # the last job sums up both iterations
expect_count 2 'held-out answers'
expect_count 0 'iteration [12] of 2: train.*done'
expect 64 'has a chain already' "$chain" --config recipe.cfg --run chained --phases phases.cfg

# Nothing but the summary is left to do.
expect 0 'selm_iter.slurm' "$chain" --run chained --phases phases.cfg --resume --dry-run
expect_count 1 sbatch
# One phase failed in a former chain.
rm chained/slurm/done/2-train
expect 0 'dependency=afterok:<train-2>' "$chain" --run chained --phases phases.cfg --resume --dry-run
expect_count 2 sbatch

# A phase that cannot run ends the chain: one reason, nothing pending for ever.
ends_chain() { # ends_chain RUN PHASE REASON: the phase of iteration 1 fails
    local id last
    expect 0 '^state: squeue' "$chain" --config bad.cfg --run "$1" --phases phases.cfg
    id=$(sed -n "s/^\([0-9]*\)  $2 of iteration 1\$/\1/p" <<<"$output")
    last=$(sed -n 's/^\([0-9]*\)  iter .*/\1/p' <<<"$output")
    ends_as FAILED "$id"
    ends_as CANCELLED "$last"
    expect 0 'Not run again' cat "selm-$2-1-$id.out"
    expect_count 1 "$3.*exit code"
    checks=$((checks + 1))
    [ -z "$(squeue -h -t PENDING,RUNNING -o %i)" ] || fail "jobs are left: $(squeue)"
}
sed 's/reward:reward/reward:nowhere/' recipe.cfg >bad.cfg
ends_chain bad_recipe rank nowhere
head -n 4 "$SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl" >bad.jsonl
echo '{"prompt": "and then' >>bad.jsonl
sed 's,^train = .*,train = bad.jsonl,' recipe.cfg >bad.cfg
ends_chain bad_data gen 'bad.jsonl'
finish
