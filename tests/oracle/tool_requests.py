"""Requests to the tools that compute with the models: a JSON file in, raw f32 values and a line of text out."""

import json
import subprocess
from pathlib import Path

import numpy as np


def run(tool: Path, directory: Path, request: dict, expect: int = 0) -> tuple[np.ndarray, str]:
    """Raw f32 results and stdout (or, on an expected failure, stderr)."""
    output, path = directory / "output.bin", directory / "request.json"
    path.write_text(json.dumps({"output": str(output), **request}))
    result = subprocess.run([str(tool), str(path)], capture_output=True, text=True, timeout=600)
    assert result.returncode == expect, result.stderr
    if expect:
        return np.zeros(0), result.stderr
    values = np.fromfile(output, dtype=np.float32) if output.exists() else np.zeros(0, np.float32)
    output.unlink(missing_ok=True)
    return values, result.stdout
