"""Parquet of the data set's size: the sample's rows again and again with ids of their own. Usage: make_rows.py JSONL OUTPUT ROWS
compare OURS PEER: whether all datasets of a peer's file are in ours, equal."""

import sys

from common import emit, read_rows


def make(source, output, wanted):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for row in read_rows(source) if row["chosen"][-1]["content"] and row["rejected"][-1]["content"]]
    writer = None
    for begin in range(0, wanted, len(rows)):
        part = [dict(row, prompt_id=f"{begin + i:016x}{row['prompt_id'][:48]}") for i, row in enumerate(rows[: wanted - begin])]
        table = pa.Table.from_pylist(part)
        writer = writer or pq.ParquetWriter(output, table.schema)
        writer.write_table(table)
    writer.close()
    return {"rows": wanted}


def compare(ours, peer):
    import h5py
    import numpy as np

    different = []
    with h5py.File(ours, "r") as a, h5py.File(peer, "r") as b:
        def check(name, thing):
            if isinstance(thing, h5py.Dataset) and (name not in a or not np.array_equal(a[name][:], thing[:])):
                different.append(name)
        b.visititems(check)
    return {"different": different}


emit(compare(*sys.argv[2:4]) if sys.argv[1] == "compare" else make(sys.argv[1], sys.argv[2], int(sys.argv[3])))
