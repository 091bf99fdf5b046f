# SPDX-License-Identifier: MIT OR Apache-2.0
"""A window that fails costs the benchmark only that window."""

import contextlib
import json
import subprocess
import sys

import guest
import many
import pytest
import report

JOB = {"bs": "4k", "iodepth": 32}


class FakeMarks(guest.Marks):
    """Marks in a file, as the counter writes them."""

    def __init__(self, path):
        self.window = -1
        self._path = path
        self._count = 0

    def make(self):
        self._count += 1000
        with self._path.open("a") as file:
            file.write(f"0 {self._count} {self._count // 10}\n")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(guest, "conditions", lambda: {"kernel": "none"})
    (tmp_path / "count").mkdir()
    return guest.Results(tmp_path / "count/bench.json")


@pytest.fixture
def fio(monkeypatch):
    """A client that reports the request counts of a list, one after the other."""
    counts = []
    popen = subprocess.Popen
    said = json.dumps({"jobs": [{"error": 0, "read": {"total_ios": 1, "clat_ns": {}}, "write": {"total_ios": 0}}]})
    command = [sys.executable, "-c", f"print({said!r})"]
    monkeypatch.setattr(guest.subprocess, "Popen", lambda _argv, **options: popen(command, **options))
    monkeypatch.setattr(guest, "requests_of", lambda *_: counts.pop(0))
    monkeypatch.setattr(guest, "Work", lambda _client: type("Work", (), {"so_far": lambda self: (0.1, 0.2, 0.3)})())
    monkeypatch.setattr(guest.time, "sleep", lambda _seconds: None)
    return counts


def test_a_window_without_requests_fails(fio, tmp_path):
    fio += [20, 20, 20]
    with pytest.raises(guest.Failed, match="no request ended"):
        guest.measure(["/dev/x"], JOB, 0, FakeMarks(tmp_path / "marks"))


def test_other_windows_keep_their_marks_and_results(fio, results, tmp_path, monkeypatch):
    monkeypatch.setattr(guest, "served", lambda *_: contextlib.nullcontext("/dev/x"))
    fio += [20, 20, 120, 20, 20, 20, 20, 20, 70]
    marks = FakeMarks(tmp_path / "marks")
    guest.measure_peer("peer", 1, 0, {"one": JOB, "two": JOB, "three": JOB}, 0, marks, results)
    document = report.collect(tmp_path)
    assert {row["job"]: row["kernel"] for row in document["results"]} == {"one": 1000 / 100, "three": 1000 / 50}
    assert list(document["failed"]) == ["count: peer q1 round 0 two"]


def test_a_machine_that_ends_early_leaves_what_was_measured(results, tmp_path):
    row = {"peer": "peer", "queues": 1, "job": "job", "requests": 10, "window": 0}
    results.add("results", row)
    # The second window was not finished.
    (tmp_path / "marks").write_text("0 0 0\n0 100 10\n0 200 20\n")
    assert [row["kernel"] for row in report.collect(tmp_path)["results"]] == [10]


def test_a_number_of_devices_that_fails_is_reported(results, monkeypatch):
    monkeypatch.setattr(many.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(many, "PEERS", {"sh": (lambda _count: contextlib.nullcontext(), 10)})
    many.measure([1], None, False, results)
    assert list(results.failed) == ["sh, 1 devices"]
    assert results.failed["sh, 1 devices"].startswith("'NoneType'")
