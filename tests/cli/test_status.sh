#!/usr/bin/env bash
# selm_iter --status beside a run: while it generates, after kill -9 in the middle of generation and of training,
# at the end; without MPI and without SLURM.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
bin=$SELM_BIN_DIR
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
rows=96
make_tiny_run $rows 48 24 # of that depth, and row by row: a phase takes a hundred times as long as it takes to stop it
sed -i -e '/^test/d' -e 's/^iterations.*/iterations = 1/' -e 's/^ranker.*/update-rule = offline/' \
    -e 's/^learning-rate.*/checkpoint-every = 10/' -e 's/^global-batch.*/global-batch = 1/' -e 's/^max-new-tokens.*/&\nslots = 1/' recipe.cfg

# start_and_freeze CONDITION...: begins or continues the run and stops its ranks once CONDITION holds.
start_and_freeze() {
    mpi 2 timeout 120 "$bin/selm_iter" --config recipe.cfg --run run --progress off >run.log 2>&1 &
    launcher=$!
    freeze "$launcher" selm_iter "$@"
}
kill_ranks() {
    # shellcheck disable=SC2086
    kill -9 $frozen || true
    wait "$launcher" || true
}
fingerprint() { find run -type f -exec cksum {} + | sort; }

expect 65 'does not exist' "$bin/selm_iter" --run run --status

# --- generation: the ranks are alive, then dead
start_and_freeze holds run/iter1/iter.h5.journal 2000
before=$(fingerprint)
expect 0 'run: 0 of 1 iterations' "$bin/selm_iter" --run run --status
expect_count 1 "generate +under way +[1-9][0-9]*/$rows rows"
expect_count 1 'train +pending'
checks=$((checks + 1))
[ "$before" = "$(fingerprint)" ] || fail "--status wrote something"
kill_ranks
expect 0 "generate +under way +[1-9][0-9]*/$rows rows" "$bin/selm_iter" --run run --status
expect 0 '"state": "under way"' "$bin/selm_iter" --run run --status --format json

# --- training
start_and_freeze has_lines run/iter1/policy/metrics.jsonl 2
kill_ranks
expect 0 "train +under way +[0-9]+/$rows steps" "$bin/selm_iter" --run run --status
expect_count 1 "generate +done +$rows rows"
expect_count 1 "logprob +done +$rows rows"

# --- the end
expect 0 'iteration 1' mpi 2 "$bin/selm_iter" --config recipe.cfg --run run --progress off
expect 0 'run: 1 of 1 iterations' "$bin/selm_iter" --run run --status
expect_count 1 "train +done +$rows steps"

# A login node: MPI would not start there, the first line shows.
without_mpi() { OMPI_MCA_pml=none_such "$@"; }
checks=$((checks + 1))
if without_mpi "$bin/selm_inspect" --digest run/prefs.h5 >mpi.log 2>&1; then fail "MPI starts with a wrong setting: the next check says nothing"; fi
expect 0 '1 of 1 iterations trained' without_mpi "$bin/selm_iter" --run run --status
# On several ranks one speaks.
expect 0 '1 of 1 iterations' mpi 2 "$bin/selm_iter" --run run --status
expect_count 1 'iterations trained'

# Jobs that the run directory names; SLURM answers, does not, is not there.
mkdir bin run/slurm
echo '41 train 1' >run/slurm/jobs
printf '#!/bin/sh\necho "41|RUNNING|1:00|2:00|(None)"\n' >bin/squeue
chmod +x bin/squeue
expect 0 'job 41 +train of iteration 1 +RUNNING, 1:00 so far, 2:00 until its limit' env PATH="$work/bin:$PATH" "$bin/selm_iter" --run run --status
printf '#!/bin/sh\necho no controller >&2\nexit 1\n' >bin/squeue
expect 0 '^SLURM: squeue says: no controller' env PATH="$work/bin:$PATH" "$bin/selm_iter" --run run --status
expect 0 '^SLURM: squeue is not installed here' env PATH="$work" "$bin/selm_iter" --run run --status
finish
