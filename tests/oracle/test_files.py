"""Imported files as Python and HDF5's own tools see them: every dataset equals the JSONL; Parquet and JSONL give equal data."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

h5py = pytest.importorskip("h5py")
np = pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "ultrafeedback_sample.jsonl"
BIN = Path(os.environ.get("SELM_BIN_DIR", ROOT / "build" / "release" / "bin"))
ROLES = {"system": 0, "user": 1, "assistant": 2}
pytestmark = pytest.mark.skipif(not (BIN / "selm_import").exists(), reason=f"no selm_import in {BIN}")


def run(program: str, *arguments, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = []
    if ranks > 1:
        launcher = [os.environ.get("SELM_MPIEXEC", "mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    return subprocess.run(
        [*launcher, str(BIN / program), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def imported(source: Path, target: Path, *options, ranks: int = 1) -> Path:
    result = run("selm_import", "--input", source, "--output", target, *options, ranks=ranks)
    assert result.returncode == 0, result.stderr
    return target


def digest(path: Path) -> str:
    result = run("selm_inspect", path, "--digest")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def texts(group, name: str) -> list[str]:
    data = group[name][()].tobytes()
    offsets = group[f"{name}_offsets"][()]
    assert offsets.dtype == np.dtype("<i8") and group[name].dtype == np.uint8
    return [data[a:b].decode("utf-8") for a, b in zip(offsets[:-1], offsets[1:])]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prefs(tmp_path_factory) -> Path:
    return imported(SAMPLE, tmp_path_factory.mktemp("files") / "prefs.h5", "--on-empty-answer", "keep", ranks=2)


def test_every_dataset_equals_the_source(prefs, rows):
    with h5py.File(prefs) as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert sorted(names) == sorted(
            ["prompts/id", "prompts/id_offsets", "prompts/messages/role", "prompts/messages/row_offsets",
             "prompts/messages/text", "prompts/messages/text_offsets", "prompts/row", "prompts/row_source",
             "prompts/text", "prompts/text_offsets", "responses/chosen/text", "responses/chosen/text_offsets",
             "responses/rejected/text", "responses/rejected/text_offsets", "scores"]
        )  # fmt: skip
        assert file.attrs["format"] == "selm-prefs" and file.attrs["format_version"] == 1
        assert "on-empty-answer = keep" in file.attrs["config"]
        assert texts(file["prompts"], "text") == [row["prompt"] for row in rows]
        assert texts(file["prompts"], "id") == [row["prompt_id"] for row in rows]
        assert texts(file["responses/chosen"], "text") == [row["chosen"][-1]["content"] for row in rows]
        assert texts(file["responses/rejected"], "text") == [row["rejected"][-1]["content"] for row in rows]
        assert file["prompts/row"][()].tolist() == list(range(len(rows)))
        assert file["prompts/row_source"][()].tolist() == list(range(len(rows)))
        scores = file["scores"]
        assert scores.dtype == np.dtype("<f8") and scores.shape == (len(rows), 2)
        assert scores[()].tolist() == [[row["score_chosen"], row["score_rejected"]] for row in rows]
        contents = texts(file["prompts/messages"], "text")
        roles = file["prompts/messages/role"][()].tolist()
        offsets = file["prompts/messages/row_offsets"][()].tolist()
        for row, first, last in zip(rows, offsets[:-1], offsets[1:]):
            expected = [(ROLES[message["role"]], message["content"]) for message in row["chosen"][:-1]]
            assert list(zip(roles[first:last], contents[first:last])) == expected


def test_tools_of_hdf5_read_it(prefs):
    if shutil.which("h5ls") is None or shutil.which("h5dump") is None:
        pytest.skip("the tools of HDF5 (hdf5-tools) are not installed")
    listing = subprocess.run(["h5ls", "-r", str(prefs)], capture_output=True, text=True, check=True).stdout
    assert "/scores                  Dataset {1000, 2}" in listing
    header = subprocess.run(["h5dump", "-H", str(prefs)], capture_output=True, text=True, check=True).stdout
    assert "H5T_IEEE_F64LE" in header and 'DATASET "text_offsets"' in header
    values = subprocess.run(["h5dump", "-d", "/prompts/row", "-c", "3", str(prefs)], capture_output=True, text=True, check=True).stdout
    assert "(0): 0, 1, 2" in values


def test_verifies(prefs):
    result = run("selm_inspect", prefs, "--verify")
    assert result.returncode == 0 and "verified" in result.stdout, result.stderr


@pytest.mark.parametrize("large", [False, True])
def test_parquet_gives_the_same_data(prefs, rows, tmp_path, large):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = pa.large_string() if large else pa.string()
    message = pa.struct([("content", text), ("role", text)])
    messages = pa.large_list(message) if large else pa.list_(message)
    schema = pa.schema([("prompt", text), ("prompt_id", text), ("chosen", messages), ("messages", messages),
                        ("rejected", messages), ("score_chosen", pa.float64()), ("score_rejected", pa.float64())])  # fmt: skip
    table = pa.Table.from_pylist([{**row, "messages": row["chosen"]} for row in rows], schema=schema)
    source = tmp_path / "rows.parquet"
    parquet.write_table(table, source, row_group_size=300)
    target = imported(source, tmp_path / "prefs.h5", "--on-empty-answer", "keep")
    assert digest(target) == digest(prefs)


def test_flat_parquet_equals_flat_jsonl(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    flat = [{"prompt": f"question {i} é", "chosen": "a" * i + "!", "rejected": f"b{i}",
             "score_chosen": None if i % 2 else float(i)} for i in range(7)]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(flat), tmp_path / "flat.parquet")
    (tmp_path / "flat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat), encoding="utf-8")
    one = imported(tmp_path / "flat.parquet", tmp_path / "one.h5")
    two = imported(tmp_path / "flat.jsonl", tmp_path / "two.h5")
    assert digest(one) == digest(two)
    with h5py.File(one) as file:
        assert math.isnan(file["scores"][1, 0]) and file["scores"][2, 0] == 2.0


def test_bad_parquet_rows_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "bad.parquet"
    parquet.write_table(pa.Table.from_pylist([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": None, "rejected": "c"}]), source)
    result = run("selm_import", "--input", source, "--output", tmp_path / "out.h5")
    assert result.returncode == 65 and "row 2" in result.stderr and '"chosen" is missing' in result.stderr
    assert not (tmp_path / "out.h5").exists()
    parquet.write_table(pa.table({"prompt": ["a"], "chosen": [1.5], "rejected": ["c"]}), source)
    result = run("selm_import", "--input", source, "--output", tmp_path / "out.h5")
    assert result.returncode == 65 and 'column "chosen" has type double' in result.stderr
    parquet.write_table(pa.table({"prompt": ["a"], "chosen": ["c"]}), source)
    result = run("selm_import", "--input", source, "--output", tmp_path / "out.h5")
    assert result.returncode == 65 and 'no column "rejected"' in result.stderr
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    result = run("selm_import", "--input", source, "--output", tmp_path / "out.h5")
    assert result.returncode == 65 and "cannot be read as Parquet" in result.stderr
