"""The short form of `python -m benchmarks.faults`, as users run it."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_short_form_finds_nothing_wrong(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--short"]
    command += [f"--output={tmp_path / 'faults.json'}", f"--folder={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    parts = json.loads((tmp_path / "faults.json").read_text())["parts"]
    assert parts.keys() == {"kills", "terms", "storage", "bits", "json", "soak"}
    assert all(row["outcome"] == "one line, nothing lost" for row in parts["storage"]["rows"])
    assert sum(target["refused"] for target in parts["bits"]["by_target"].values()) > 10
    assert parts["json"]["refused"] > 100
