"""benchmarks/kill_resume.py in short: the same kills, fewer of them, each case at least once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # whichever test comes first makes the rows
ROOT = Path(__file__).parent.parent
SHORT = ["--short", "--kills=1", "--other-kills=1", "--saves=5", "--times=1"]
CASES = [
    "kill -9, in memory, no workers",
    "kill -9, files, 2 workers",
    "kill -9, compiled",
    "kill -9, 2 processes",
    "kill -9, accumulation 2",
    "kill -9, averaged weights",
    "kill -9, 2 processes, weights shared out",
    "kill -9 during a save",
    "disk full, save refused",
    "not a number on 1 of 2 processes",
    "1 of 2 processes lost",
    "SIGTERM, SIGINT",
    "2 nodes x 1 process against 1 x 2",
]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """Each case's row by its name."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill_resume", *SHORT],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.stdout, result.stderr
    return {row["case"]: row for row in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_as_undisturbed(rows, case):
    assert rows[case]["as wanted"] == rows[case]["times"] > 0


def test_they_went_on_from_a_checkpoint(rows):
    """And did not only start over."""
    assert sum(row.get("from a checkpoint", 0) for row in rows.values()) > 0


def test_no_case_is_left_out(rows):
    assert list(rows) == CASES
