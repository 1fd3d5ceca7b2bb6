"""Import, tokenizers, collectives, starting up, writing together, the optimizer's kernel: what surrounds the models."""

import json
import os
import shutil
import statistics
import sys

from .harness import ROOT, Comparison, Contestant, Failed, Work
from .shared import chosen, remove

DATA_SET_ROWS = 61135  # UltraFeedback, binarized


def import_works(bench):
    yield lambda: import_work(bench)


def data_set(bench):
    rows = bench.a.rows or DATA_SET_ROWS
    return bench.made(f"rows-{rows}.parquet", lambda path: bench.python("make_rows", bench.data, path, rows))


def import_work(bench):
    source, ours_file, peer_file = data_set(bench), bench.path("imported.h5"), bench.path("peer.h5")
    rows = bench.a.rows or DATA_SET_ROWS
    checked = {}

    def ours(repetition):
        remove(ours_file)
        os.sync()  # a side must not wait for what the other one left to be written
        done = bench.command([bench.program("selm_import"), "--input", source, "--output", ours_file])
        return {"rows_per_s": rows / done["wall_s"], "seconds": done["wall_s"], "wall_s": done["wall_s"], "peak_rss_bytes": done["peak_rss_bytes"],
                "gib": done["peak_rss_bytes"] / 2**30}

    def peer(script):
        remove(peer_file)
        os.sync()
        done = bench.python(script, source, peer_file)
        if script not in checked:
            checked[script] = bench.python("make_rows", "compare", ours_file, peer_file)["different"]
            if checked[script]:
                raise Failed(f"datasets differ from ours: {', '.join(checked[script])}")
        return {"rows_per_s": rows / done["wall_s"], "seconds": done["wall_s"], "inside_s": done["seconds"], "peak_rss_bytes": done["peak_rss_bytes"]}

    name, columns, loop = "ours, 1 process", "pyarrow and h5py, whole columns", "pyarrow and h5py, rows as objects"
    contestants = [Contestant(name, ours, warm_up=True), Contestant(columns, lambda r: peer("importer")), Contestant(loop, lambda r: peer("import_loop"))]
    phase = f"import of {rows:,} rows from Parquet"
    comparisons = [Comparison(phase, name, columns, "rows_per_s", 2, peer_text="pyarrow + h5py script, whole columns at once"),
                   Comparison(phase, name, loop, "rows_per_s", 2, peer_text="pyarrow + h5py script, rows as Python objects"),
                   Comparison(phase + ": peak resident GiB", name, "", "gib", 0.931, True, "1 GB")]
    return Work("import", f"Import of {rows:,} rows from Parquet", "rows/s", "rows_per_s", chosen(contestants, bench), comparisons,
                ["Whole processes, starting up included (both sides); every dataset of the scripts is compared with ours. Ours also checks rows, computes digests and syncs to the disk. Memory is the processes' own peak: to watch "
                 "their maps would hold up what takes a second."])


def tokenizer_works(bench):
    shutil.rmtree(bench.path("tokenizers"), ignore_errors=True)
    made = bench.python("tokenizing", "make", bench.path("tokenizers"), bench.a.model, bench.data)
    for name in made["made"]:
        yield lambda name=name: tokenizer_work(bench, name, made["missing"])


def tokenizer_work(bench, name, missing):
    directory, texts = bench.path(f"tokenizers/{name}"), bench.path("tokenizers/texts")
    repetitions = bench.a.repetitions or (3 if bench.a.quick else 10)
    one_thread = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ids = {side: bench.path(f"ids-{side}") for side in ("ours", "peer")}

    def ours():
        done = bench.command(["taskset", "-c", "0", bench.tool("selm_tokenizer_benchmark"), directory, texts, ids["ours"], 2])
        return json.loads(done["out"])

    def peer():
        done = bench.command(["taskset", "-c", "0", bench.a.python, os.path.join(ROOT, "benchmarks/selm_bench/peers/tokenizing.py"), "encode",
                              directory + "/tokenizer.json", texts, ids["peer"], 2], one_thread)
        return json.loads(done["out"].strip().splitlines()[-1])

    def rates(amount, seconds):
        return {"mb_per_s": amount / min(seconds) / 1e6, "seconds": min(seconds)}

    def sample_ours(repetition):
        done = ours()
        return dict(rates(done["bytes"], done["seconds"]), tokens=done["tokens"])

    peers = {}

    def sample_peer(which, repetition):
        if repetition not in peers:
            peers.clear()
            peers[repetition] = peer()
        if repetition == 0:
            with open(ids["ours"], "rb") as a, open(ids["peer"], "rb") as b:
                if a.read() != b.read():
                    raise Failed("ids differ from ours")
        return dict(rates(peers[repetition]["bytes"], peers[repetition]["seconds"][which]), tokens=peers[repetition]["tokens"])

    batch, fast, side = "tokenizers encode_batch", "tokenizers encode_batch_fast", "ours, one core"
    contestants = [Contestant(side, sample_ours), Contestant(batch, lambda r: sample_peer("encode_batch", r)), Contestant(fast, lambda r: sample_peer("encode_batch_fast", r))]
    phase = f"tokenizer of {name}, one core"
    comparisons = [Comparison(phase, side, batch, "mb_per_s", 1, peer_text="Hugging Face tokenizers, one thread, encode_batch"),
                   Comparison(phase, side, fast, "mb_per_s", 1, peer_text="Hugging Face tokenizers, one thread, encode_batch_fast")]
    notes = ["Texts of the bundled rows; all ids are equal to the peer's. Each sample is the better of two passes after a warm-up pass."]
    notes += [f"{missed} is left out: {reason}" for missed, reason in missing.items()]
    work = Work(f"tokenizers-{name}", f"Encoding with the tokenizer of {name}", "MB/s", "mb_per_s", contestants, comparisons, notes)
    work.repetitions = repetitions
    return work


def startup_works(bench):
    yield lambda: startup_work(bench)


def startup_work(bench):
    processes, prefs, output = 16, bench.imported(16, "prefs-16.h5"), bench.path("first.h5")

    def ours(repetition):
        remove(output)
        done = bench.selm("selm_gen", "--data", prefs, "--policy", bench.a.model, "--output", output, "--max-new-tokens", 1, "--dtype", bench.a.dtype, ranks=processes)
        return {"per_s": 1 / done["wall_s"], "seconds": done["wall_s"]}

    def peer(repetition):
        done = bench.python("startup", processes, threads=1)
        return {"per_s": 1 / done["seconds"], "seconds": done["seconds"]}

    name, python = f"ours, {processes} ranks", f"{processes} interpreters"
    comparisons = [Comparison(f"mpirun -np {processes} selm_gen to the first token", name, python, "per_s", 5, peer_text=f"{processes} interpreters importing torch and transformers")]
    return Work("startup", f"Starting {processes} processes on {os.cpu_count()} cores", "starts/s", "per_s", chosen([Contestant(name, ours, warm_up=True), Contestant(python, peer, warm_up=True)], bench),
                comparisons, ["Ours: the whole command from mpirun to its end, with the model loaded, one new token for each of 16 prompts and the file written. "
                              "The interpreters import and end; they load no model."])


def write_works(bench):
    yield lambda: write_work(bench)


def samples_work(name, what, unit, key, samples, comparisons, notes):
    """A work whose program has measured in turns already."""
    sides = {side: iter(values) for side, values in samples.items()}
    work = Work(name, what, unit, key, [Contestant(side, lambda r, side=side: next(sides[side])) for side in samples], comparisons, notes)
    work.repetitions, work.measured_before = max(map(len, samples.values())), True
    return work


def write_work(bench):
    source, folder = data_set(bench), bench.path("writing")
    prefs = bench.made(os.path.basename(source) + ".h5", lambda path: bench.command([bench.program("selm_import"), "--input", source, "--output", path]))
    os.makedirs(folder, exist_ok=True)
    repetitions = bench.a.repetitions or (5 if bench.a.quick else 10)
    done = json.loads(bench.mpirun(4, bench.tool("selm_write_benchmark"), prefs, folder, repetitions)["out"].strip().splitlines()[-1])
    rate = lambda seconds: [{"gb_per_s": done["bytes"] / s / 1e9, "seconds": s} for s in seconds]
    name, plain = "ours, 4 ranks", "plain write"
    work = samples_work("write", f"Writing an iteration file of {done['rows']:,} rows ({done['bytes'] / 1e6:.0f} MB)", "GB/s", "gb_per_s",
                        {name: rate(done["ours_s"]), plain: rate(done["peer_s"])},
                        [Comparison("collective write of an iteration file, 4 ranks", name, plain, "gb_per_s", 0.5, peer_text="plain write of the same bytes by one process")],
                        ["Both end with the data on the disk (fsync). Ours reads prompts and answers of the data set from prefs.h5 meanwhile, sends generated answers to the rank that "
                         "writes their block, and checks the file before it gets its name."])
    for folder_file in os.listdir(folder):
        remove(os.path.join(folder, folder_file))
    return work


def adamw_works(bench):
    yield lambda: adamw_work(bench)


def adamw_work(bench):
    lines = bench.cpu_roofline()["samples"]
    update, read = statistics.median(lines["update"]["samples"]), statistics.median(lines["read"]["samples"])
    bandwidth = max(update, read)
    shares = lambda what: [{"gb_per_s": value, "bandwidth_share": value / bandwidth} for value in lines[what]["samples"]]
    plain = lambda what: [{"gb_per_s": value} for value in lines[what]["samples"]]
    sides = {"AdamW, compute weights apart": shares("adamw"), "AdamW, in place": shares("adamw_in_place"), "reading": plain("read"), "updating the same streams": plain("update")}
    comparisons = [Comparison("AdamW step on the shard: " + note, side, "", "bandwidth_share", 0.8, peer_text="bytes moved / measured bandwidth")
                   for side, note in (("AdamW, compute weights apart", "bf16, compute weights apart"), ("AdamW, in place", "fp32"))]
    return samples_work("adamw", f"AdamW on shards, {bench.a.ranks} ranks at once", "GB/s", "gb_per_s", sides, comparisons,
                        ["Bytes: 16 read and 12 (fp32) or 16 written for each parameter. Bandwidth: the larger of reading alone and of updating the same streams without arithmetic."])


def collective_works(bench):
    yield lambda: collective_work(bench)


def collective_work(bench):
    sizes = "1024,65536,1048576,16777216"
    folder = bench.path("comm")
    bench.command([sys.executable, os.path.join(ROOT, "benchmarks", "comm", "run"), "--ranks", bench.a.ranks, "--sizes", sizes, "--repetitions",
                   bench.a.repetitions or (5 if bench.a.quick else 9), "--build", bench.a.build, "--output", folder])
    with open(os.path.join(folder, "comm.json")) as file:
        points = [point for point in json.load(file)["points"] if point["bytes"] == 16777216]
    samples, comparisons = {}, []
    for point in points:
        operation, peer = point["operation"], "plain MPI: " + point["operation"]
        for side, seconds in ((operation, point["ours_s"]), (peer, point["peer_s"])):
            samples[side] = [{"gb_per_s": point["bytes"] / s / 1e9, "seconds": s} for s in seconds]
        comparisons.append(Comparison(f"collectives, 16 MiB: {operation}", operation, peer, "gb_per_s", peer_text=point["peer"]))
    return samples_work("collectives", f"Collectives on {bench.a.ranks} ranks, 16 MiB", "GB/s", "gb_per_s", samples, comparisons,
                        ["`benchmarks/comm/run` has all sizes, and what ours does more than the plain call."])


def in_table_order(name):
    """Kernels of all engines side by side, sizes by number."""
    engine, _, kernel = name.partition("/")
    return [(0, int(word)) if word.isdigit() else (1, word) for word in kernel.split("/")], engine


def kernel_works(bench):
    yield lambda: kernel_work(bench)


def kernel_work(bench):
    """Every kernel of the fast engine beside its twin of the reference engine, one core; the program takes them in random turns."""
    repetitions = bench.a.repetitions or (3 if bench.a.quick else 10)
    done = bench.command([bench.tool("kernels_benchmark"), "--benchmark_format=json", f"--benchmark_repetitions={repetitions}", "--benchmark_min_time=0.05",
                          "--benchmark_enable_random_interleaving=true", *([f"--benchmark_filter={bench.a.points}"] if bench.a.points else [])])
    engine, _, text = done["out"].partition("\n{")
    samples, comparisons = {}, []
    for line in json.loads("{" + text)["benchmarks"]:
        if line["run_type"] == "iteration":
            samples.setdefault(line["run_name"], []).append({"gflops": line.get("flops", 0) / 1e9, "per_s": 1e3 / line["real_time"], "gb_per_s": line.get("bytes", 0) / 1e9})
    samples = dict(sorted(samples.items(), key=lambda item: in_table_order(item[0])))  # they come in the order in which they ended
    for name in samples:
        fast, _, kernel = name.partition("/")
        if fast == "xsmm" and "aten/" + kernel in samples:
            comparisons.append(Comparison(kernel, name, "aten/" + kernel, "per_s", peer_text="reference twin (ATen)"))
    work = samples_work("kernels", "Kernels of the fast engine beside their reference twins, one core", "GF/s", "gflops", samples, comparisons,
                        [f"{engine.strip()}. Names end with outputs, inputs, rows (linear), lengths of prompt and answers (attention), rows of the rest. GF/s are useful operations; "
                         "both engines take the same weights, which are in no cache when their turn comes. Ratio: times."])
    work.in_summary = False
    return work


WORKS = {"import": import_works, "tokenizers": tokenizer_works, "collectives": collective_works, "startup": startup_works, "write": write_works, "adamw": adamw_works, "kernels": kernel_works}
