# shellcheck shell=bash disable=SC2034
# Alps (CSCS), GH200 nodes: 4 x (72 Arm cores + one GPU). UNTESTED: written from the site's documentation. SELM was never built on Arm.
# The site prefers programs in a uenv or container; Open MPI there needs PMIx (srun --mpi=pmix).

# Files on $SCRATCH (Lustre).
SELM_SRUN_OPTIONS=()
# With GPUs (--ntasks-per-node=4 --cpus-per-task=72): --gpus-per-task=1. Without it all ranks of a node see the same first GPU.
# For NCCL: export NCCL_NET="AWS Libfabric", so that a missing plugin is an error and not a slow fallback to TCP.
