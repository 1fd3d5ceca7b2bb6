# shellcheck shell=bash
# Sourced by the tests on a real SLURM: restarts the test inside a cluster, makes a tiny model and a recipe of two iterations on
# real rows, and compares run directories.

# in_cluster NODES SECONDS "$0": everything after this call runs beside a cluster, for SECONDS at most.
in_cluster() {
    if [ -z "${SELM_CLUSTER:-}" ]; then
        exec timeout --kill-after=5 "$2" bash "$(dirname "${BASH_SOURCE[0]}")/with_cluster.sh" "$1" bash "$3"
    fi
    # shellcheck source=tests/cli/expect.sh
    source "$SELM_SOURCE_DIR/tests/cli/expect.sh"
    # shellcheck source=tests/jobs/cluster.sh
    source "$SELM_SOURCE_DIR/tests/jobs/cluster.sh"
    mkdir "$SELM_CLUSTER/runs"
    cd "$SELM_CLUSTER/runs" || exit 1
    export PATH=$SELM_BIN_DIR:$PATH SELM_ROOT=$SELM_SOURCE_DIR OMP_NUM_THREADS=1
    # Nothing of the machine that runs the tests shall matter.
    unset SELM_SITE SELM_LAUNCHER SELM_RUN SELM_CONFIG OMPI_MCA_rmaps_base_oversubscribe
    # shellcheck disable=SC2154
    trap 'status=$?; if [ $status != 0 ]; then tail -n 60 "$SELM_CLUSTER"/runs/*.out; keep_logs; fi' EXIT
}

# The cluster's files vanish with it: SELM_KEEP_LOGS names a directory for the runs and the daemons' logs of a test that fails.
# shellcheck disable=SC2317 # called by the trap
keep_logs() {
    [ -n "${SELM_KEEP_LOGS:-}" ] || return 0
    mkdir -p "$SELM_KEEP_LOGS"
    cp -r "$SELM_CLUSTER/log" "$SELM_CLUSTER/runs" "$SELM_KEEP_LOGS"
}

# make_recipe MAX_NEW_TOKENS ROWS
make_recipe() { make_tiny_run "$2" "$1"; }

# make_long_recipe ROWS [LAYERS]: every phase takes seconds on one fast core, so that something can happen meanwhile; training has eight steps.
make_long_recipe() {
    make_recipe 64 "$1"
    sed -i "s/^global-batch = .*/global-batch = $(($1 / 16))/" recipe.cfg
    "$SELM_TOOL_DIR/selm_tiny_model_tool" policy seed=1 "layers=${2:-32}"
    "$SELM_TOOL_DIR/selm_tiny_model_tool" reward seed=2 "layers=${2:-32}" classifier
    cat >>recipe.cfg <<'CFG'
checkpoint-every = 1
CFG
    sed -i 's/^\[gen\]$/[gen]\nslots = 1/' recipe.cfg
}

# The reference: one selm_iter of two ranks that nothing disturbs. Resumed training has the same bits on as many ranks.
make_reference() {
    if ! mpi 2 selm_iter --config recipe.cfg --run reference --progress off >reference.log 2>&1; then
        cat reference.log
        fail "the undisturbed run"
        return 1
    fi
}

# shellcheck disable=SC2034 # the tests use it
phases=(generate rank logprob train)

# at_work RUN PHASE ITERATION: the phase has saved something, and is not done.
# shellcheck disable=SC2317 # called by wait_until
at_work() {
    local saved output=$1/iter$3
    case $2 in
        generate) saved="$output/iter.h5.journal/*" ;;
        rank) saved="$output/iter.h5.rank-*.journal/*" ;;
        logprob) saved="$output/iter.h5.logprobs-*.journal/*" ;;
        train) saved="$output/policy/checkpoints/*.json" ;;
    esac
    compgen -G "$saved" >/dev/null && [ ! -e "$output/policy/training.json" ] || return 1
    # a journal of generation begins with 0.6 KiB that are no rows
    [ "$2" != generate ] || find "$output/iter.h5.journal" -size +2k 2>/dev/null | grep -q .
}

# journalled RUN ITERATION: rows in the journal of generation.
journalled() {
    python3 - "$1/iter$2/iter.h5.journal" <<'PY'
import glob, struct, sys

rows = set()
for name in glob.glob(sys.argv[1] + "/*.log"):
    data = open(name, "rb").read()
    if len(data) < 16:
        continue
    at = 8 + 8 + struct.unpack_from("<q", data, 8)[0] + 8  # magic, size, binding, checksum
    while at + 24 <= len(data):
        _, row, size = struct.unpack_from("<Qqq", data, at)
        at += 24 + size + 8
        if at <= len(data):
            rows.add(row)
print(len(rows))
PY
}
resumed_rows() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["iter" + sys.argv[2]]["generate"]["resumed_rows"])' "$1/manifest.json" "$2"; }
# none_twice RUN LOG SAVED [ITERATION]: of SAVED rows that were journalled when the generation of iteration 1, or of that one, was
# disturbed, none was made again.
none_twice() {
    local iteration=${4:-1}
    checks=$((checks + 1))
    # Where all were journalled, the disturbed attempt may have come to the end of generation.
    if [ "$(grep -c "iteration $iteration of 2: generate" "$2")" -gt 1 ] && [ "$(resumed_rows "$1" "$iteration")" -lt "$3" ]; then
        fail "of $3 journalled rows of $1, iteration $iteration, $(resumed_rows "$1" "$iteration") were used"
    fi
}

# unspoilt RUN: the data and weights of the reference, each step of training once, nothing unfinished left, every file whole.
unspoilt() {
    local run=$1 t file
    same reference "$run" "an undisturbed run"
    for t in 1 2; do
        checks=$((checks + 2))
        cmp "reference/iter$t/policy/model.safetensors" "$run/iter$t/policy/model.safetensors" || fail "weights of $run, iteration $t"
        [ "$(sed -n 's/^{"step":\([0-9]*\),.*/\1/p' "$run/iter$t/policy/metrics.jsonl")" = \
            "$(sed -n 's/^{"step":\([0-9]*\),.*/\1/p' "reference/iter$t/policy/metrics.jsonl")" ] || fail "steps of $run, iteration $t"
        for file in iter.h5 test.h5; do
            selm_inspect --verify "$run/iter$t/$file" >verify.log 2>&1 || fail "$run/iter$t/$file: $(cat verify.log)"
        done
    done
    file=$(find "$run" -name '*.journal' -o -name '*.partial*')
    [ -z "$file" ] || fail "unfinished files are left: $file"
}

# programs_of RUN SIGNAL: to the programs of a run on all nodes, whose processes this shell sees too.
programs_of() { pkill "-$2" -f "^[^ ]*/selm_[a-z]+ .*[ /]$1( |/|$)" || true; }

# catch RUN PHASE ITERATION: waits until the phase has saved something, and stops the programs there, so that nothing depends on how
# fast this machine is: the fault comes while the phase is at work.
catch() {
    local end=$((SECONDS + patience))
    checks=$((checks + 1))
    until at_work "$@"; do
        if ((SECONDS > end)); then
            fail "$2 of $1 did not begin"
            squeue --states=all
            return 1
        fi
        sleep 0.01
    done
    programs_of "$1" STOP
    at_work "$@" || fail "$2 of $1 was over before the fault: nothing was tested"
}
release() { programs_of "$1" CONT; } # release RUN

# usr1 JOB LOG: the programs, which stand still, go on when the script has the signal.
usr1() {
    local before run
    run=$(sed -n 's/^selm: run directory \([^,]*\),.*/\1/p' "$2" | head -n 1)
    before=$(grep -c 'stop signal' "$2" || true)
    scancel --batch --signal=USR1 "$1"
    wait_until "USR1 in job $1" log_count "$2" $((before + 1)) 'stop signal'
    release "$run"
}

# crash_controller JOB: kill -9 of slurmctld when it has written that the job runs. Before that it would come back with a job that
# waits, and start it a second time: that is SLURM's own, and not what is tested.
crash_controller() {
    touch "$SELM_CLUSTER/marker"
    scontrol update "jobid=$1" comment=save
    wait_until "the controller's state to be saved" test "$SELM_CLUSTER/state/job_state" -nt "$SELM_CLUSTER/marker"
    kill_controller
}

nodes_of() { scontrol show hostnames "$(squeue -h -j "$1" -o %N)" | sed 's/^node//'; }
log_of() { echo "selm-iter-$1.out"; }
attempts_of() { find "$1/attempts" -type f | wc -l; }
# shellcheck disable=SC2317
has_attempts() { [ -d "$1/attempts" ] && [ "$(attempts_of "$1")" -ge "$2" ]; }
# Programs of a node, for example to freeze them: a node that is cut off may be as slow as it likes.
to_programs() { on_node "$1" pkill "-$2" '^selm_' || true; } # to_programs K SIGNAL
# shellcheck disable=SC2317
no_programs() { ! on_node "$1" pgrep '^selm_|^slurm_s' >/dev/null; } # slurm_script; slurmstepd has no underscore
all_nodes_back() { wait_until "all nodes to be back" none_lost; }

# submit ARGUMENTS OF SBATCH...: prints the job's id.
submit() { sbatch --parsable "$@"; }

job_state() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }

# Seconds that a wait may take: many times what it takes alone, for other work may have most of the machine.
patience=600

# wait_until WHAT COMMAND...
wait_until() {
    local end=$((SECONDS + patience)) what=$1
    shift
    until "$@"; do
        if ((SECONDS > end)); then
            fail "not after the time given: $what"
            squeue --states=all
            return 1
        fi
        sleep 0.1
    done
}

# shellcheck disable=SC2317 # called by wait_until
job_ended() { case $(job_state "$1") in PENDING | RUNNING | COMPLETING | CONFIGURING | SUSPENDED | REQUEUED | "") return 1 ;; esac; }
# shellcheck disable=SC2317
log_has() { grep -q -- "$2" "$1" 2>/dev/null; }
# shellcheck disable=SC2317
log_count() { [ "$(grep -c -- "$3" "$1" 2>/dev/null || true)" -ge "$2" ]; } # log_count LOG N PATTERN

# ends_as STATE ID
ends_as() {
    checks=$((checks + 1))
    wait_until "end of job $2" job_ended "$2"
    [ "$(job_state "$2")" = "$1" ] || fail "job $2 is $(job_state "$2") instead of $1"
}

# digests RUN [NAME...]: of the iterations' files, or of those named. Those of the reference do not change.
digests() {
    local run=$1 file
    shift
    [ $# -gt 0 ] || set -- iter1/iter.h5 iter2/iter.h5 iter2/test.h5
    for file; do
        if [ "$run" != reference ] || [ ! -e "$run/$file.digest" ]; then
            selm_inspect --digest "$run/$file" >"$run/$file.digest" & # a start of MPI is mostly waiting
        fi
    done
    wait
    for file; do
        echo "$file $(cat "$run/$file.digest")"
    done
}

# same A B DESCRIPTION [NAME...]
same() {
    local a=$1 b=$2 what=$3
    shift 3
    checks=$((checks + 1))
    digests "$a" "$@" >a.digests
    digests "$b" "$@" >b.digests
    # An empty digest is one that could not be read.
    if ! cmp -s a.digests b.digests || grep -Eq ' $' a.digests; then
        fail "$a and $b differ ($what)"
        diff a.digests b.digests || true
    fi
}

# close_policies A B: weights of the last policy, equal within the rounding of sums over ranks.
close_policies() {
    checks=$((checks + 1))
    python3 - "$1/iter2/policy/model.safetensors" "$2/iter2/policy/model.safetensors" <<'PY' || fail "policies of $1 and $2 differ"
import array, json, struct, sys

def tensors(path):
    blob = open(path, "rb").read()
    size = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8:8 + size])
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items()):
        assert entry["dtype"] == "F32", entry
        begin, end = entry["data_offsets"]
        yield name, array.array("f", blob[8 + size + begin:8 + size + end])

worst = 0.0
for (name, a), (other, b) in zip(tensors(sys.argv[1]), tensors(sys.argv[2]), strict=True):
    assert name == other and len(a) == len(b), (name, other)
    worst = max(worst, max(abs(x - y) for x, y in zip(a, b)))
print(f"largest difference of a weight: {worst:.2g}")
# The peak learning rate is 1e-3 and Adam's steps are as large: 1e-5 is a hundredth of one step.
sys.exit(worst > 1e-5)
PY
}
