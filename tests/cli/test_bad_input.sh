#!/usr/bin/env bash
# Bad input to every program, on two ranks: one message from one rank, the right exit code, no partial file, nobody left waiting
# (timeout is the watchdog: it would end in 124).
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
bin=$SELM_BIN_DIR
sample=$SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# two EXIT PATTERN PROGRAM ARGUMENTS: on two ranks; the message comes once.
two() {
    local code=$1 pattern=$2 program=$3
    shift 3
    expect "$code" "$pattern" mpi 2 timeout -k 5 60 "$bin/$program" "$@"
    if [ "$code" -ne 0 ]; then
        expect_count 1 "$program: error:"
    fi
}
absent() {
    local path
    for path in "$@"; do
        checks=$((checks + 1))
        [ ! -e "$path" ] || fail "$path exists"
    done
    checks=$((checks + 1))
    [ -z "$(find . -name '*.partial*')" ] || fail "partial files are left: $(find . -name '*.partial*')"
}

# --- what the programs need
tiny=$SELM_TOOL_DIR/selm_tiny_model_tool
"$tiny" policy seed=1
"$tiny" reward seed=2 classifier
"$tiny" small_vocabulary seed=1 vocabulary=200
"$tiny" damaged damaged
"$tiny" other seed=3
small=(--max-length 192 --max-prompt-length 96 --dtype fp32 --progress off)
two 0 'imported 6 rows' selm_import --input "$sample" --rows 0:6 --output prefs.h5
# Without a launcher, where the import needs no MPI: the same data, the same errors.
digest=$(sed -n 's/^digest //p' <<<"$output")
expect 0 "^digest $digest\$" timeout 60 "$bin/selm_import" --input "$sample" --rows 0:6 --output alone.h5
expect 65 'nowhere' timeout 60 "$bin/selm_import" --input nowhere.jsonl --output new.h5
rm -f alone.h5
two 0 'complete' selm_gen --data prefs.h5 --policy policy --output iter.h5 --max-new-tokens 8 --on-long-prompt skip "${small[@]}"
cp iter.h5 unranked.h5
two 0 'complete' selm_rank --iter iter.h5 --ranker reward:reward "${small[@]}"
cp iter.h5 unscored.h5
two 0 'complete' selm_logp --iter iter.h5 --model policy "${small[@]}"

# --- the command line
for program in selm_import selm_gen selm_rank selm_logp selm_train selm_iter selm_inspect; do
    expect 64 'usage|Usage' timeout 60 "$bin/$program"
    expect 0 '[Uu]sage' timeout 60 "$bin/$program" --help
    expect 0 'selm 0' timeout 60 "$bin/$program" --version
    two 64 'no-such-option' $program --no-such-option 1
done

# --- paths that lead nowhere, and files that are something else
two 65 'nowhere' selm_import --input nowhere.jsonl --output new.h5
two 65 'nowhere' selm_gen --data nowhere.h5 --policy policy --output new.h5
two 78 'nowhere' selm_gen --data prefs.h5 --policy nowhere --output new.h5 "${small[@]}"
two 65 'nowhere' selm_rank --iter nowhere.h5 --ranker reward:reward
two 78 'nowhere' selm_rank --iter unranked.h5 --ranker reward:nowhere "${small[@]}"
two 65 'nowhere' selm_rank --iter unranked.h5 --ranker file:nowhere.jsonl
two 65 'nowhere' selm_logp --iter nowhere.h5 --model policy
two 78 'nowhere' selm_logp --iter unscored.h5 --model nowhere "${small[@]}"
two 65 'nowhere' selm_train --iter nowhere.h5 --policy policy --output new
two 78 'nowhere' selm_train --iter iter.h5 --policy nowhere --output new "${small[@]}"
two 65 'nowhere' selm_inspect nowhere.h5
two 78 'nowhere' selm_iter --config nowhere.cfg --run new
absent new.h5 new

echo "this is text" > text.h5
head -c 3000 iter.h5 > cut.h5
for file in text.h5 cut.h5 prefs.h5; do
    two 65 "$file" selm_rank --iter $file --ranker reward:reward "${small[@]}"
    two 65 "$file" selm_logp --iter $file --model policy "${small[@]}"
    two 65 "$file" selm_train --iter $file --policy policy --output new "${small[@]}"
done
for file in text.h5 cut.h5 iter.h5; do
    two 65 "$file" selm_gen --data $file --policy policy --output new.h5 "${small[@]}"
done
two 65 'text.h5' selm_inspect text.h5
two 65 'cut.h5' selm_inspect cut.h5 --verify
absent new.h5 new

if [ -n "${SELM_REFERENCE_PYTHON:-}" ]; then
    "$SELM_REFERENCE_PYTHON" - <<'PY'
import shutil
import h5py
shutil.copy("iter.h5", "version.h5")
with h5py.File("version.h5", "r+") as file:
    file.attrs["format_version"] = 99
shutil.copy("iter.h5", "offsets.h5")
with h5py.File("offsets.h5", "r+") as file:
    file["responses/chosen/text_offsets"][2] = 10**9
PY
    two 65 '99' selm_inspect version.h5
    two 65 'version' selm_rank --iter version.h5 --ranker reward:reward "${small[@]}"
    two 65 'chosen' selm_inspect offsets.h5 --verify
else
    echo "not checked: files that h5py has changed (the build knows no SELM_REFERENCE_PYTHON)"
fi

# --- values that do not fit
two 64 'portion' selm_gen --data prefs.h5 --policy policy --output new.h5 --portion 4 --portions 3 "${small[@]}"
two 64 'portion' selm_gen --data prefs.h5 --policy policy --output new.h5 --portion 0 "${small[@]}"
two 78 '275|200' selm_gen --data prefs.h5 --policy small_vocabulary --output new.h5 "${small[@]}"
two 64 'zero' selm_train --iter iter.h5 --policy policy --output new --zero 4 "${small[@]}"
two 78 'eos-token' selm_gen --data prefs.h5 --policy policy --output new.h5 --encoding recipe --eos-token nothing
two 78 'cuda' selm_gen --data prefs.h5 --policy policy --output new.h5 --device cuda "${small[@]}"
two 64 'engine' selm_gen --data prefs.h5 --policy policy --output new.h5 --engine fast
two 64 'ranker' selm_rank --iter unranked.h5 --ranker judge:policy
two 78 'reward model' selm_rank --iter unranked.h5 --ranker reward:policy "${small[@]}"
printf '[gen]\nslotz = 3\n' > typo.cfg
two 78 'slotz' selm_gen --config typo.cfg --data prefs.h5 --policy policy --output new.h5
absent new.h5 new

# --- phases out of order, or made otherwise
two 65 'selm_rank|pairs' selm_logp --iter unranked.h5 --model policy "${small[@]}"
two 65 'selm_logp|log-prob' selm_train --iter unscored.h5 --policy policy --output new "${small[@]}"
two 65 'max.length' selm_train --iter iter.h5 --policy policy --output new --max-length 160 --max-prompt-length 96 --dtype fp32
two 65 'dtype' selm_train --iter iter.h5 --policy policy --output new --max-length 192 --max-prompt-length 96 --dtype bf16
two 65 'digest|model' selm_train --iter iter.h5 --policy other --output new "${small[@]}"
cp iter.h5 reranked.h5
for row in 0 1 2 3 4 5; do echo "{\"row\": $row, \"scores\": [0, $row, 3]}"; done > scores.jsonl
two 0 'complete' selm_rank --iter reranked.h5 --ranker file:scores.jsonl
two 65 'pairs' selm_train --iter reranked.h5 --policy policy --output new "${small[@]}"
absent new

# --- numbers that are not finite
cp unscored.h5 nan.h5
two 65 'finite' selm_logp --iter nan.h5 --model damaged "${small[@]}"

# --- a full disk: a tiny file system (only root may mount one)
full() { # full KIBIBYTES PROGRAM ARGUMENTS (which name files in disk/)
    local size=$1 program=$2
    shift 2
    mount -o "remount,size=${size}k" "$work/disk"
    two 74 "$program: error:" "$program" "$@"
}
mkdir disk
if mount -t tmpfs -o size=1024k tmpfs "$work/disk" 2>/dev/null; then
    trap 'umount "$work/disk"; rm -rf "$work"' EXIT
    full 16 selm_import --input "$sample" --rows 0:96 --output disk/full.h5
    full 16 selm_gen --data prefs.h5 --policy policy --output disk/full.h5 --max-new-tokens 8 --on-long-prompt skip "${small[@]}"
    full 16 selm_train --iter iter.h5 --policy policy --output disk/full "${small[@]}"
    absent disk/full.h5 disk/full/model.safetensors
    rm -rf disk/*
    mount -o remount,size=1024k "$work/disk"
    cp unranked.h5 disk/kept.h5
    full "$(($(stat -c %s unranked.h5) / 1024 + 16))" selm_rank --iter disk/kept.h5 --ranker reward:reward "${small[@]}"
    checks=$((checks + 1))
    cmp -s unranked.h5 disk/kept.h5 || fail "a failed ranking changed the file"
else
    echo "left out: no tmpfs can be mounted here, so no disk can be full"
fi

finish
