# shellcheck shell=bash disable=SC2034
# LUMI-G (CSC): 64 cores, of which 56 are usable, and 8 GPU dies; 512 GB. UNTESTED: written from the site's documentation.
# The site's MPI is Cray MPICH; SELM is tested with Open MPI. Load one that was built with PMIx and libfabric here:
# module load LUMI partition/G; module load OpenMPI

# This site requeues jobs of a lost node itself, under the same id, and the log goes on because it is opened for appending.
# Files on /scratch or /flash (Lustre).
SELM_SRUN_OPTIONS=()
# With GPUs (--ntasks-per-node=8 --gpus-per-node=8), each task on the cores next to its die:
# SELM_SRUN_OPTIONS=(--cpu-bind=mask_cpu:7e000000000000,7e00000000000000,7e0000,7e000000,7e,7e00,7e00000000,7e0000000000)
