# shellcheck shell=bash
# Any SLURM: no modules, no bindings. A profile may load modules, export variables, and set
#   SELM_LAUNCHER=srun|mpirun, SELM_SRUN_OPTIONS=(...), SELM_MPIRUN_OPTIONS=(...)
