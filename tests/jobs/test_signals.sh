#!/usr/bin/env bash
# A stop signal in each phase, by hand and ahead of the time limit; scontrol requeue; scancel.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 3 1700 "${BASH_SOURCE[0]}"
make_long_recipe 128
job_script=$SELM_SOURCE_DIR/jobs/selm_iter.slurm
two_nodes=(--nodes=2 --ntasks-per-node=1)
make_reference

# Ahead of the time limit in each phase: one job for each, which waits there for SLURM, which looks at limits twice a minute.
limited=()
for phase in "${phases[@]}"; do
    limited+=("$(submit --nodes=1 --ntasks-per-node=2 --time=1 --signal=B:USR1@30 "$job_script" --run "limit_$phase")")
    catch "limit_$phase" "$phase" 1
done
for ((k = 0; k < 4; k++)); do
    wait_until "a signal ahead of the limit of job ${limited[k]}" log_has "$(log_of "${limited[k]}")" 'stop signal'
    release "limit_${phases[k]}"
done
for ((k = 0; k < 4; k++)); do
    wait_until "restart of job ${limited[k]}" has_attempts "limit_${phases[k]}" 2
    scontrol update "JobId=${limited[k]}" TimeLimit=60 # the limit has done its part
done

# USR1 in each phase of the first iteration.
one=$(submit "${two_nodes[@]}" "$job_script" --run signalled)
for phase in "${phases[@]}"; do
    catch signalled "$phase" 1
    [ "$phase" != generate ] || saved=$(journalled signalled 1)
    starts=$(attempts_of signalled)
    usr1 "$one" "$(log_of "$one")"
    wait_until "restart of job $one" has_attempts signalled $((starts + 1))
done
ends_as COMPLETED "$one"
expect 0 'requeued .restart 4.' cat "$(log_of "$one")"
expect_count 4 'everything .*saved; requeued'
unspoilt signalled
none_twice signalled "$(log_of "$one")" "$saved"

for ((k = 0; k < 4; k++)); do
    ends_as COMPLETED "${limited[k]}"
    expect 0 'everything .*saved; requeued .restart 1.' cat "$(log_of "${limited[k]}")"
    unspoilt "limit_${phases[k]}"
done

# scontrol requeue: the ranks get TERM, and little time to save. The same run is then cancelled, and goes on by hand.
two=$(submit "${two_nodes[@]}" "$job_script" --run requeued)
catch requeued generate 1
release requeued
scontrol requeue "$two"
wait_until "restart of job $two" has_attempts requeued 2
catch requeued train 1
release requeued
scontrol requeue "$two"
wait_until "restart of job $two" has_attempts requeued 3
catch requeued generate 2
release requeued
scancel "$two"
ends_as CANCELLED "$two"
checks=$((checks + 1))
[ ! -e requeued/iter2/policy/training.json ] || fail "the cancelled run was finished: nothing was tested"
two=$(submit "${two_nodes[@]}" "$job_script" --run requeued)
ends_as COMPLETED "$two"
unspoilt requeued
finish
