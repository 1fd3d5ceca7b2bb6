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
expect 0 '^# Scaling' python3 "$scaling/run" --model policy --reward reward --rows 6 --batch 2 --new-tokens 8 --dtype fp32 --repetitions 1 \
    --ranks 1,2,3 --bin "$SELM_BIN_DIR" --launcher "${SELM_MPIEXEC:-mpirun} --oversubscribe --bind-to none -np {ranks}" --out out
expect_count 1 'Data of all strong-scaling runs are equal'
expect_count 3 '^\| generate \| strong '
expect_count 3 '^\| train \| strong '
expect 0 '"same_data": true' cat out/scaling.json
expect 0 '</svg>' cat out/scaling.svg
expect 1 'does not exist' python3 "$scaling/run" --bin nowhere
finish
