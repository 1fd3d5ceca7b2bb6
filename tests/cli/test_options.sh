#!/usr/bin/env bash
# Options of all programs: no arguments, help, version, unknown options and keys, files, printed configurations, exit codes.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
bin=$SELM_BIN_DIR
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Starting a program costs up to half a second, so each text is checked where it can differ between programs.
common=(--seed 7 --threads 2 --device cpu --dtype fp32 --engine aten --progress off)
for program in selm_import selm_gen selm_rank selm_logp selm_train selm_inspect selm_iter; do
    expect 64 "usage: $program" "$bin/$program"
    expect 0 "usage: $program" "$bin/$program" --help
    expect_count 1 '^ +--print-config'
    expect_count 1 '^ +--progress TEXT'
    expect 64 '--progress loud is not known' "$bin/$program" --progress loud
    expect_count 1 "^$program: error:"
    "$bin/$program" "${common[@]}" --print-config >"$program.cfg"
    for line in 'seed = 7' 'threads = 2' 'device = cpu' 'dtype = fp32' 'engine = aten' 'progress = off'; do
        checks=$((checks + 1))
        grep -qx "$line" "$program.cfg" || fail "$program does not take '$line'"
    done
    expect 0 '^\[' "$bin/$program" --config "$program.cfg" --print-config
    diff "$program.cfg" <(echo "$output") || fail "$program: the printed configuration does not read back to itself"
done
expect 0 '^selm [0-9.]+ \(git ' "$bin/selm_gen" --version
expect 64 'unknown option --prnt-config. Did you mean --print-config\?' "$bin/selm_gen" --prnt-config
expect 64 'unknown option --print-conf' "$bin/selm_gen" --print-conf
expect 78 'absent.cfg.*No such file' "$bin/selm_gen" --config absent.cfg

# A program checks the names of all sections, not of its own alone.
printf '[gen]\n\ntemprature = 1\n' >bad.cfg
expect 78 "bad.cfg:3: unknown key 'temprature' in \[gen\]. Did you mean 'temperature'\?" "$bin/selm_rank" --config bad.cfg
printf '[gne]\nslots = 1\n' >bad.cfg
expect 78 'bad.cfg:2: unknown section \[gne\]. Did you mean \[gen\]\?' "$bin/selm_gen" --config bad.cfg

# The recipes in the tree.
for recipe in "$SELM_SOURCE_DIR"/configs/*.cfg; do
    for program in selm_gen selm_iter; do
        expect 0 '^\[' "$bin/$program" --config "$recipe" --print-config
    done
done

# Command line over file over default.
printf '[run]\nseed = 5\n[gen]\nslots = 3\n' >good.cfg
expect 0 '^seed = 6$' "$bin/selm_gen" --config good.cfg --seed 6 --print-config
expect_count 1 '^slots = 3$'
expect_count 1 '^temperature = 0$'
expect 64 "slots: 'many' is not a whole number" "$bin/selm_gen" --slots many --print-config
printf '[gen]\nslots = many\n' >bad.cfg
expect 78 "bad.cfg:2: slots = 'many' is not a whole number" "$bin/selm_gen" --config bad.cfg --print-config
printf '[run]\ndtype = fp16\n' >bad.cfg
expect 78 'bad.cfg:2: .*fp16' "$bin/selm_gen" --config bad.cfg --data p.h5 --policy d --output i.h5
expect 64 'fp16' "$bin/selm_gen" --dtype fp16 --data p.h5 --policy d --output i.h5

# A name that several sections have needs the section; [run] goes first.
expect 64 'tokens-per-microbatch is ambiguous.*--train.tokens-per-microbatch' "$bin/selm_iter" --tokens-per-microbatch 5
expect 0 '^tokens-per-microbatch = 5$' "$bin/selm_iter" --train.tokens-per-microbatch 5 --print-config

# Under mpirun every text appears once.
expect 0 '^seed = 7$' mpi 3 "$bin/selm_gen" --seed 7 --print-config
expect_count 1 '^seed = 7$'
expect 64 'unknown option --sed' mpi 3 "$bin/selm_gen" --sed 7
expect_count 1 'unknown option'
expect 0 'usage: selm_gen' mpi 3 "$bin/selm_gen" --help
expect_count 1 'usage: selm_gen'
expect 78 'absent.cfg' mpi 3 "$bin/selm_gen" --config absent.cfg
expect_count 1 'absent.cfg'

finish
