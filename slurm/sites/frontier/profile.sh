# shellcheck shell=bash disable=SC2034
# Frontier (OLCF): 64 cores, of which 8 are kept for the system, and 8 GPU dies; 512 GB. UNTESTED: written from the site's documentation.
# The site's MPI is Cray MPICH; SELM is tested with Open MPI. Load one that was built with PMIx and libfabric here:
# module use /path/to/modules; module load openmpi
# The site asks for srun; where this srun knows no pmix, the scripts say so and take mpirun.

# Compute nodes see Orion ($MEMBERWORK, Lustre), not the home directories.
SELM_SRUN_OPTIONS=(--cpu-bind=cores)
# With GPUs (--ntasks-per-node=8 --cpus-per-task=7): --gpus-per-task=1 --gpu-bind=closest.
