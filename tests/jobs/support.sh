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
    mkdir "$SELM_CLUSTER/work"
    cd "$SELM_CLUSTER/work" || exit 1
    export PATH=$SELM_BIN_DIR:$PATH SELM_ROOT=$SELM_SOURCE_DIR OMP_NUM_THREADS=1
    # Nothing of the machine that runs the tests shall matter.
    unset SELM_SITE SELM_LAUNCHER SELM_RUN SELM_CONFIG OMPI_MCA_rmaps_base_oversubscribe
    # shellcheck disable=SC2154
    trap 'status=$?; if [ $status != 0 ]; then tail -n 60 "$SELM_CLUSTER"/work/*.out; fi' EXIT
}

# make_recipe MAX_NEW_TOKENS ROWS
make_recipe() {
    "$SELM_TOOL_DIR/selm_tiny_model_tool" policy seed=1
    "$SELM_TOOL_DIR/selm_tiny_model_tool" reward seed=2 classifier
    cat >recipe.cfg <<CFG
[run]
policy = policy
train = $SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl
train-rows = 0:$2
test = $SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl
test-rows = 96:99
iterations = 2   # a comment
max-length = 192
max-prompt-length = 96
dtype = fp32
[import]
on-empty-answer = keep
[gen]
max-new-tokens = $1
on-long-prompt = skip
[rank]
ranker = reward:reward
[train]
learning-rate = 1e-3,5e-4
global-batch = 2
save-dtype = fp32
CFG
}

# submit ARGUMENTS OF SBATCH...: prints the job's id.
submit() { sbatch --parsable "$@"; }

job_state() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }

# wait_until SECONDS WHAT COMMAND...
wait_until() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
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

# ends_as STATE SECONDS ID
ends_as() {
    checks=$((checks + 1))
    wait_until "$2" "end of job $3" job_ended "$3" || return 0
    [ "$(job_state "$3")" = "$1" ] || fail "job $3 is $(job_state "$3") instead of $1"
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
