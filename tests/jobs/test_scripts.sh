#!/usr/bin/env bash
# The batch scripts without a cluster: shellcheck, --help, wrong use, how they find the installation, the sbatch lines of a chain.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/../cli/expect.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
source_dir=$SELM_SOURCE_DIR
chain=$source_dir/slurm/submit_chain.sh
unset SELM_ROOT SELM_SITE SELM_CONFIG SELM_RUN SLURM_SUBMIT_DIR SLURM_JOB_ID
cd "$source_dir"

if command -v shellcheck >/dev/null; then
    expect 0 '' shellcheck -x jobs/*.slurm slurm/*.sh slurm/lib/*.sh slurm/sites/*/profile.sh tests/jobs/*.sh
else
    echo "shellcheck is not installed (scripts/deps --slurm): the scripts are not checked by it"
fi
for name in gen rank logp train iter scaling; do
    expect 0 "usage: sbatch .*jobs/selm_$name.slurm" bash "jobs/selm_$name.slurm" --help
    expect 64 'this is a batch script' bash "jobs/selm_$name.slurm"
    expect 64 'unknown option --nonsense' bash "jobs/selm_$name.slurm" --nonsense
    expect 0 '#SBATCH --signal=B:USR1@' cat "jobs/selm_$name.slurm"
    expect 0 '#SBATCH --open-mode=append' cat "jobs/selm_$name.slurm"
    expect 0 '#SBATCH --output=%x-%[jA]' cat "jobs/selm_$name.slurm"
done

# A spooled copy finds the installation by SELM_ROOT, the directory of submission, or PATH; a wrong SELM_ROOT is an error.
cp jobs/selm_iter.slurm "$work/slurm_script"
cd "$work"
expect 78 'installation is not found' env PATH=/usr/bin:/bin bash slurm_script
expect 64 'this is a batch script' env PATH=/usr/bin:/bin SELM_ROOT="$source_dir" bash slurm_script
expect 64 'this is a batch script' env PATH=/usr/bin:/bin SLURM_SUBMIT_DIR="$source_dir/data" bash slurm_script
mkdir -p prefix/bin prefix/share/selm
cp -r "$source_dir/slurm" "$source_dir/jobs" prefix/share/selm/
ln -s /bin/true prefix/bin/selm_iter
expect 78 'installation is not found' env PATH="$work/prefix/bin:/usr/bin:/bin" SELM_ROOT="$work" bash slurm_script
rm prefix/bin/selm_iter
printf '#!/bin/sh\n' >prefix/bin/selm_iter
chmod +x prefix/bin/selm_iter
expect 64 'this is a batch script' env PATH="$work/prefix/bin:/usr/bin:/bin" bash slurm_script

# The chain's sbatch lines.
cat >recipe.cfg <<'CFG'
[train]
iterations = 7
[run]
iterations = 2  # not 7
CFG
expect 0 'usage: slurm/submit_chain.sh' "$chain" --help
expect 0 'selm_gen.slurm .*--iteration 2' "$chain" --config recipe.cfg --run RUN --dry-run -- --account=abc
expect_count 9 '^sbatch .*--kill-on-invalid-dep=yes .*--account=abc'
expect_count 8 'dependency=afterok'
expect_count 1 'name=selm-rank-1 .*dependency=afterok:<gen-1> .*time=01:00:00 .*jobs/selm_rank.slurm --config RUN/slurm/recipe.cfg --run RUN --iteration 1$'
expect_count 1 'name=selm-gen-2 .*dependency=afterok:<train-1> '
checks=$((checks + 1))
[ ! -e RUN ] || fail "a dry run wrote something"
expect 0 'name=selm-logp-2' "$chain" --config recipe.cfg --run RUN --from logp --iteration 2 --dry-run
expect_count 3 sbatch
expect 0 'name=selm-iter' "$chain" --config recipe.cfg --run RUN --from iter --dry-run
expect_count 1 sbatch
for site in "$source_dir"/slurm/sites/*/; do
    site=$(basename "$site")
    expect 0 'selm_train.slurm' "$chain" --config recipe.cfg --run RUN --site "$site" --dry-run
    expect_count 9 'nodes='
    expect 0 '' bash -uec "SELM_SRUN_OPTIONS=(); module() { :; }; ml() { :; }; source $source_dir/slurm/sites/$site/profile.sh"
done
expect 64 'unknown option --nonsense' "$chain" --nonsense
expect 64 'run is missing' "$chain" --config recipe.cfg
expect 64 'config is missing' "$chain" --run RUN
expect 78 'cannot be read' "$chain" --run RUN --config nowhere.cfg --dry-run
expect 78 'Set --site to one of' "$chain" --run RUN --config recipe.cfg --site nowhere --dry-run
expect 64 'is no phase' "$chain" --run RUN --config recipe.cfg --from nowhere --dry-run
expect 64 'not in the recipe' "$chain" --run RUN --config recipe.cfg --iteration 3 --dry-run
mkdir -p RUN/slurm/done
cp recipe.cfg RUN/slurm/
touch RUN/slurm/done/1-gen RUN/slurm/done/1-rank RUN/slurm/done/1-logp RUN/slurm/done/1-train RUN/slurm/done/2-gen
expect 0 'name=selm-rank-2' "$chain" --run RUN --resume --dry-run
expect_count 4 sbatch
echo 'seed = 1' >>recipe.cfg
expect 78 'begun with another recipe' "$chain" --config recipe.cfg --run RUN --resume --dry-run
touch RUN/STOP
expect 78 'STOP exists' "$chain" --run RUN --resume --dry-run
finish
