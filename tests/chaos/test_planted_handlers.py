# SPDX-License-Identifier: MIT OR Apache-2.0
"""The judge of handlers finds planted faults, on the stand-in driver."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parent / "handlers_without_kernel.py"


@pytest.mark.parametrize(
    ("plant", "finds"),
    [
        ("wrong-bytes", "bytes that are not the disk's"),
        ("other-block", "bytes that are not the disk's"),
        ("acknowledged-failure", "a failure is acknowledged as success"),
        ("dies", "the server is gone"),
    ],
)
def test_a_planted_fault_of_a_handler_is_found(plant, finds):
    argv = [sys.executable, str(PROGRAM), "--rounds", "1", "--plant", plant]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert finds in done.stdout


def test_a_handler_that_answers_right_is_no_finding():
    argv = [sys.executable, str(PROGRAM), "--rounds", "4", "--only", "takes_three_seconds"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
