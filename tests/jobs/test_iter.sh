#!/usr/bin/env bash
# sbatch jobs/selm_iter.slurm on two nodes, by srun and by mpirun: the results of one selm_iter on one rank.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 2 880 "${BASH_SOURCE[0]}"
make_recipe 16 9

selm_iter --config recipe.cfg --run reference --progress off >reference.log 2>&1

# No environment beyond PATH and SELM_ROOT: the recipe is found in the directory of submission, the run directory made there.
job=$(submit --nodes=2 --ntasks-per-node=1 "$SELM_SOURCE_DIR/jobs/selm_iter.slurm")
ends_as COMPLETED "$job"
expect 0 'launcher srun --mpi=pmix' cat "selm-iter-$job.out"
expect_count 1 "done: runs/$job"
expect 0 'nodes node\[1-2\], tasks 2' cat "runs/$job/slurm/provenance.txt"
expect 0 "JobId=$job" cat "runs/$job/slurm/provenance.txt"
# Up to the first training: equal on any number of ranks. Weights, and what they generate, are so within rounding.
same reference "runs/$job" "one rank, and two nodes by srun" iter0/test.h5 iter1/iter.h5
close_policies reference "runs/$job"

by_srun=runs/$job
job=$(SELM_LAUNCHER=mpirun submit --nodes=2 --ntasks-per-node=1 "$SELM_SOURCE_DIR/jobs/selm_iter.slurm" --run by_mpirun)
ends_as COMPLETED "$job"
expect 0 'launcher mpirun' cat "selm-iter-$job.out"
same "$by_srun" by_mpirun "two nodes by srun and by mpirun"

# Elements of the scaling job: one node, two nodes, and four, which the job has not.
job=$(submit --nodes=2 --ntasks-per-node=1 --array=0-2 "$SELM_SOURCE_DIR/jobs/selm_scaling.slurm" --run scaling -- --iterations 1)
for element in 0 1 2; do
    ends_as COMPLETED "${job}_$element"
done
expect 0 'more than the job' cat "selm-scaling-${job}_2.out"
expect 0 '"nodes": 1, "tasks": 1, "seconds": [0-9.]+,' cat scaling/scaling.jsonl
expect_count 1 '"nodes": 2, "tasks": 2, '
expect_count 2 nodes
expect 0 '^. generate . strong . 2 . 2 ' cat scaling/scaling.md
same scaling/nodes1 scaling/nodes2 "one and two nodes" iter1/iter.h5

# A recipe that cannot run fails at once, says why, and is not run again.
job=$(submit "$SELM_SOURCE_DIR/jobs/selm_iter.slurm" --run bad -- --policy nowhere)
ends_as FAILED "$job"
expect 0 'Not run again' cat "selm-iter-$job.out"
expect_count 1 'nowhere.*exit code'
# A run with a stop file is not started.
mkdir stopped
touch stopped/STOP
job=$(submit "$SELM_SOURCE_DIR/jobs/selm_iter.slurm" --run stopped)
ends_as FAILED "$job"
expect 0 'stopped/STOP exists' cat "selm-iter-$job.out"
finish
