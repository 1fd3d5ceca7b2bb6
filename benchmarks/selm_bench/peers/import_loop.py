"""The same as importer.py, as most such scripts are written: rows as Python objects, batch by batch. Usage: import_loop.py INPUT OUTPUT"""

import sys
import time

import h5py
import numpy as np
import pyarrow.parquet as pq

from common import emit

ROLES = {"system": 0, "user": 1, "assistant": 2}


class Ragged:
    def __init__(self):
        self.parts, self.offsets = [], [0]

    def add(self, text):
        data = text.encode()
        self.parts.append(data)
        self.offsets.append(self.offsets[-1] + len(data))

    def write(self, group, name):
        group[name] = np.frombuffer(b"".join(self.parts), np.uint8)
        group[f"{name}_offsets"] = np.array(self.offsets)


def main():
    start = time.perf_counter()
    columns = {name: Ragged() for name in ("prompt", "prompt_id", "message", "chosen", "rejected")}
    roles, bounds, scores = [], [0], []
    for batch in pq.ParquetFile(sys.argv[1]).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            columns["prompt"].add(row["prompt"])
            columns["prompt_id"].add(row["prompt_id"])
            for message in row["chosen"][:-1]:
                roles.append(ROLES[message["role"]])
                columns["message"].add(message["content"])
            bounds.append(len(roles))
            columns["chosen"].add(row["chosen"][-1]["content"])
            columns["rejected"].add(row["rejected"][-1]["content"])
            scores.append((row["score_chosen"], row["score_rejected"]))
    with h5py.File(sys.argv[2], "w") as file:
        columns["prompt"].write(file.create_group("prompts"), "text")
        columns["prompt_id"].write(file["prompts"], "id")
        file["prompts/row"] = np.arange(len(scores))
        file["prompts/row_source"] = np.arange(len(scores))
        messages = file.create_group("prompts/messages")
        messages["role"], messages["row_offsets"] = np.array(roles, np.uint8), np.array(bounds)
        columns["message"].write(messages, "text")
        for name in ("chosen", "rejected"):
            columns[name].write(file.create_group(f"responses/{name}"), "text")
        file["scores"] = np.array(scores, np.float64)
    emit({"seconds": time.perf_counter() - start, "rows": len(scores)})


main()
