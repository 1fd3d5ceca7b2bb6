#!/usr/bin/env bash
# A stop signal in each phase, by hand and ahead of the time limit; scontrol requeue; scancel; a site that forbids to requeue.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 3 880 "${BASH_SOURCE[0]}"
make_long_recipe 48
job_script=$SELM_SOURCE_DIR/jobs/selm_iter.slurm
two_nodes=(--nodes=2 --ntasks-per-node=1)
make_reference

# usr1 JOB LOG: the programs stand still until the script has the signal, so that they are not done by then.
usr1() {
    local nodes node before
    mapfile -t nodes < <(nodes_of "$1")
    before=$(grep -c 'stop signal' "$2" || true)
    for node in "${nodes[@]}"; do to_programs "$node" STOP; done
    saved=$(journalled "$(sed -n 's/^selm: run directory \([^,]*\),.*/\1/p' "$2" | head -n 1)" 1)
    [ "$saved" = 0 ] || most_saved=$saved # the journal is there in generation only
    scancel --batch --signal=USR1 "$1"
    wait_until 60 "USR1 in job $1" log_count "$2" $((before + 1)) 'stop signal'
    for node in "${nodes[@]}"; do to_programs "$node" CONT; done
}

# Beside all of this, ahead of its limit: SLURM looks at limits twice a minute.
sed 's/^train-rows = .*/train-rows = 0:256/; s/^iterations = .*/iterations = 1/' recipe.cfg >limit.cfg
limited=$(submit --nodes=1 --ntasks-per-node=1 --time=1 --signal=B:USR1@30 "$job_script" --config limit.cfg --run limited)

# USR1 in each phase of the first iteration.
one=$(submit "${two_nodes[@]}" "$job_script" --run signalled)
for phase in "${phases[@]}"; do
    wait_until 200 "$phase of job $one" at_work signalled "$phase" 1
    starts=$(attempts_of signalled)
    usr1 "$one" "$(log_of "$one")"
    wait_until 100 "restart of job $one" has_attempts signalled $((starts + 1))
done
ends_as COMPLETED 200 "$one"
expect 0 'requeued .restart 4.' cat "selm-iter-$one.out"
expect_count 4 'everything .*saved; requeued'
unspoilt signalled
none_twice signalled "$(log_of "$one")" "$most_saved"

# scontrol requeue: the ranks get TERM, and no time to save. The same run is then cancelled, and goes on by hand.
two=$(submit "${two_nodes[@]}" "$job_script" --run requeued)
wait_until 200 "job $two at work" at_work requeued generate 1
scontrol requeue "$two"
wait_until 100 "restart of job $two" log_count "selm-iter-$two.out" 2 '^selm: attempt'
wait_until 200 "training of job $two" at_work requeued train 1
scontrol requeue "$two"
wait_until 100 "restart of job $two" log_count "selm-iter-$two.out" 3 '^selm: attempt'
wait_until 200 "iteration 2 of job $two" at_work requeued generate 2
scancel "$two"
ends_as CANCELLED 100 "$two"
checks=$((checks + 1))
[ ! -e requeued/iter2/policy/training.json ] || fail "the cancelled run was finished: nothing was tested"
expect 0 'not requeued by this script' cat "selm-iter-$two.out"
two=$(submit "${two_nodes[@]}" "$job_script" --run requeued)
ends_as COMPLETED 200 "$two"
unspoilt requeued

# A chain at a site that forbids to requeue: the job submits itself again, and the jobs behind it wait for that one.
echo "all --nodes=2 --ntasks-per-node=1 --time=30 --no-requeue" >phases.cfg
expect 0 '^state: squeue' "$SELM_SOURCE_DIR/slurm/submit_chain.sh" --config recipe.cfg --run chained --phases phases.cfg
gen=$(sed -n 's/^\([0-9]*\)  gen of iteration 1$/\1/p' <<<"$output")
rank=$(sed -n 's/^\([0-9]*\)  rank of iteration 1$/\1/p' <<<"$output")
last=$(sed -n 's/^\([0-9]*\)  iter .*/\1/p' <<<"$output")
wait_until 200 "generation of the chain" at_work chained generate 1
usr1 "$gen" "selm-gen-1-$gen.out"
ends_as FAILED 100 "$gen"
expect 0 'SLURM refuses to requeue' cat "selm-gen-1-$gen.out"
again=$(sed -n 's/^selm: job \([0-9]*\) goes on in place of this one$/\1/p' <<<"$output")
expect_count 1 "job $rank waits for job $again now"
expect 0 "^$again gen 1" cat chained/slurm/jobs
ends_as COMPLETED 300 "$again"
ends_as COMPLETED 300 "$last"
unspoilt chained

# Such a job, always stopping without progress, and one with a stop file.
mkdir stub
cat >stub/selm_iter <<'STUB'
#!/bin/sh
[ "$1" = --version ] || exit 75
STUB
chmod +x stub/selm_iter
stuck=$(PATH=$PWD/stub:$PATH SELM_MAX_RESTARTS=2 submit --no-requeue "$job_script" --run stuck)
ends_as FAILED 100 "$stuck"
again=$(sed -n 's/^selm: job \([0-9]*\) goes on in place of this one$/\1/p' "selm-iter-$stuck.out")
ends_as FAILED 100 "$again"
expect 0 'restarts brought no progress' cat "selm-iter-$again.out"
expect_count 0 'goes on in place'

wait_until 300 "end of job $limited" job_ended "$limited"
ends_as COMPLETED 10 "$limited"
expect 0 'stop signal' cat "selm-iter-$limited.out"
expect_count 1 'everything .*saved; requeued .restart 1.'
selm_iter --config limit.cfg --run unlimited --progress off >unlimited.log 2>&1
same unlimited limited "USR1 ahead of the limit" iter1/iter.h5
finish
