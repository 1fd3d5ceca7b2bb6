# shellcheck shell=bash
# What all batch scripts of jobs/ share: options, site profile, launcher, provenance, signals, and what happens at the end.
# A script sets `selm_slurm` (the directory above this one), sources this file and calls a selm_job_* function.
# The program's exit code decides: 0 done, 75 requeue, lost node requeue, everything else fails (SITES.md).

: "${selm_slurm:?set by the script that sources this}"
# shellcheck source=slurm/lib/recipe.sh
source "$selm_slurm/lib/recipe.sh"

selm_rc=0                    # exit code of the last step
selm_started=0               # all ranks of the last step were there
selm_signalled=0             # a stop signal came during this job
selm_woken=0                 # a signal interrupted the present wait
selm_pid=                    # launcher of the present step
selm_next_attempt=           # exists once another copy of this job, or another job, has taken over the run directory
selm_step_nodes=             # nodes of the next steps; empty: all of the job
SELM_SRUN_OPTIONS=()         # a profile may add to these
SELM_MPIRUN_OPTIONS=()

say() { echo "selm: $*"; }
die() { # die CODE MESSAGE
    echo "selm: error: $2" >&2
    exit "$1"
}

# --- options and places --------------------------------------------------------------------------------------------

# selm_options ARGUMENTS...: sets config, run, iteration, extra; for --help prints and ends.
selm_options() {
    config=${SELM_CONFIG:-}
    run=${SELM_RUN:-}
    iteration=
    extra=()
    while [ $# -gt 0 ]; do
        case $1 in
            --config) config=${2:?"--config needs a file"}; shift 2 ;;
            --run) run=${2:?"--run needs a directory"}; shift 2 ;;
            --iteration) iteration=${2:?"--iteration needs a number"}; shift 2 ;;
            --) shift; extra=("$@"); break ;;
            *) die 64 "unknown option $1 (see --help; options of the program follow --)" ;;
        esac
    done
    [ -n "${SLURM_JOB_ID:-}" ] || die 64 "this is a batch script: sbatch [OPTIONS OF SBATCH] $0 (see --help)"
    if [ -z "$config" ]; then
        config=recipe.cfg
        [ -e "$config" ] || config=configs/smollm2_135m.cfg
    fi
    [ -r "$config" ] || die 78 "no recipe $config in $PWD (nothing says what to train). Pass --config FILE"
    # The id survives a requeue, and so does the directory.
    [ -n "$run" ] || run=runs/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
    mkdir -p "$run/slurm"
    say "run directory $run, recipe $config"
}

selm_load_site() {
    local site=${SELM_SITE:-generic}
    local profile=$selm_slurm/sites/$site/profile.sh
    [ -r "$profile" ] || die 78 "site '$site' is not known (there is no $profile). Set SELM_SITE to one of: $(ls "$selm_slurm/sites")"
    set +u # module systems use unset variables
    # shellcheck source=/dev/null
    source "$profile"
    set -u
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    # Since SLURM 22.05 srun does not take this from the job.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    say "site $site"
}

# selm_program NAME: its path.
selm_program() {
    local directory
    if [ -n "${SELM_ROOT:-}" ] && [ -x "$SELM_ROOT/bin/$1" ]; then echo "$SELM_ROOT/bin/$1"; return; fi
    if command -v "$1"; then return; fi
    for directory in "$selm_slurm/../../../bin" "$selm_slurm/../build/release/bin"; do
        if [ -x "$directory/$1" ]; then (cd "$directory" && echo "$PWD/$1"); return; fi
    done
    die 78 "$1 is not installed (not in SELM_ROOT/bin, PATH or beside $selm_slurm). Set SELM_ROOT, or PATH by a module"
}

selm_choose_launcher() {
    if [ -z "${SELM_LAUNCHER:-}" ]; then
        if srun --mpi=list 2>&1 | grep -qw pmix; then
            SELM_LAUNCHER=srun
            say "launcher srun --mpi=pmix"
        elif command -v mpirun >/dev/null; then
            SELM_LAUNCHER=mpirun
            say "launcher mpirun (this SLURM has no pmix)"
        else
            die 78 "no launcher (this SLURM has no pmix, and mpirun is not in PATH). Load an MPI module in the site profile"
        fi
    else
        case $SELM_LAUNCHER in
            srun | mpirun) say "launcher $SELM_LAUNCHER, as SELM_LAUNCHER says" ;;
            *) die 78 "SELM_LAUNCHER is '$SELM_LAUNCHER'. Use srun or mpirun" ;;
        esac
    fi
    # The tree that SLURM's PMIx takes for fences without data is none on fewer nodes than TreeWidth: nobody waits (docs/SITES.md).
    export SLURM_PMIX_FENCE=${SLURM_PMIX_FENCE:-ring}
}

# selm_provenance: what ran where, appended beside the results.
selm_provenance() {
    {
        echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0}"
        echo "script ${SLURM_JOB_NAME:-}, recipe $config, site ${SELM_SITE:-generic}, launcher $SELM_LAUNCHER"
        echo "nodes ${SLURM_JOB_NODELIST:-}, tasks ${SLURM_NTASKS:-}"
        echo "modules ${LOADEDMODULES:-none}"
        "$(selm_program selm_iter)" --version || echo "selm_iter --version fails"
        scontrol show job "$SLURM_JOB_ID" || true
    } >>"$run/slurm/provenance.txt" 2>&1
}

# selm_claim: takes the run directory for this start of the job, and passes that on to the programs (docs/FORMATS.md, "Attempts").
selm_claim() {
    local number=1 file
    mkdir -p "$run/attempts"
    while :; do
        printf -v file '%s/attempts/%06d' "$run" "$number"
        # noclobber creates a file only where there is none, also when two do it at once
        if (set -o noclobber; echo "host $(hostname) job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0}" \
            "at $(date -u +%Y-%m-%dT%H:%M:%SZ)" >"$file") 2>/dev/null; then break; fi
        [ -e "$file" ] || die 74 "$file cannot be written (full disk, or no permission)"
        number=$((number + 1))
    done
    printf -v selm_next_attempt '%s/attempts/%06d' "$run" $((number + 1))
    export SELM_ATTEMPT=$file
    say "attempt $number at $run"
}

# selm_end_time: tells the programs when the job ends, for --walltime-margin. SLURM does so itself since 23.02.
selm_end_time() {
    [ -z "${SLURM_JOB_END_TIME:-}" ] || return 0
    unset SELM_JOB_END_TIME # of a job that this one was submitted from
    local end
    end=$(SLURM_TIME_FORMAT=standard squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null) || end=
    end=$(date -d "${end:-unknown}" +%s 2>/dev/null) || return 0
    export SELM_JOB_END_TIME=$end
}

# --- steps and signals ---------------------------------------------------------------------------------------------

# Ranks save on USR1 and leave with 75. TERM goes on as USR1: on TERM mpirun itself kills its ranks after two seconds, done or not.
selm_on_signal() {
    selm_signalled=1
    selm_woken=1
    say "stop signal at $(date -u +%H:%M:%S): passed on, ranks save and end"
    if [ -n "$selm_pid" ]; then kill -USR1 "$selm_pid" 2>/dev/null || true; fi
}

# selm_step all|one PROGRAM ARGUMENTS...: on all tasks of the job, or on one. Sets selm_rc.
selm_step() {
    local tasks=$1 program launcher start
    program=$(selm_program "$2")
    shift 2
    if [ "$selm_signalled" = 1 ]; then
        selm_rc=75
        return
    fi
    if [ "$SELM_LAUNCHER" = srun ]; then
        launcher=(srun --mpi=pmix --kill-on-bad-exit=1 --wait=60)
        [ "$tasks" = all ] || launcher+=(--nodes=1 --ntasks=1)
        if [ "$tasks" = all ] && [ -n "$selm_step_nodes" ]; then
            launcher+=("--nodes=$selm_step_nodes" "--ntasks=$((selm_step_nodes * SLURM_NTASKS / SLURM_JOB_NUM_NODES))")
        fi
        launcher+=("${SELM_SRUN_OPTIONS[@]}")
    else
        launcher=(mpirun)
        [ "$tasks" = all ] || launcher+=(-np 1)
        if [ "$tasks" = all ] && [ -n "$selm_step_nodes" ]; then
            launcher+=(-np "$((selm_step_nodes * SLURM_NTASKS / SLURM_JOB_NUM_NODES))")
        fi
        launcher+=("${SELM_MPIRUN_OPTIONS[@]}")
    fi
    # A stop signal that comes while a program is being loaded waits until it can be heard (coreutils 8.31 or later).
    if env --block-signal=USR1 true 2>/dev/null; then launcher+=(env --block-signal=USR1); fi
    export SELM_DONE_FILE=$run/slurm/done-step-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    export SELM_START_FILE=$run/slurm/start-step-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    for start in 1 2 3; do
        say "$(date -u +%H:%M:%S) ${launcher[*]} $program $*"
        rm -f "$SELM_DONE_FILE" "$SELM_START_FILE"
        "${launcher[@]}" "$program" "$@" &
        selm_pid=$!
        while :; do # wait returns early when a trap runs
            selm_woken=0
            wait "$selm_pid" && selm_rc=0 || selm_rc=$?
            [ "$selm_woken" = 1 ] || break
        done
        selm_pid=
        say "$(date -u +%H:%M:%S) exit code $selm_rc"
        [ -e "$SELM_START_FILE" ] && selm_started=1 || selm_started=0
        # Ranks that crashed in MPI_Init, or a launcher that failed (docs/SITES.md); other codes are the program's. A lost node is 205.
        case $selm_rc in 0 | 64 | 65 | 70 | 74 | 75 | 78 | 205) break ;; esac
        if [ "$selm_started" = 1 ] || [ "$start" = 3 ]; then break; fi
        sleep 1 # a stop signal to the job comes to this script too
        if [ "$selm_signalled" = 1 ] || [ -e "$selm_next_attempt" ]; then break; fi
        say "ranks or launcher died before all ranks had started: started again"
    done
    rm -f "$SELM_START_FILE"
    # srun may say 0 when it could not start the program at all, for example while slurmd is being restarted.
    if [ "$selm_rc" = 0 ] && [ ! -e "$SELM_DONE_FILE" ]; then selm_rc=lost; fi
    rm -f "$SELM_DONE_FILE"
}

# --- the end -------------------------------------------------------------------------------------------------------

# Files and sizes of the run: journals, checkpoints and results grow with the work, so an equal list is no progress.
selm_fingerprint() {
    find "$run" \( -path "$run/slurm" -o -path "$run/attempts" -o -name '*.partial-*' \) -prune -o -type f -printf '%P %s\n' |
        sort | cksum | tr -d ' '
}

selm_restarts_file() { echo "$run/slurm/restarts-${SLURM_ARRAY_TASK_ID:-}$SLURM_JOB_NAME"; }

selm_remember_start() {
    if [ ! -e "$(selm_restarts_file)" ] ||
        { [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && [ ! -e "$run/slurm/resubmitted-$SLURM_JOB_ID" ]; }; then
        echo "0 $(selm_fingerprint)" >"$(selm_restarts_file)"
    fi
}

# True while this restart and those before it without progress are few enough.
selm_may_restart() {
    local count before now
    read -r count before <"$(selm_restarts_file)"
    now=$(selm_fingerprint)
    if [ "$now" = "$before" ]; then count=$((count + 1)); else count=0; fi
    echo "$count $now" >"$(selm_restarts_file)"
    [ "$count" -lt "${SELM_MAX_RESTARTS:-3}" ]
}

# Two copies of one job have one id: a requeue that the older one asks for would stop the newer one.
selm_leave_to_newer() {
    if [ -e "$selm_next_attempt" ]; then
        say "a newer attempt has taken over $run ($(cat "$selm_next_attempt")): this copy ends and asks for nothing"
        exit 75
    fi
}

# selm_nodes_answer: every node of the job runs a trivial step.
selm_nodes_answer() {
    timeout 60 srun --overlap --mpi=none "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        true >/dev/null 2>&1
}

selm_requeue() { # selm_requeue REASON
    local state
    if [ -e "$run/STOP" ]; then
        say "$1; not requeued, since $run/STOP exists. Remove it and submit again with --run $run to go on"
        exit 75
    fi
    # COMPLETING is a cancelled job, one that SLURM requeues itself, or one at its time limit. Only the last wants a requeue.
    # No state: the controller is being restarted, or this node is cut off.
    for _ in {1..20}; do
        state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\) Reason=\([A-Za-z_]*\).*/\1 \2/p') || true
        [ -z "$state" ] || break
        say "$1; SLURM does not answer, trying again"
        sleep 5
    done
    selm_leave_to_newer
    case $state in
        RUNNING* | TIMEOUT* | *TimeLimit) ;;
        *)
            say "$1; not requeued by this script, since the job is ${state% *}. Submit again with --run $run to go on"
            exit 75
            ;;
    esac
    if ! selm_may_restart; then
        say "$1; ${SELM_MAX_RESTARTS:-3} restarts brought no progress, so this job FAILS." \
            "Look at the messages above; a longer --time or an earlier --signal may help"
        exit 75
    fi
    trap '' TERM USR1
    if [ "${SELM_REQUEUE:-yes}" = yes ]; then
        say "$1; requeued (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
        if scontrol requeue "$SLURM_JOB_ID"; then exit 75; fi
        say "SLURM refuses to requeue"
    else
        say "$1"
    fi
    selm_resubmit || say "not submitted again. Submit with --run $run to go on"
    exit 75
}

# selm_job_value NAME: of scontrol show job; nothing for what is not set.
selm_job_value() {
    scontrol show job "$SLURM_JOB_ID" | sed -n -E "s/^ *(.* )?$1=//p" | sed -E '/ [A-Z][A-Za-z]*=/s/ .*//; /^\(null\)$/d' | head -n 1
}

# selm_resubmit: where a job may not be requeued, a new one of the same script, size and arguments takes its place, and jobs that wait for
# this one wait for that.
selm_resubmit() {
    local script=$run/slurm/script-$SLURM_JOB_ID output value id options words
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        say "elements of an array are not submitted again"
        return 1
    fi
    scontrol write batch_script "$SLURM_JOB_ID" "$script" >/dev/null || return 1
    options=("--job-name=$SLURM_JOB_NAME" "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_NTASKS"
        "--time=$(selm_job_value TimeLimit)" "--partition=$SLURM_JOB_PARTITION" "--dependency=afterany:$SLURM_JOB_ID")
    output=$(selm_job_value StdOut)
    [ -z "$output" ] || options+=("--output=${output//$SLURM_JOB_ID/%j}")
    for value in "ntasks-per-node=${SLURM_NTASKS_PER_NODE:-}" "cpus-per-task=${SLURM_CPUS_PER_TASK:-}" \
        "gpus-per-node=${SLURM_GPUS_PER_NODE:-}" "gpus-per-task=${SLURM_GPUS_PER_TASK:-}" "account=$(selm_job_value Account)" \
        "qos=$(selm_job_value QOS)" "constraint=$(selm_job_value Features)" "reservation=$(selm_job_value Reservation)"; do
        [ -z "${value#*=}" ] || options+=("--$value")
    done
    read -r -a words <<<"${SELM_SBATCH_OPTIONS:-}" # what SLURM does not tell, for example --signal
    words+=("$script" --config "$config" --run "$run")
    [ -z "$iteration" ] || words+=(--iteration "$iteration")
    id=$(
        # What describes this job must not describe the next one.
        for value in "${!SLURM_@}" SELM_ATTEMPT; do [ "$value" = SLURM_CONF ] || unset "$value"; done
        sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" "${words[@]}" -- "${extra[@]}"
    ) || return 1
    id=${id%%;*}
    echo "$SLURM_JOB_ID" >"$run/slurm/resubmitted-$id" # it is a restart, not a first start
    if [ -e "$run/slurm/jobs" ]; then sed -i "s/^$SLURM_JOB_ID /$id /" "$run/slurm/jobs"; fi
    say "job $id goes on in place of this one"
    selm_rewire "$SLURM_JOB_ID" "$id"
}

# selm_rewire OLD NEW: jobs that wait for OLD wait for NEW.
selm_rewire() {
    local id dependency
    while read -r id dependency; do
        dependency=$(sed -E "s/\([a-z]*\)//g; s/:$1(,|:|\?|$)/:$2\1/g" <<<"$dependency") # squeue adds "(unfulfilled)"
        if scontrol update "JobId=$id" "Dependency=$dependency"; then
            say "job $id waits for job $2 now"
        else
            say "job $id still waits for this job, which fails. Submit it again"
        fi
    done < <(squeue -h -t PENDING -o '%i %E' | awk -v old=":$1[^0-9]" -v new="$2" '$1 != new && $2 "," ~ old')
}

# selm_end: from the exit code of the last step to the end of the job.
selm_end() {
    [ "$selm_rc" != 0 ] || return 0
    selm_leave_to_newer
    case $selm_rc in
        75) selm_requeue "stopped, everything is saved" ;;
        64 | 65 | 78) die "$selm_rc" "exit code $selm_rc; the reason is above. Not run again: it would end the same way" ;;
        205) selm_requeue "mpirun lost a node" ;;
        lost) selm_requeue "the launcher reports success, but the program has not come to its end" ;;
        137 | 138 | 143)
            # One rank left with 75, and the launcher killed the others on their way out.
            if [ "$selm_signalled" = 1 ]; then selm_requeue "stopped, everything finished is saved"; fi
            # Out of memory, or the launcher of an older copy on a node that came back, which ends the step of the same number.
            selm_requeue "exit code $selm_rc: ranks were killed from outside"
            ;;
    esac
    # A launcher that gets the signal while it talks to SLURM fails as it likes.
    if [ "$selm_signalled" = 1 ] && [ "$selm_started" = 0 ]; then selm_requeue "stopped before the ranks had started"; fi
    if selm_nodes_answer; then
        die "$selm_rc" "exit code $selm_rc, and all nodes of the job answer; the reason is above. Not run again"
    fi
    selm_requeue "exit code $selm_rc, and a node of the job does not answer"
}

# --- jobs ----------------------------------------------------------------------------------------------------------

selm_begin() {
    set -euo pipefail
    trap selm_on_signal USR1 TERM
    selm_options "$@"
    selm_load_site
    selm_program selm_iter >/dev/null
    selm_choose_launcher
    selm_end_time
    selm_provenance
    selm_remember_start
    if [ -e "$run/STOP" ]; then
        say "nothing is started: $run/STOP exists. Remove it and submit again with --run $run"
        exit 75
    fi
}

selm_job_iter() {
    selm_begin "$@"
    selm_claim
    selm_step all selm_iter --config "$config" --run "$run" --progress off "${extra[@]}"
    selm_end
    say "done: $run"
}

# selm_job_phase gen|rank|logp|train ARGUMENTS...: one phase of one iteration, in the run directory of selm_iter.
selm_job_phase() {
    local phase=$1 train data policy offline=no iterations arguments
    shift
    selm_begin "$@"
    iteration=${iteration:-1}
    iterations=$(recipe_value "$config" iterations 3)
    if [ "$iteration" -lt 1 ] || [ "$iteration" -gt "$iterations" ]; then
        die 64 "--iteration $iteration is not in the recipe's 1 to $iterations"
    fi
    train=$(recipe_value "$config" train "")
    policy=$(recipe_value "$config" policy "")
    data=$run/prefs.h5
    case $train in *.h5 | *.hdf5) data=$train ;; esac
    [ "$iteration" = 1 ] || policy=$run/iter$((iteration - 1))/policy
    if [ "$iteration" = 1 ] && [ "$(recipe_value "$config" first-iteration selm)" = dpo ]; then offline=yes; fi
    mkdir -p "$run/iter$iteration" "$run/slurm/done"
    selm_claim
    if [ "$phase" = gen ] && [ "$data" != "$train" ]; then
        selm_step one selm_import --config "$config" --input "$train" --rows "$(recipe_value "$config" train-rows "")" --output "$data"
        selm_end
    fi
    arguments=(--config "$config" --stop-file "$run/STOP" --progress off)
    case $phase in
        gen)
            arguments+=(--data "$data" --iteration "$iteration" --portion "$iteration" --portions "$iterations"
                --policy "$policy" --output "$run/iter$iteration/iter.h5")
            [ "$offline" = no ] || arguments+=(--responses none)
            ;;
        rank)
            arguments+=(--iter "$run/iter$iteration/iter.h5")
            [ "$offline" = no ] || arguments+=(--update-rule offline --rank-mode per-row --ranker "")
            ;;
        logp) arguments+=(--iter "$run/iter$iteration/iter.h5" --model "$policy") ;;
        train)
            arguments+=(--iter "$run/iter$iteration/iter.h5" --policy "$policy" --output "$run/iter$iteration/policy")
            [ "$offline" = no ] || arguments+=(--alpha 0)
            ;;
    esac
    selm_step all "selm_$phase" "${arguments[@]}" "${extra[@]}"
    selm_end
    touch "$run/slurm/done/$iteration-$phase" # submit_chain.sh --resume reads it
    say "done: $phase of iteration $iteration in $run"
}

# The element i of the array runs the recipe on 2^i nodes of its allocation; with SELM_SCALING_ROWS on so many rows for each node.
selm_job_scaling() {
    local base start mode=strong script
    selm_begin "$@"
    selm_step_nodes=$((1 << ${SLURM_ARRAY_TASK_ID:-0}))
    if [ "$selm_step_nodes" -gt "$SLURM_JOB_NUM_NODES" ]; then
        say "nothing to do: $selm_step_nodes nodes are more than the job's $SLURM_JOB_NUM_NODES"
        return
    fi
    base=$run
    run=$base/nodes$selm_step_nodes
    if [ -n "${SELM_SCALING_ROWS:-}" ]; then
        mode=weak
        run=$run-weak
        extra+=(--train-rows "0:$((SELM_SCALING_ROWS * selm_step_nodes))")
        if [ -n "${SELM_SCALING_BATCH:-}" ]; then extra+=(--global-batch "$((SELM_SCALING_BATCH * selm_step_nodes))"); fi
    fi
    mkdir -p "$run/slurm"
    selm_remember_start
    selm_claim
    start=$(date +%s.%N)
    selm_step all selm_iter --config "$config" --run "$run" --progress off "${extra[@]}"
    selm_end
    printf '{"nodes": %d, "tasks": %d, "seconds": %s, "restarts": %d, "job": "%s", "mode": "%s", "run": "%s"}\n' "$selm_step_nodes" \
        $((selm_step_nodes * SLURM_NTASKS / SLURM_JOB_NUM_NODES)) "$(awk "BEGIN { printf \"%.3f\", $(date +%s.%N) - $start }")" \
        "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_ID" "$mode" "${run#"$base/"}" >>"$base/scaling.jsonl"
    say "done: $selm_step_nodes nodes, in $base/scaling.jsonl"
    script=$(dirname "$selm_slurm")/benchmarks/scaling/run
    if [ -x "$script" ] && command -v python3 >/dev/null; then
        # The table of all elements that have ended; the last one's is the whole. A table that fails is no failed job.
        python3 "$script" --runs "$base" --out "$base" --model "$(recipe_value "$config" policy "")" \
            --dtype "$(recipe_value "$config" dtype bf16)" --bin "$(dirname "$(selm_program selm_iter)")" --ranks-per-node $((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) ||
            say "no table (see above); by hand: $script --runs $base --model POLICY"
    else
        say "no table (no python3 here); elsewhere: benchmarks/scaling/run --runs $base --model POLICY"
    fi
}
