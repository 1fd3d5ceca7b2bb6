# shellcheck shell=bash disable=SC2034
# Perlmutter (NERSC), CPU nodes: 2 x 64 cores, 512 GB. UNTESTED: written from the site's documentation.
# Submit with --account=PROJECT. Jobs that submit jobs are not allowed in the debug queue; submit_chain.sh runs on a login node.
module load openmpi

# Files on $SCRATCH (Lustre). HDF5 waits for locks that other file systems of this site do not grant.
export HDF5_USE_FILE_LOCKING=FALSE

SELM_SRUN_OPTIONS=(--cpu-bind=cores)
# With GPUs (--constraint=gpu --gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=32): --gpu-bind=none, the program takes its own.
