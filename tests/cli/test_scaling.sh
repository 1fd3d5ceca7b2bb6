#!/usr/bin/env bash
# benchmarks/scaling: the model finds the coefficients of made-up points; a real study of a tiny model on one to three ranks.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
scaling=$SELM_SOURCE_DIR/benchmarks/scaling
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONDONTWRITEBYTECODE=1

cat >fit.py <<'PYTHON'
import sys
sys.path.insert(0, sys.argv[1])
from model import Network, PhaseModel

def close(found, wanted):
    assert abs(found - wanted) <= 1e-6 * abs(wanted), (found, wanted)

# 2 s of fixed time, 3 ms a token, rows of 100 tokens.
rows = [{"phase": "generate", "rows": r, "ranks": n, "nodes": 1, "tokens": 100 * r, "seconds": 2 + 0.003 * 100 * -(-r // n), "comm_s": None}
        for r, n in ((64, 1), (64, 2), (128, 2), (64, 3))]
model = PhaseModel(rows, 0, Network(5, 10))
close(model.fixed_s, 2)
close(model.token_s, 0.003)
close(model.seconds(64, 2, 1, 3200), 2 + 0.003 * 1600) # a point whose rows are half as long
close(model.seconds(1000, 7, 1), 2 + 0.3 * 143)   # the busiest of seven ranks has 143 rows
close(model.efficiency(640, 64, 1), (2 + 192) / (64 * 5))
# A step of 1 GB of gradients and weights at 4 GB/s in a node, 10 GB/s and 5 us between nodes.
steps = [{"phase": "train", "batch": b, "rows": 0, "ranks": n, "nodes": 1, "tokens": 50 * b, "comm_s": 0.25 * (n - 1) / n,
          "seconds": 0.5 + 0.001 * 50 * -(-b // n) + 0.25 * (n - 1) / n} for b, n in ((8, 1), (8, 2), (16, 2), (32, 4))]
model = PhaseModel(steps, 1e9, Network(5, 10))
close(model.fixed_s, 0.5)
close(model.node_byte_s, 0.25e-9)
close(model.parts(64, 8, 2)[2], 0.25 * 3 / 4 + 2 * 5e-6 + 2 * 0.5 * 0.5e9 / 10e9)
# Noise that falls with work must not become a negative time per token.
odd = [dict(rows[0], seconds=3.0), dict(rows[1], seconds=4.0)]
assert PhaseModel(odd, 0, Network(5, 10)).token_s == 0
print("fitted")
PYTHON
expect 0 '^fitted' python3 fit.py "$scaling"

"$SELM_TOOL_DIR/selm_tiny_model_tool" policy seed=1
"$SELM_TOOL_DIR/selm_tiny_model_tool" reward seed=2 classifier
launcher="${SELM_MPIEXEC:-mpirun} --oversubscribe --bind-to none -np {ranks}"
study=(python3 "$scaling/run" --model policy --reward reward --rows 6 --batch 2 --new-tokens 8 --repetitions 1 --ranks "1,2,3"
    --bin "$SELM_BIN_DIR" --launcher "$launcher" --samples runs.jsonl --out out)
# In pieces of one run: nothing fits into a microsecond after the first. What is there is not made again, and not taken for other settings.
runs=0
until [ -e out/scaling.md ] || [ "$runs" = 6 ]; do
    runs=$((runs + 1))
    code=0
    "${study[@]}" --dtype fp32 --seconds 1e-6 >study.log 2>&1 || code=$?
    checks=$((checks + 1))
    [ "$(wc -l <runs.jsonl)" = "$runs" ] || fail "$(wc -l <runs.jsonl) runs noted after $runs calls: $(cat study.log)"
    if [ ! -e out/scaling.md ] && [ "$code" != 75 ]; then fail "exit code $code: $(cat study.log)"; fi
done
expect 0 '^# Scaling' "${study[@]}" --dtype fp32
expect_count 1 'Data of all strong-scaling runs are equal .*differ by [0-9.e-]* at most'
expect_count 3 '^\| generate \| strong '
expect_count 3 '^\| train \| strong '
expect_count 0 '^scaling: repetition' # nothing was run
expect 0 '"equal": true' cat out/scaling.json
expect 0 '</svg>' cat out/scaling.svg
expect 1 'holds runs of other settings .dtype.' "${study[@]}" --dtype bf16
# Above the cores and --train-ranks: the data alone.
many=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)) + 1)')
expect 0 "Data of all strong-scaling runs are equal .digests; ranks 1, $many.;" python3 "$scaling/run" --model policy --reward reward --rows 6 \
    --batch 2 --new-tokens 8 --repetitions 1 --ranks "1,$many" --train-ranks 1 --dtype fp32 --bin "$SELM_BIN_DIR" --launcher "$launcher" --out many
expect_count 0 "^. train . strong . $many "
# A run with other data is found out.
python3 - <<'PYTHON'
import json
lines = [json.loads(line) for line in open("runs.jsonl")]
lines[-1]["digest"] = "other"
open("runs.jsonl", "w").writelines(json.dumps(line) + "\n" for line in lines)
PYTHON
expect 1 'data of strong scaling differ' "${study[@]}" --dtype fp32
python3 - <<'PYTHON'
import json
lines = [json.loads(line) for line in open("runs.jsonl")]
lines[-1]["digest"] = lines[0]["digest"]
lines[-1]["losses"][-1][1] *= 1.01
open("runs.jsonl", "w").writelines(json.dumps(line) + "\n" for line in lines)
PYTHON
expect 1 'gradient norms of strong scaling differ by 0.01' "${study[@]}" --dtype fp32
expect 2 'needs --samples' python3 "$scaling/run" --seconds 5
expect 1 'does not exist' python3 "$scaling/run" --bin nowhere
finish
