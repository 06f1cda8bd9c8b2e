"""The script for a GPU, at a toy's size on a CPU: so that it starts at the first try where a GPU is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


@pytest.mark.slow
def test_all_parts_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((tmp_path / "gpu.json").read_text())["findings"]
    assert {finding["part"] for finding in findings} == {*"abcde"}
    assert len(findings) >= 14
    assert all(finding["ok"] for finding in findings), done.stdout
