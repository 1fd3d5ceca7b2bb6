#!/usr/bin/env bash
# Submits a run as a chain of jobs, each phase with a size of its own.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: slurm/submit_chain.sh --config FILE --run DIR [OPTIONS] [-- OPTIONS OF SBATCH]

Per iteration gen -> rank -> logp -> train, then iter, which answers the held-out prompts, scores them and prints what every iteration
brought. A job starts when the one before it has succeeded; when one fails, those behind it are cancelled.

  --config FILE      recipe; a copy in DIR/slurm is what the jobs read
  --run DIR          run directory, on the parallel file system
  --site NAME        directory of slurm/sites (default: SELM_SITE, else generic)
  --phases FILE      options of sbatch by phase (default: phases.cfg of the site)
  --from PHASE       begin with gen, rank, logp, train or iter ...
  --iteration T      ... of iteration T (default 1)
  --resume           submit only what DIR still lacks; --config may be left out
  --dry-run          print the sbatch lines and submit nothing

Options after -- go to every sbatch, for example --account=ABC. A job that is stopped or loses a node requeues itself, and the jobs behind
it keep waiting. DIR/STOP stops the chain after what runs now; remove it and use --resume to go on.
TEXT
}

die() { # die CODE MESSAGE
    echo "submit_chain: error: $2" >&2
    exit "$1"
}

config=
run=
site=${SELM_SITE:-generic}
phases=
from=
first=1
resume=no
dry_run=no
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --config) config=${2:?"--config needs a file"}; shift 2 ;;
        --run) run=${2:?"--run needs a directory"}; shift 2 ;;
        --site) site=${2:?"--site needs a name"}; shift 2 ;;
        --phases) phases=${2:?"--phases needs a file"}; shift 2 ;;
        --from) from=${2:?"--from needs a phase"}; shift 2 ;;
        --iteration) first=${2:?"--iteration needs a number"}; shift 2 ;;
        --resume) resume=yes; shift ;;
        --dry-run) dry_run=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; options=("$@"); break ;;
        *) die 64 "unknown option $1 (see --help)" ;;
    esac
done
selm_slurm=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
jobs=$(dirname "$selm_slurm")/jobs
phases=${phases:-$selm_slurm/sites/$site/phases.cfg}
# shellcheck source=slurm/lib/recipe.sh
source "$selm_slurm/lib/recipe.sh"

[ -n "$run" ] || die 64 "--run is missing (results need a directory)"
stored=$run/slurm/recipe.cfg
if [ -z "$config" ] && [ "$resume" = yes ]; then config=$stored; fi
[ -n "$config" ] || die 64 "--config is missing (nothing says what to train)"
[ -r "$config" ] || die 78 "the recipe $config cannot be read"
[ -r "$phases" ] || die 78 "$phases cannot be read. Set --site to one of: $(ls "$selm_slurm/sites")"
if [ -e "$stored" ] && ! cmp -s "$config" "$stored"; then
    die 78 "$run was begun with another recipe (mixing two would spoil its results). Compare $stored, or use a new --run"
fi
iterations=$(recipe_value "$config" iterations 3)
case $from in
    "" | gen | rank | logp | train | iter) ;;
    *) die 64 "--from $from is no phase. Use gen, rank, logp, train or iter" ;;
esac
case $first in
    "" | *[!0-9]*) die 64 "--iteration $first is not a number" ;;
esac
if [ "$first" -lt 1 ] || [ "$first" -gt "$iterations" ]; then
    die 64 "--iteration $first is not in the recipe's 1 to $iterations"
fi
if [ -e "$run/slurm/jobs" ] && [ "$dry_run" = no ]; then
    if [ "$resume" = no ] && [ -z "$from" ]; then
        die 64 "$run has a chain already. Pass --resume to go on with it, or use a new --run"
    fi
    waiting=$(while read -r id _; do squeue -h -j "$id" -o %i 2>/dev/null || true; done <"$run/slurm/jobs")
    # Two jobs of one phase would write the same files.
    [ -z "$waiting" ] || die 64 "jobs of this chain are still in the queue. To replace them: scancel ${waiting//$'\n'/ }"
fi
if [ "$resume" = yes ] && [ -e "$run/STOP" ]; then
    die 78 "$run/STOP exists, so the jobs would not start. Remove it first"
fi

# phase_options PHASE: lines "all" and PHASE of phases.cfg; later options win in sbatch.
phase_options() {
    awk -v phase="$1" '{ sub(/(^|[ \t])#.*/, "") } $1 == "all" || $1 == phase { $1 = ""; print }' "$phases"
}

ids=()
previous=
submit() { # submit PHASE ITERATION
    local phase=$1 t=$2 command id words
    read -r -d '' -a words < <(phase_options "$phase") || true
    command=(sbatch --parsable "--job-name=selm-$phase-$t" --kill-on-invalid-dep=yes)
    [ -z "$previous" ] || command+=("--dependency=afterok:$previous")
    command+=("${words[@]}" "${options[@]}" "$jobs/selm_$phase.slurm" --config "$stored" --run "$run")
    [ "$phase" = iter ] || command+=(--iteration "$t")
    if [ "$dry_run" = yes ]; then
        echo "${command[*]}"
        previous="<$phase-$t>"
        return
    fi
    # For a job that has to submit itself again (slurm/lib/job.sh): SLURM does not tell a job all of its options.
    id=$(SELM_SBATCH_OPTIONS="${words[*]} ${options[*]}" "${command[@]}") ||
        die 74 "sbatch refused $phase of iteration $t; submitted so far: ${ids[*]:-none}. scancel them, correct, and --resume"
    id=${id%%;*} # a federation appends the cluster's name
    echo "$id  $phase of iteration $t"
    echo "$id $phase $t" >>"$run/slurm/jobs"
    ids+=("$id")
    previous=$id
}

if [ "$dry_run" = no ]; then
    mkdir -p "$run/slurm"
    [ -e "$stored" ] || cp "$config" "$stored"
    : >"$run/slurm/jobs"
fi
export SELM_SITE=$site SELM_ROOT=${SELM_ROOT:-$(dirname "$selm_slurm")}
if [ "${SELM_ROOT%/share/selm}" != "$SELM_ROOT" ]; then SELM_ROOT=${SELM_ROOT%/share/selm}; fi
reached=no
[ -n "$from" ] || reached=yes
for ((t = first; t <= iterations; t++)); do
    for phase in gen rank logp train; do
        if [ "$phase" = "$from" ]; then reached=yes; fi
        if [ "$reached" = no ] || [ "$from" = iter ]; then continue; fi
        if [ "$resume" = yes ] && [ -e "$run/slurm/done/$t-$phase" ]; then continue; fi
        submit "$phase" "$t"
    done
done
submit iter "$iterations"
if [ "$dry_run" = no ]; then
    echo "state: squeue --states=all --jobs=$(IFS=,; echo "${ids[*]}") --format='%.10i %.16j %.10T %.10M %R'"
fi
