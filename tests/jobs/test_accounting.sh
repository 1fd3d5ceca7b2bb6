#!/usr/bin/env bash
# selm_iter --status on jobs that only SLURM's accounting remembers.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
export SELM_CLUSTER_ACCOUNTING=yes
in_cluster 2 880 "${BASH_SOURCE[0]}"
make_recipe 8 5
job_script=$SELM_SOURCE_DIR/jobs/selm_iter.slurm

bad=$(submit "$job_script" --run bad -- --policy nowhere)
ends_as FAILED "$bad"
good=$(submit --nodes=2 --ntasks-per-node=1 "$job_script" --run accounted)
ends_as COMPLETED "$good"
# shellcheck disable=SC2317 # called by wait_until
forgotten() { [ -z "$(job_state "$1")" ]; }
wait_until "the controller to forget job $bad" forgotten "$bad"
wait_until "the controller to forget job $good" forgotten "$good"

expect 0 "^job $bad .* FAILED, [0-9]+:[0-9:]+" selm_iter --run bad --status
expect 0 "^job $good .* COMPLETED, [0-9]+:[0-9:]+" selm_iter --run accounted --status
expect_count 0 'not in the queue any more'
expect 0 '"state": *"COMPLETED"' selm_iter --run accounted --status --format json
finish
