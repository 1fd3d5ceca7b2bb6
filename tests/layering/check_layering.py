#!/usr/bin/env python3
"""Checks every #include of include/ and src/ against the module table of docs/ARCHITECTURE.md.

usage: check_layering.py SOURCE_DIR     exit 1 and one line per violation
       check_layering.py --self-check   plants violations in a temporary tree and checks that each is caught
"""

import pathlib
import re
import sys
import tempfile

# module -> modules whose headers it may include (its own always)
TABLE = {
    "base": set(),
    "comm": {"base"},
    "h5": {"base", "comm"},
    "data": {"base", "comm", "h5"},
    "text": {"base"},
    "kernels": {"base"},
    "model": {"base", "text", "kernels"},
    "algo": {"base"},
    "shard": {"base", "comm", "h5", "model", "kernels"},
    "rank": {"base", "text", "model", "algo"},
    "phases": {"base", "comm", "h5", "data", "text", "kernels", "model", "algo", "shard", "rank"},
    "apps": {"base", "comm", "phases"},
}

# (pattern of the included name, what it is, directories that may include it)
THIRD_PARTY = [
    (r"(mpi|mpio|nccl)\.h$", "MPI/NCCL", ["src/comm/"]),
    (r"(cuda|cuda_runtime|cuda_runtime_api|cuda_bf16)\.h$", "CUDA", ["src/comm/", "src/kernels/"]),
    (r"(hdf5|H5[A-Za-z]*public)\.h$", "HDF5", ["src/h5/", "include/selm/h5/"]),
    (r"(torch|ATen|c10|caffe2)/", "LibTorch", ["src/kernels/"]),
    (r"Kokkos_|KokkosCore", "Kokkos", ["src/kernels/", "src/apps/"]),
    (r"libxsmm", "LIBXSMM", ["src/kernels/"]),
    (r"boost/", "Boost", ["src/apps/"]),
    (r"(arrow|parquet)/", "Arrow/Parquet", ["src/data/", "src/phases/"]),
    (r"pcre2", "PCRE2", ["src/text/"]),
    (r"xxh", "xxHash", ["src/base/"]),
    (r"nlohmann/", "nlohmann/json (slow to compile: never in a public header)", ["src/"]),
]

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
SUFFIXES = {".hpp", ".cpp", ".h", ".cc", ".cu", ".cuh", ".inc"}


def module_of(path):
    """include/selm/MODULE/... and src/MODULE/... -> MODULE."""
    parts = pathlib.PurePosixPath(path).parts
    if parts[0] == "include":
        return parts[2] if len(parts) > 3 and parts[1] == "selm" else None
    return parts[1] if len(parts) > 2 else None


def check_include(path, source_dir, name):
    module = module_of(path)
    if module not in TABLE:
        return f"lies outside the modules ({', '.join(TABLE)})"
    if name.startswith("selm/"):
        target = name.split("/")[1]
        if target != module and target not in TABLE[module]:
            allowed = ", ".join(sorted(TABLE[module])) or "nothing else"
            return f'includes "{name}": {module} may include {allowed}'
        if not (source_dir / "include" / name).is_file():
            return f'includes "{name}", which does not exist'
        return None
    for pattern, what, places in THIRD_PARTY:
        if re.match(pattern, name):
            if not any(path.endswith(place[1:]) if place[0] == "*" else path.startswith(place) for place in places):
                return f"includes <{name}>: {what} is for {', '.join(places)}"
            return None
    return None


def check_local(path, source_dir, name):
    """A quoted name that is not selm/...: a file beside the includer, or the generated header of base."""
    if (source_dir / path).parent.joinpath(name).is_file() and "/" not in name:
        return None
    if name == "selm_build_info.hpp" and path.startswith("src/base/"):
        return None
    return f'includes "{name}": neither selm/... nor a file beside it (use <> for other libraries)'


def violations(source_dir):
    found = []
    files = 0
    for top in ("include", "src"):
        for file in sorted((source_dir / top).rglob("*")):
            if file.suffix not in SUFFIXES:
                continue
            files += 1
            path = file.relative_to(source_dir).as_posix()
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                quote, name = match.groups()
                problem = check_include(path, source_dir, name)
                known = any(re.match(pattern, name) for pattern, _, _ in THIRD_PARTY)
                if problem is None and quote == '"' and not name.startswith("selm/") and not known:
                    problem = check_local(path, source_dir, name)
                if problem:
                    found.append(f"{path}:{number}: {problem}")
    return files, found


def self_check():
    good = {
        "include/selm/base/error.hpp": "#pragma once\n#include <string>\n",
        "include/selm/comm/session.hpp": '#include "selm/base/error.hpp"\n',
        "include/selm/kernels/engine.hpp": '#include "selm/base/error.hpp"\n',
        "src/comm/session.cpp": '#include <mpi.h>\n#include "selm/comm/session.hpp"\n#include "local.hpp"\n',
        "src/comm/local.hpp": "#pragma once\n",
        "src/kernels/aten.cpp": "#include <ATen/ops/mm.h>\n#include <nlohmann/json.hpp>\n",
    }
    bad = {
        "include/selm/base/up.hpp": '#include "selm/comm/session.hpp"\n',
        "src/text/up.cpp": '#include "selm/kernels/engine.hpp"\n',
        "src/algo/mpi.cpp": "#include <mpi.h>\n",
        "include/selm/comm/mpi.hpp": "  #  include <mpi.h>\n",
        "src/data/hdf5.cpp": "#include <hdf5.h>\n",
        "src/shard/cuda.cu": "#include <cuda_runtime_api.h>\n",
        "include/selm/kernels/torch.hpp": "#include <ATen/core/Tensor.h>\n",
        "src/model/torch.cpp": "#include <torch/torch.h>\n",
        "include/selm/model/json.hpp": "#include <nlohmann/json.hpp>\n",
        "src/phases/boost.cpp": "#include <boost/program_options.hpp>\n",
        "src/apps/text.cpp": '#include "selm/kernels/engine.hpp"\n',
        "src/base/absent.cpp": '#include "selm/base/absent.hpp"\n',
        "src/base/other.cpp": '#include "../comm/local.hpp"\n',
        "src/unknown/new.cpp": "#include <string>\n",
    }
    failures = []
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)

        def put(files):
            for path, text in files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(text, encoding="utf-8")

        put(good)
        found = violations(root)[1]
        if found:
            failures.append(f"an allowed include was reported: {found}")
        put(bad)
        found = violations(root)[1]
        for path in bad:
            if not any(line.startswith(path + ":") for line in found):
                failures.append(f"not caught: {path}: {bad[path].strip()}")
        for line in found:
            if line.split(":")[0] not in bad:
                failures.append(f"reported without reason: {line}")
    for failure in failures:
        print(failure)
    print(f"self-check: {len(bad)} planted violations, {len(failures)} problems")
    return 1 if failures else 0


def main():
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 64
    if sys.argv[1] == "--self-check":
        return self_check()
    files, found = violations(pathlib.Path(sys.argv[1]))
    for line in found:
        print(line)
    print(f"{files} files, {len(found)} violations")
    return 1 if found or files == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
