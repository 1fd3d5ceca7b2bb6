#!/usr/bin/env bash
# Training that is stopped in every way and goes on: all ranks save on the same step, exit code 75, and in the end the weights
# of a run that was never stopped, to the bit. Then kill -9 in the middle of writing checkpoints.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
bin=$SELM_BIN_DIR
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

small=(--max-length 96 --max-prompt-length 48 --dtype fp32 --progress off)
"$SELM_TOOL_DIR/selm_tiny_model_tool" policy seed=1
"$SELM_TOOL_DIR/selm_tiny_model_tool" reward seed=2 classifier
{
    "$bin/selm_import" --input "$SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl" --rows 0:7 --on-empty-answer keep --output prefs.h5 &&
    "$bin/selm_gen" --data prefs.h5 --policy policy --output iter.h5 --max-new-tokens 8 --on-long-prompt skip "${small[@]}" &&
    "$bin/selm_rank" --iter iter.h5 --ranker reward:reward "${small[@]}" &&
    "$bin/selm_logp" --iter iter.h5 --model policy "${small[@]}"
} >prepare.log 2>&1 || { cat prepare.log; exit 1; }

train() { # train OUTPUT ARGUMENTS...: on 3 ranks
    local output=$1
    shift
    mpi 3 "$bin/selm_train" --iter iter.h5 --policy policy --output "$output" --learning-rate 1e-3 --global-batch 2 --epochs 300 \
        --save-dtype fp32 --stop-file STOP "${small[@]}" "$@"
}
steps() { wc -l 2>/dev/null <"$1/metrics.jsonl" || echo 0; }
newest() { find "$1/checkpoints" -name '*.json' -printf '%f\n' | sort | tail -1 | tr -dc 0-9; }

train whole >whole.log 2>&1 || { cat whole.log; exit 1; }

# rank_pid N: the process of rank N of the running launcher.
rank_pid() {
    local pid
    for pid in $(ranks_of "$launcher" selm_train); do
        if tr '\0' '\n' <"/proc/$pid/environ" | grep -qx "OMPI_COMM_WORLD_RANK=$1"; then echo "$pid"; fi
    done
}

to_one_rank() { kill -TERM "$(rank_pid 2)"; }
# shellcheck disable=SC2086
to_all_ranks() { kill -USR1 $frozen; }
usr1_to_launcher() { kill -USR1 "$launcher"; } # mpirun passes it on
stop_file() { touch STOP; }

# stopped_by HOW: stops the run "stopped" a few steps on from where it stands.
stopped_by() {
    local before status=0 saved
    before=$(steps stopped)
    # The launcher itself in the background, not a shell around it.
    OMPI_MCA_odls_base_sigkill_timeout=$patience exec_train stopped >"$1.log" 2>&1 &
    launcher=$!
    freeze "$launcher" selm_train has_lines stopped/metrics.jsonl $((before + 3)) # a signal takes its way while they stand
    "$1"
    sleep 0.3
    # shellcheck disable=SC2086
    kill -CONT $frozen
    wait "$launcher" || status=$?
    rm -f STOP
    checks=$((checks + 3))
    if [ "$status" -ne 75 ]; then
        fail "exit code $status instead of 75 after $1"
        cat "$1.log"
    fi
    grep -q 'stopped after step' "$1.log" || { fail "$1 did not stop the training"; cat "$1.log"; }
    saved=$(newest stopped)
    if [ "${saved:-0}" -le "$before" ] || [ "${saved:-0}" -ne "$(steps stopped)" ]; then
        fail "after $1 the newest checkpoint is ${saved:-none}, metrics have $(steps stopped) steps"
    fi
}
exec_train() { # replaces the subshell in which it runs
    local output=$1
    shift
    exec "${SELM_MPIEXEC:-mpirun}" --oversubscribe --bind-to none -np 3 "$bin/selm_train" --iter iter.h5 --policy policy --output "$output" \
        --learning-rate 1e-3 --global-batch 2 --epochs 300 --save-dtype fp32 --stop-file STOP "${small[@]}" "$@"
}

patience=1 # seconds that mpirun gives its ranks to end (it also waits so long whenever the exit code is not 0)
for how in to_one_rank to_all_ranks usr1_to_launcher stop_file; do
    stopped_by "$how"
done

# SIGTERM to mpirun itself. Open MPI 4.1 waits for as long as odls_base_sigkill_timeout says (1 s if nothing does), sends its ranks
# SIGTERM, waits as long again and kills them; it ends with 1 whatever the ranks say. Ranks that are quick enough have saved.
asked() { # asked ARGUMENTS...: training that is not over before the signal is passed on
    exec "${SELM_MPIEXEC:-mpirun}" --oversubscribe --bind-to none -np 3 "$bin/selm_train" --iter iter.h5 --policy policy --output asked \
        --learning-rate 1e-3 --global-batch 2 --epochs 1000000 --save-dtype fp32 --stop-file STOP "${small[@]}"
}
OMPI_MCA_odls_base_sigkill_timeout=8 asked >asked.log 2>&1 &
launcher=$!
comes_to "$launcher" has_lines asked/metrics.jsonl 3 || fail "the training had ended before mpirun was signalled"
kill -TERM "$launcher"
status=0
wait "$launcher" || status=$?
checks=$((checks + 3))
[ "$status" -ne 0 ] || fail "mpirun reports success after SIGTERM"
grep -q 'stopped after step' asked.log || { fail "SIGTERM to mpirun did not stop the training"; cat asked.log; }
saved=$(newest asked)
if [ "${saved:-0}" -lt 3 ] || [ "$saved" -ne "$(steps asked)" ]; then
    fail "after SIGTERM to mpirun the newest checkpoint is ${saved:-none}, metrics have $(steps asked) steps"
fi
touch STOP
expect 75 "going on from the checkpoint of step $((10#${saved:-0}))" bash -c "$(declare -f asked); $(declare -p small bin); asked"
rm STOP

# The end of the job comes near: less is left than the margin (and than the next step and a checkpoint take).
before=$(steps stopped)
expect 75 'the job ends in .* stopping now, since --walltime-margin is 3600 s' \
    env SELM_JOB_END_TIME="$(($(date +%s) + 3590))" bash -c "$(declare -f train mpi); $(declare -p small bin); train stopped --walltime-margin 3600"
expect_count 1 'stopped after step'
checks=$((checks + 1))
[ "$(steps stopped)" -eq $((before + 1)) ] || fail "the run was not stopped after one step"
expect 64 'walltime-margin 60 needs to know when the job ends' train stopped --walltime-margin 60
expect 64 "SELM_JOB_END_TIME is 'tomorrow'" env SELM_JOB_END_TIME=tomorrow "$bin/selm_gen" --data prefs.h5 --policy policy --output again.h5 \
    --on-long-prompt skip --walltime-margin 60 "${small[@]}"
expect 75 'the job ends in' env SLURM_JOB_END_TIME="$(($(date +%s) + 30))" "$bin/selm_gen" --data prefs.h5 --policy policy --output again.h5 \
    --on-long-prompt skip --walltime-margin 60 "${small[@]}"

# A signal while the ranks start: they hear it when they can (env lets it wait until the program is loaded).
expect 75 'stopped after step' mpi 3 env --block-signal=USR1 bash -c \
    'kill -USR1 $$; exec "$@"' _ "$bin/selm_train" --iter iter.h5 --policy policy --output stopped --learning-rate 1e-3 --global-batch 2 \
    --epochs 300 --save-dtype fp32 "${small[@]}"

same() { # same OUTPUT: as the run that was never stopped
    checks=$((checks + 1))
    cmp -s whole/model.safetensors "$1/model.safetensors" || fail "the weights of $1 differ from those of the uninterrupted run"
}
expect 0 'complete|done|trained' env SELM_JOB_END_TIME="$(($(date +%s) + 100000))" \
    bash -c "$(declare -f train mpi); $(declare -p small bin); train stopped --walltime-margin 3600"
same stopped

# --- kill -9 of a rank while a checkpoint is being written
newer_than() { [ "$(newest killed)" != "$1" ]; } # newer_than STEP: this start has made a checkpoint too
# half_written: stops the ranks again and again, some milliseconds apart, until they stand in the middle of a checkpoint.
half_written() {
    local try
    for ((try = 0; try < 2000; ++try)); do
        frozen=$(ranks_of "$launcher" selm_train)
        # shellcheck disable=SC2086
        kill -STOP $frozen 2>/dev/null || return 1 # the training is over
        sleep 0.004 # until they stand
        if exists 'killed/checkpoints/*.partial-*'; then return 0; fi
        # shellcheck disable=SC2086
        kill -CONT $frozen
        sleep "0.00$((RANDOM % 8 + 1))"
    done
    return 1
}
torn=0
for victim in 0 1 2 0; do
    exec_train killed --checkpoint-every 5 >killed.log 2>&1 &
    launcher=$!
    before=$(newest killed 2>/dev/null || true)
    comes_to "$launcher" newer_than "$before" || fail "the training had ended before rank $victim was killed"
    half_written || fail "the training had ended before it stood in a checkpoint"
    kill -9 "$(rank_pid "$victim")" || fail "there was no rank $victim to kill"
    # shellcheck disable=SC2086
    kill -CONT $frozen 2>/dev/null || true
    wait "$launcher" || true
    if exists 'killed/checkpoints/*.partial-*'; then torn=$((torn + 1)); fi
done
echo "$torn of 4 kills left a checkpoint half written"
checks=$((checks + 1))
[ "$torn" -gt 0 ] || fail "no kill hit a checkpoint: nothing was tested"
# The newest whole one is damaged too: the one before it is used, and it is said.
newest_step=$(newest killed)
printf 'x' | dd of="killed/checkpoints/step-$newest_step.h5" bs=1 seek=40 conv=notrunc status=none
expect 0 "checkpoint of step $((10#$newest_step)) cannot be used \(killed/checkpoints/step-$newest_step.h5 is damaged" train killed --checkpoint-every 5
expect_count 1 'going on from the checkpoint of step'
checks=$((checks + 1))
[ -z "$(find killed -name '*.partial*')" ] || fail "left behind: $(find killed -name '*.partial*')"
same killed

# Another engine that goes on from a checkpoint is named.
if grep -qw avx2 /proc/cpuinfo; then
    expect 75 'stopped after step 2' train engines --max-steps 2 --engine xsmm
    expect 75 'computed with xsmm, those to come with aten' train engines --max-steps 1 --engine aten
    expect 75 'stopped after step 4' train engines --max-steps 1 --engine aten
    expect_count 0 'those to come'
fi
finish
