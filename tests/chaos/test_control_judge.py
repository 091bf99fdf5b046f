# SPDX-License-Identifier: MIT OR Apache-2.0
"""The judge of control commands on programs that end in every way. Host only."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "e2e"))

from kinds import control
from support.face import Face
from support.pace import patience
from tools.findings import Findings


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """What the judge finds about a shell script in place of `ublk`."""
    monkeypatch.setattr(control, "LIMIT", 1.0)
    # There may be no /proc/PID/stack for this user.
    monkeypatch.setattr(control, "blocked_stacks", lambda: "")

    def run(script: str) -> list[str]:
        findings = Findings("control", 1, tmp_path)
        control.Worker(findings, 1, 0, set(), "", 0).command(Face("sh", ["sh", "-c", script]), "list")
        return list(findings.counts)

    return run


@pytest.mark.parametrize("script", ["echo []", "echo 'ublk: no such device' >&2; exit 1", "echo usage >&2; exit 2"])
def test_success_and_errors_with_a_message_are_no_findings(judge, script):
    assert judge(script) == []


@pytest.mark.parametrize(
    ("script", "finds"),
    [
        ("exec sleep 100", f"control: list does not end within {patience(1):g} s"),
        ("exit 1", "control: list fails without a word"),
        ("echo \"thread 'main' panicked at x.rs\" >&2; exit 1", "control: list crashes"),
        ("echo 'Traceback (most recent call last)' >&2; exit 1", "control: list crashes"),
        ("echo >&2 x; exit 101", "control: list ends with status 101"),
        ("kill -9 $$", "control: list ends with status -9"),
    ],
)
def test_hangs_crashes_and_silence_are_found(judge, script, finds):
    assert judge(script) == [finds]
