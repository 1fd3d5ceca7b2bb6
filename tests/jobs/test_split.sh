#!/usr/bin/env bash
# Split brain: a node is cut off (cable, or slurmd dead) and goes on with the job that SLURM starts again elsewhere. In each phase the older
# copy wakes up while the newer one is at work, and stops by itself. Also: slurmd dies and comes back; the controller is restarted.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 3 1700 "${BASH_SOURCE[0]}"
make_long_recipe 128
job_script=$SELM_SOURCE_DIR/jobs/selm_iter.slurm
make_reference
one_node=(--nodes=1 --ntasks-per-node=2) # all ranks of the older copy are on its node, so it could go on to the end

# split RUN JOB PHASE cable|slurmd: the older copy is frozen until the newer one is at work on that phase.
split() {
    local run=$1 job=$2 phase=$3 how=$4 node newer attempts
    catch "$run" "$phase" 1
    attempts=$(attempts_of "$run")
    node=$(nodes_of "$job")
    if [ "$how" = cable ]; then unplug "$node"; else kill_slurmd "$node"; fi
    [ "$phase" != generate ] || saved=$(journalled "$run" 1)
    wait_until "restart of job $job" has_attempts "$run" $((attempts + 1))
    wait_until "$phase in the newer copy" log_count "$(log_of "$job")" 2 "iteration 1 of 2: $phase"
    newer=$(nodes_of "$job")
    to_programs "$newer" STOP # for the rest of the phase to be there while the node comes back
    to_programs "$node" CONT
    # The older copy ends by itself: nobody can reach it.
    wait_until "end of the older copy of job $job" no_programs "$node"
    if [ "$how" = cable ]; then plug_restarted "$node"; else start_slurmd "$node"; fi
    to_programs "$newer" CONT
}

one=$(submit "${one_node[@]}" "$job_script" --run cable)
for phase in "${phases[@]}"; do split cable "$one" "$phase" cable; done
ends_as COMPLETED "$one"
all_nodes_back
expect 0 'a newer attempt, 2, has taken over' cat "$(log_of "$one")"
expect_count 4 'a newer attempt, [2-5], has taken over .*changes nothing there'
expect_count 4 'this copy ends and asks for nothing'
checks=$((checks + 1))
[ "$(attempts_of cable)" = 5 ] || fail "$(attempts_of cable) attempts instead of 5"
none_twice cable "$(log_of "$one")" "$saved"
unspoilt cable

# slurmd alone is dead: the older copy reaches the controller, and must not requeue the newer one. It wakes up when that is done.
two=$(submit "${one_node[@]}" "$job_script" --run orphan)
catch orphan generate 1
node=$(nodes_of "$two")
kill_slurmd "$node"
ends_as COMPLETED "$two"
find orphan -type f ! -path 'orphan/slurm/*' -exec sha256sum {} + | sort >before
to_programs "$node" CONT
wait_until "end of the older copy of job $two" no_programs "$node"
find orphan -type f ! -path 'orphan/slurm/*' -exec sha256sum {} + | sort >after
checks=$((checks + 2))
cmp before after || fail "the older copy changed the finished run: $(diff before after)"
[ "$(job_state "$two")" = COMPLETED ] || fail "the older copy changed the job's state"
# srun may hear of the lost node first.
expect 0 'this copy ends and asks for nothing|not requeued by this script, since the job is PENDING' cat "$(log_of "$two")"
unspoilt orphan
start_slurmd "$node"
all_nodes_back

# slurmd comes back in time, the controller is restarted, and a stop signal comes while it is away: one restart, of the signal.
three=$(submit --nodes=2 --ntasks-per-node=1 "$job_script" --run daemons)
catch daemons generate 1
release daemons
mapfile -t nodes < <(nodes_of "$three")
kill_slurmd "${nodes[0]}"
start_slurmd "${nodes[0]}"
crash_controller "$three"
sleep 3
start_controller
catch daemons train 1
crash_controller "$three"
on_node "${nodes[0]}" pkill -USR1 slurm_script || fail "no batch script on node${nodes[0]}"
wait_until "USR1" log_has "$(log_of "$three")" 'stop signal'
release daemons
wait_until "end of the ranks" log_has "$(log_of "$three")" 'exit code 75'
start_controller
ends_as COMPLETED "$three"
checks=$((checks + 1))
[ "$(attempts_of daemons)" = 2 ] || fail "$(attempts_of daemons) attempts instead of 2"
unspoilt daemons
finish
