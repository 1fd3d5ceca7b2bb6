#!/usr/bin/env bash
# A node loses power in each phase, the batch host among them, under srun and under mpirun; two nodes at once; and in a chain.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 3 1700 "${BASH_SOURCE[0]}"
make_long_recipe 128
job_script=$SELM_SOURCE_DIR/jobs/selm_iter.slurm
make_reference

# shellcheck disable=SC2317 # called by wait_until
job_waits() { [ "$(job_state "$1")" = PENDING ]; }

# cut RUN JOB PHASE first|last...: power cuts of nodes of the job; ends when the next attempt is there and the nodes are back.
cut() {
    local run=$1 job=$2 phase=$3 nodes number attempts
    shift 3
    catch "$run" "$phase" 1
    attempts=$(attempts_of "$run")
    mapfile -t nodes < <(nodes_of "$job")
    [ "$phase" != generate ] || saved=$(journalled "$run" 1)
    release "$run"
    for number; do
        if [ "$number" = first ]; then power_cut "${nodes[0]}"; else power_cut "${nodes[-1]}"; fi
    done
    # Where no two nodes are left, the job can only start again when they are back, which SLURM has to have missed first.
    # Nor may it start within the second in which a node that came back is told to end the job's former start: SLURM's credentials
    # count whole seconds, so such a node takes the new start for the old one and the controller ends the job ("Job credential revoked").
    if [ $# = 1 ]; then
        wait_until "restart of job $job" has_attempts "$run" $((attempts + 1))
    else
        wait_until "job $job to lose its nodes" job_waits "$job"
        scontrol hold "$job"
    fi
    for number; do
        if [ "$number" = first ]; then power_on "${nodes[0]}"; else power_on "${nodes[-1]}"; fi
    done
    if [ $# != 1 ]; then
        all_nodes_back
        sleep 2
        scontrol release "$job"
    fi
    wait_until "restart of job $job" has_attempts "$run" $((attempts + 1))
}

one=$(submit --nodes=2 --ntasks-per-node=1 "$job_script" --run by_srun)
cut by_srun "$one" generate last
cut by_srun "$one" rank first
cut by_srun "$one" logprob last
cut by_srun "$one" train first
ends_as COMPLETED "$one"
all_nodes_back
checks=$((checks + 1))
[ "$(attempts_of by_srun)" = 5 ] || fail "$(attempts_of by_srun) attempts instead of 5"
none_twice by_srun "$(log_of "$one")" "$saved"
unspoilt by_srun

two=$(SELM_LAUNCHER=mpirun submit --nodes=2 --ntasks-per-node=1 "$job_script" --run by_mpirun)
cut by_mpirun "$two" generate last
# By the script, where mpirun sees connections close as the node dies, else by SLURM.
expect 0 'requeued .restart 1.|DUE TO NODE FAILURE' cat "$(log_of "$two")"
cut by_mpirun "$two" train first last
ends_as COMPLETED "$two"
all_nodes_back
unspoilt by_mpirun

echo "all --nodes=2 --ntasks-per-node=1 --time=30" >phases.cfg
expect 0 '^state: squeue' "$SELM_SOURCE_DIR/slurm/submit_chain.sh" --config recipe.cfg --run chained --phases phases.cfg
logp=$(sed -n 's/^\([0-9]*\)  logp of iteration 1$/\1/p' <<<"$output")
last=$(sed -n 's/^\([0-9]*\)  iter .*/\1/p' <<<"$output")
cut chained "$logp" logprob last
ends_as COMPLETED "$last"
unspoilt chained
finish
