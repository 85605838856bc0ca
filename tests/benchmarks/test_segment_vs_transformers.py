"""The comparison with transformers at toy size: the two networks agree, and the record is whole."""

import json
import subprocess
import sys

import pytest

from benchmarks import segment_vs_transformers as bench
from fd_jax.convert import verifying


@pytest.mark.slow
def test_the_networks_agree_and_every_side_is_timed(tmp_path):
    output = tmp_path / "toy.json"
    command = ["-m", "benchmarks.segment_vs_transformers", "--toy", "--rounds=3"]
    done = subprocess.run(
        [sys.executable, *command, f"--output={output}"],
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["environment"]["processor"] and record["environment"]["threads"] == 2
    for work in bench.WORKS:
        figures, off = record["figures"][work], record["differences"][work]
        assert set(figures["seconds"]) == {bench.OURS, bench.EAGER, bench.FUSED}
        assert all(len(each) == 3 for each in figures["seconds"].values())
        assert set(off) == set(figures["ours_over_theirs"]) == {bench.EAGER, bench.FUSED}
        assert max(off.values()) < verifying.TOLERANCE


class Sides:
    """Two sides whose results differ by a given share."""

    def __init__(self, share):
        self.share = share

    def run(self, work):
        result = bench.np.ones(3)
        return {bench.OURS: (1.0, result), bench.EAGER: (2.0, result * (1 + self.share))}


def test_networks_that_differ_are_not_compared():
    assert bench.compare(Sides(0.0))["forward"] == {bench.EAGER: 0.0}
    with pytest.raises(SystemExit, match="the networks differ"):
        bench.compare(Sides(1e-2))
