#!/usr/bin/env bash
# benchmarks/comm/run on tiny sizes: every operation, with results equal to plain MPI's, and its table. Times are not judged.
set -euo pipefail
# shellcheck source=tests/cli/expect.sh
source "$(dirname "${BASH_SOURCE[0]}")/expect.sh"
build=$(dirname "$SELM_BIN_DIR")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONDONTWRITEBYTECODE=1

benchmark=(python3 "$SELM_SOURCE_DIR/benchmarks/comm/run" --build "$build" --output "$work" --launcher "${SELM_MPIEXEC:-mpirun} --oversubscribe --bind-to none -np {ranks}")
expect 0 '^\| memcpy on every rank' "${benchmark[@]}" --ranks 1,3 --sizes 192,65536 --repetitions 2
expect_count 2 '^## [13] ranks: ratio to plain MPI'
for operation in reduce_scatter_sum start_reduce_scatter_sum all_gather_shards start_all_gather_shards all_to_all_ragged broadcast 'all_reduce \(fp64 sum\)' start_exchange; do
    expect_count 5 "^\\| $operation \\|" # two tables for each number of ranks, one of what is compared
done
expect 0 '^' test -s comm.json
expect 1 '63 bytes cannot be cut evenly' "${benchmark[@]}" --ranks 2 --sizes 63 --repetitions 1
finish
