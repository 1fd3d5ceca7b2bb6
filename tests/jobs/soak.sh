#!/usr/bin/env bash
# usage: soak.sh [FAULTS [SEED]]   (default 24 faults, seed 1)
#
# Random faults at random moments, on runs that go one after the other until all faults have happened; every run has to end with the
# data, weights and steps of an undisturbed one, and no row that was journalled before a fault is made again. Faults and pauses follow
# from the seed as long as runs end after the same faults; where in a phase a fault hits depends on the machine. Prints one line per fault
# and per run; SELM_SOAK_LOG names a file that gets them too.
set -euo pipefail
export SOAK_FAULTS=${1:-${SOAK_FAULTS:-24}} SOAK_SEED=${2:-${SOAK_SEED:-1}}
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 3 3500 "${BASH_SOURCE[0]}"
make_long_recipe 32 8
make_reference
RANDOM=$SOAK_SEED
kinds=(usr1 requeue power_last power_first cable slurmd slurmd_back controller scancel)

tell() {
    echo "$*"
    if [ -n "${SELM_SOAK_LOG:-}" ]; then echo "$*" >>"$SELM_SOAK_LOG"; fi
}
tell "$(date -u +%Y-%m-%dT%H:%M:%SZ) $SOAK_FAULTS faults, seed $SOAK_SEED; $(nproc --all) cores, load $(cut -d ' ' -f 1 /proc/loadavg);" \
    "$(sbatch --version), $(mpirun --version | head -n 1)"

start_job() { # on two nodes or on one, by srun or by mpirun
    local launcher=srun
    [ $((RANDOM % 3)) != 0 ] || launcher=mpirun
    if [ $((RANDOM % 2)) = 0 ]; then size=(--nodes=2 --ntasks-per-node=1); else size=(--nodes=1 --ntasks-per-node=2); fi
    job=$(SELM_LAUNCHER=$launcher SELM_MAX_RESTARTS=10 submit "${size[@]}" "$SELM_SOURCE_DIR/jobs/selm_iter.slurm" --run "$run")
    tell "  job $job: $launcher, ${size[0]}"
}
# shellcheck disable=SC2317 # called by wait_until
at_work_anywhere() { job_ended "$job" || { [ "$(job_state "$job")" = RUNNING ] && has_attempts "$run" "$1"; }; }

# fault KIND: does it, and repairs what it broke once the job has reacted.
fault() {
    local first last
    mapfile -t nodes < <(nodes_of "$job")
    first=${nodes[0]}
    last=${nodes[-1]}
    case $1 in
        usr1) scancel --batch --signal=USR1 "$job" || true ;;
        requeue) scontrol requeue "$job" || true ;;
        scancel)
            scancel "$job"
            wait_until "end of job $job" job_ended "$job"
            start_job
            ;;
        power_last) power_cut "$last" ;;
        power_first) power_cut "$first" ;;
        cable) unplug "$first" ;;
        slurmd) kill_slurmd "$first" ;;
        slurmd_back) kill_slurmd "$first"; start_slurmd "$first" ;;
        controller) kill_controller; sleep $((RANDOM % 5)); start_controller ;;
    esac
    case $1 in
        usr1 | requeue | scancel | power_*) wait_until "job $job to go on" at_work_anywhere $((attempts + 1)) ;;
        cable | slurmd) # some copies are frozen for a while, others are done before the newer one begins
            if [ $((RANDOM % 2)) = 0 ]; then to_programs "$first" STOP; fi
            wait_until "job $job to go on" at_work_anywhere $((attempts + 1))
            to_programs "$first" CONT
            ;;
    esac
    case $1 in
        power_last) power_on "$last" ;;
        power_first) power_on "$first" ;;
        cable) plug_restarted "$first" ;;
        slurmd) start_slurmd "$first" ;;
    esac
    all_nodes_back
}

done_faults=0
runs=0
while [ "$done_faults" -lt "$SOAK_FAULTS" ] && [ "$failures" = 0 ]; do
    runs=$((runs + 1))
    run=run$runs
    saved=(0 0 0)
    start_job
    while [ "$done_faults" -lt "$SOAK_FAULTS" ]; do
        kind=${kinds[RANDOM % ${#kinds[@]}]}
        pause=$((RANDOM % 40))
        attempts=0
        [ ! -d "$run/attempts" ] || attempts=$(attempts_of "$run")
        wait_until "job $job to begin" at_work_anywhere $((attempts > 0 ? attempts : 1))
        sleep "$((pause / 10)).$((pause % 10))"
        attempts=$(attempts_of "$run")
        if [ "$(job_state "$job")" != RUNNING ]; then
            if job_ended "$job"; then break; fi
            continue
        fi
        done_faults=$((done_faults + 1))
        where=$(grep -ho 'iteration [0-9] of 2: [a-z_]*\|before training: [a-z_]*' "$(log_of "$job")" | tail -n 1 || true)
        for t in 1 2; do
            rows=$(journalled "$run" $t)
            [ "$rows" = 0 ] || saved[t]=$rows # the journal is there in generation only
        done
        fault "$kind"
        tell "  $(date -u +%H:%M:%S) fault $done_faults: $kind, ${pause} tenths of a second after the start; ${where:-start}; attempts $attempts -> $(attempts_of "$run")"
        [ "$failures" = 0 ] || break
    done
    ends_as COMPLETED "$job"
    unspoilt "$run"
    for t in 1 2; do
        if [ "${saved[t]}" != 0 ]; then none_twice "$run" "$(log_of "$job")" "${saved[t]}" $t; fi
    done
    tell "run $runs: $([ "$failures" = 0 ] && echo equals the undisturbed run || echo FAILED), $(attempts_of "$run") attempts"
done
tell "$(date -u +%Y-%m-%dT%H:%M:%SZ) $done_faults faults in $runs runs, $failures failures, load $(cut -d ' ' -f 1 /proc/loadavg)"
finish
