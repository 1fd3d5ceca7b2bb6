#!/usr/bin/env bash
# benchmarks/run without peers: options, counted FLOPs, least times, measuring in turns, tables and the summary of recorded results.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
benchmarks=$SELM_SOURCE_DIR/benchmarks
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONDONTWRITEBYTECODE=1

expect 2 'invalid choice: .everything.' python3 "$benchmarks/run" everything
expect 2 'begin at 1' python3 "$benchmarks/run" rank --ranks 0
expect 0 'summary' python3 "$benchmarks/run" --help
expect 1 'benchmarks/setup' python3 "$benchmarks/run" write --build "$(dirname "$SELM_BIN_DIR")" --python nowhere
expect 64 'unknown option' "$benchmarks/setup" --fast

cat >check.py <<'PYTHON'
import itertools
import json
import os
import sys

sys.path.insert(0, sys.argv[1])
from selm_bench import harness, report, roofline

def close(found, wanted, within=1e-9):
    assert abs(found - wanted) <= within * abs(wanted), (found, wanted)

# A decoder of one layer: hidden 8, two heads of 4, one of keys and values, ffn 16, vocabulary 32.
decoder = roofline.Decoder({"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32})
layer = 8 * (2 + 1 + 1) * 4 + 8 * 8 + 3 * 8 * 16          # q, k and v; output; gate, up and down
close(decoder.linear, layer)
close(decoder.forward(5, 15, 2), 2 * layer * 5 + 2 * 32 * 8 * 2 + 4 * 2 * 4 * 15)
close(decoder.forward_backward(5, 15, 2), 3 * (2 * layer * 5 + 2 * 32 * 8 * 2) + 3.5 * 4 * 2 * 4 * 15)
# Visible pairs of a packed row, counted one by one: prompt of 3, answers of 4 and 2 (the last token of each is not read).
def counted(prompt, answers):
    pairs = sum(q + 1 for q in range(prompt))
    for answer in answers:
        pairs += sum(prompt + q + 1 for q in range(answer - 1))
    return prompt + sum(a - 1 for a in answers), pairs, sum(answers)
assert roofline.branches(3, [4, 2]) == counted(3, [4, 2])
# SmolLM2-135M's matrices, the tied embedding once: 134.5 of its 134.515 million parameters (the rest are norms).
smollm2 = roofline.Decoder({"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152})
close(smollm2.linear + smollm2.head, 134515008 - 61 * 576)
# Bound by memory: every step reads the weights of each rank, and the keys and values so far; the first token is the prompt's.
peak = {"flops": 1e30, "bytes": 1e6}
bytes_read = sum(2 * (decoder.linear + decoder.head) * 4 + (3 + t) * decoder.kv_bytes(4) for t in (1, 2))
close(decoder.decode_seconds([3], [3], 2, 4, peak), bytes_read / 1e6)
# Bound by arithmetic: what one forward pass over everything costs, however it is cut.
peak = {"flops": 1e6, "bytes": 1e30}
close(decoder.decode_seconds([3], [3], 1, 4, peak) * 1e6, decoder.forward(3, 6, 1) + decoder.forward(1, 4, 1) + decoder.forward(1, 5, 1))

# In turns, every second time the other way round; who fails is left out; a peer may have fewer repetitions.
order = []
def contestant(name, repetitions=0, fails_at=None):
    def run(repetition):
        order.append(name)
        if repetition == fails_at:
            raise harness.Failed("no such thing")
        return {"rate": 10.0 * (repetition + 1) if name == "ours" else 2.0}
    return harness.Contestant(name, run, repetitions)
comparisons = [harness.Comparison("speed", "ours", "peer", "rate", 9), harness.Comparison("speed", "ours", "once", "rate", 11), harness.Comparison("speed", "ours", "broken", "rate", 2),
               harness.Comparison("memory", "ours", "", "rate", 15, True), harness.Comparison("roof", "ours", "", "some_share", 0.5)]
work = harness.Work("toy", "A toy", "x/s", "rate", [contestant("ours"), contestant("peer"), contestant("once", 1), contestant("broken", fails_at=1)], comparisons)
saved = []
result = harness.measure(work, 3, lambda r: saved.append({k: len(v) for k, v in r["samples"].items()}), log=lambda text: None)
assert order == ["ours", "peer", "once", "broken", "broken", "peer", "ours", "ours", "peer"], order
assert saved[-1] == {"ours": 3, "peer": 3, "once": 1, "broken": 1}, saved
assert result["left_out"] == {"broken": "no such thing"}
for i, sample in enumerate(result["samples"]["ours"]):
    sample.update(others_cores=0.0, some_share=0.6, roofline_share=0.5, roofline_s=1.0)
for sample in itertools.chain.from_iterable(v for k, v in result["samples"].items() if k != "ours"):
    sample["others_cores"] = 0.01
result.update(comparisons=[vars(c) for c in comparisons], hardware={"cpu": "Toy", "cores": 2, "features": ["avx2", "fma"], "memory_gib": 1.0}, dtype="fp32",
              runs=[{"versions": "none", "when": "today", "commit": "c0ffee", "command": "benchmarks/run toy", "load_before": 0.1,
                     "roofline": {"ranks": 2, "flops": 2e11, "bytes": 2e10}}])
judged = [report.judge(result, c) for c in result["comparisons"]]
assert judged[0] == (10.0, 5.0, 15.0, "met"), judged[0]
assert judged[1][0] == 10.0 and judged[1][3] == "not met"     # against the peer's only sample
assert judged[3] == (20.0, 10.0, 30.0, "not met")
assert judged[4] == (0.6, 0.6, 0.6, "met")
limits = [report.limit(result, c) for c in result["comparisons"]]
assert limits == [20.0, 20.0, 20.0, None, None], limits  # twice the ratio, as ours takes twice its least time
fewer_ranks = json.loads(json.dumps(result))
for sample in fewer_ranks["samples"]["peer"]:
    sample["roofline_s"] = 1.8
assert report.limit(fewer_ranks, vars(comparisons[0])) == 1.8
with open("toy-fp32.json", "w") as file:
    json.dump(result, file)
table = report.work_table(result)
assert "busy" not in table
assert "| broken | not run: no such thing" in table, table
assert "200 GF/s in registers, 20.0 GB/s" in table, table

# A second run adds to it: samples of the broken one, which has no reason to be left out any more, and no other ones of the rest.
order.clear()
again = harness.Work("toy", "A toy", "x/s", "rate", [harness.Contestant("broken", lambda r: order.append(r) or {"rate": 4.0}, warm_up=True)], comparisons)
added = harness.measure(again, 2, lambda r: None, log=lambda text: None, before=json.loads(json.dumps(result)))
assert order == [0, 0, 1], order
assert {name: len(samples) for name, samples in added["samples"].items()} == {"ours": 3, "peer": 3, "once": 1, "broken": 3}
assert [sample["run"] for sample in added["samples"]["broken"]] == [0, 1, 1] and added["left_out"] == {}

# A side that is measured anew loses its samples, and with them the runs that no sample is left of.
added["runs"] = [{"commit": "first"}, {"commit": "second"}]
anew = harness.without(added, {"broken"})
assert anew["samples"]["broken"] == [] and anew["runs"] == [{"commit": "first"}] and len(added["samples"]["broken"]) == 3
anew = harness.without(added, {"ours", "peer", "once"})
assert [sample["run"] for sample in anew["samples"]["broken"]] == [0, 1, 1] and len(anew["runs"]) == 2
for sample in added["samples"]["broken"]:
    sample["run"] = 1
anew = harness.without(added, {"ours", "peer", "once"})
assert [sample["run"] for sample in anew["samples"]["broken"]] == [0, 0, 0] and anew["runs"] == [{"commit": "second"}]

# Inputs that are kept are made once, and are of one model.
arguments = harness.parse(["train", "--keep", "kept"], "")
bench = harness.Bench(arguments)
for _ in range(2):
    assert bench.made("input", lambda path: open(path, "x").close()) == "kept/input"
bench.note("lengths", [1, 2])
bench.close()
assert harness.Bench(arguments).noted("lengths") == [1, 2] and os.path.exists("kept/input")
try:
    harness.Bench(harness.parse(["train", "--keep", "kept", "--dtype", "fp32"], ""))
    raise AssertionError("inputs of another dtype were taken")
except SystemExit as error:
    assert "made of other things" in str(error)
result["samples"]["peer"][0]["others_cores"] = 1.0
assert "**the machine was busy**" in report.work_table(result)
with open("other.json", "w") as file:
    json.dump([1], file)
print("checked")
PYTHON
expect 0 '^checked' python3 check.py "$benchmarks"
expect 0 '^\| speed \| fp32 \| peer \| >= 9 \| 10.00 \(5.00 to 15.00\) \| met \| 20.00 \| 3, 3 \| Toy fma, quiet \|' python3 "$benchmarks/run" summary --results "$work"
expect_count 1 '^\| roof \| fp32 \|  \| >= 50 % \| 60 % \(60 % to 60 %\) \| met \|  \| 3 \| Toy fma, quiet \|'
expect 0 '^' test -s summary.md

# The programs that measure the machine and our parts of it.
mpi=("${SELM_MPIEXEC:-mpirun}" --oversubscribe --bind-to none)
tools=$(dirname "$SELM_BIN_DIR")/benchmarks
expect 0 '"what": "adamw_in_place"' "${mpi[@]}" -np 2 "$tools/selm_roofline_benchmark" 1 1
expect_count 1 '"what": "fma_fp32"'
expect 70 'usage' "${mpi[@]}" -np 1 "$tools/selm_roofline_benchmark" 1 0
head -n 6 "$SELM_SOURCE_DIR/data/ultrafeedback_sample.jsonl" >rows.jsonl
expect 0 '' "$SELM_BIN_DIR/selm_import" --input rows.jsonl --output prefs.h5
expect 0 '"rows": 6, "ranks": 3' "${mpi[@]}" -np 3 "$tools/selm_write_benchmark" prefs.h5 "$work" 1
expect 0 '' "$SELM_BIN_DIR/selm_inspect" iter.h5 --verify
printf 'one text\0another\0' >texts
expect 0 '"texts": 2' "$tools/selm_tokenizer_benchmark" "$SELM_SOURCE_DIR/tests/data/tiny_tokenizer" texts ids 1
expect 0 '^' test -s ids
finish
