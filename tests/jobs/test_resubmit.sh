#!/usr/bin/env bash
# A site that forbids to requeue: a stopped job submits itself again, and jobs that wait for it wait for the new one.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 3 1700 "${BASH_SOURCE[0]}"
make_long_recipe 128
job_script=$SELM_SOURCE_DIR/jobs/selm_iter.slurm
make_reference

echo "all --nodes=2 --ntasks-per-node=1 --time=30 --no-requeue" >phases.cfg
expect 0 '^state: squeue' "$SELM_SOURCE_DIR/slurm/submit_chain.sh" --config recipe.cfg --run chained --phases phases.cfg
gen=$(sed -n 's/^\([0-9]*\)  gen of iteration 1$/\1/p' <<<"$output")
rank=$(sed -n 's/^\([0-9]*\)  rank of iteration 1$/\1/p' <<<"$output")
last=$(sed -n 's/^\([0-9]*\)  iter .*/\1/p' <<<"$output")
catch chained generate 1
usr1 "$gen" "selm-gen-1-$gen.out"
ends_as FAILED "$gen"
expect 0 'SLURM refuses to requeue' cat "selm-gen-1-$gen.out"
again=$(sed -n 's/^selm: job \([0-9]*\) goes on in place of this one$/\1/p' <<<"$output")
expect_count 1 "job $rank waits for job $again now"
expect 0 "^$again gen 1" cat chained/slurm/jobs
ends_as COMPLETED "$again"
ends_as COMPLETED "$last"
unspoilt chained

# Such a job, always stopping without progress, and one with a stop file.
mkdir stub
cat >stub/selm_iter <<'STUB'
#!/bin/sh
[ "$1" = --version ] || exit 75
STUB
chmod +x stub/selm_iter
stuck=$(PATH=$PWD/stub:$PATH SELM_MAX_RESTARTS=2 submit --no-requeue "$job_script" --run stuck)
ends_as FAILED "$stuck"
again=$(sed -n 's/^selm: job \([0-9]*\) goes on in place of this one$/\1/p' "selm-iter-$stuck.out")
ends_as FAILED "$again"
expect 0 'restarts brought no progress' cat "selm-iter-$again.out"
expect_count 0 'goes on in place'

finish
