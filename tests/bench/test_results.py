# SPDX-License-Identifier: MIT OR Apache-2.0
"""A measurement that fails costs the benchmark only that measurement."""

import contextlib
import json
import subprocess

import counting
import goals
import guest
import many
import pytest
import report

JOB = {"rw": "randread", "bs": "4k", "iodepth": 32}
REQUESTS = counting.requests_of_window(JOB)


class FakeMarks(counting.Marks):
    """Marks in a file, as the counter writes them."""

    def __init__(self, path):
        super().__init__()
        self._path = path
        self._count = 0

    def make(self, number=0):
        self._count += 1000
        with self._path.open("a") as file:
            file.write(f"{number} {self._count} {self._count // 10}\n")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(guest, "conditions", lambda: {"kernel": "none"})
    (tmp_path / "count").mkdir()
    return guest.Results(tmp_path / "count/bench.json")


@pytest.fixture
def marks(tmp_path):
    return FakeMarks(tmp_path / "count.marks")


@pytest.fixture
def client(monkeypatch, marks):
    """Clients that end as a list says: the number of windows that they mark, and why they fail."""
    outcomes = []

    def run(argv, **_options):
        assert argv[:2] == ["ublk", "bench"]
        windows, failed = outcomes.pop(0)
        for _ in range(windows):
            marks.make()
            marks.make()
        job = {"job": "job", "failed": failed, "windows": [{}] * windows}
        # A client that fails has begun with a window.
        if failed:
            marks.make()
        return subprocess.CompletedProcess(argv, bool(failed), json.dumps({"disks": [{"jobs": [job]}]}), "")

    monkeypatch.setattr(counting.subprocess, "run", run)
    return outcomes


def test_a_client_that_fails_is_repeated_once(client, marks):
    client += [(1, "it broke"), (3, None)]
    assert counting.count("/dev/x", "job", JOB, marks) == {"attempt": 1, "requests": REQUESTS}
    client += [(1, "it broke"), (2, None)]
    with pytest.raises(counting.Failed, match="2 windows of 3"):
        counting.count("/dev/x", "job", JOB, marks)


def test_a_client_without_an_answer_fails_with_its_message(monkeypatch, marks):
    ended = subprocess.CompletedProcess([], 1, "", "ublk: no such\ndisk\n")
    monkeypatch.setattr(counting.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(counting.Failed, match="ublk: no such disk"):
        counting.count("/dev/x", "job", JOB, marks)


def test_other_windows_keep_their_marks_and_results(client, marks, results, tmp_path, monkeypatch):
    monkeypatch.setattr(guest, "served", lambda *_: contextlib.nullcontext("/dev/x"))
    client += [(3, None), (1, "it broke"), (0, "it broke"), (3, None)]
    guest.measure_peer("peer", 1, 0, {"one": JOB, "two": JOB, "three": JOB}, 0, marks, results)
    document = report.collect(tmp_path)
    assert {row["job"]: row["kernel"] for row in document["results"]} == {
        "one": 1000 / REQUESTS,
        "three": 1000 / REQUESTS,
    }
    assert list(document["failed"]) == ["count: peer q1 round 0 two"]


def test_a_machine_that_ends_early_leaves_what_was_measured(results, tmp_path):
    results.add("results", {"peer": "peer", "queues": 1, "job": "job", "requests": 10, "attempt": 0})
    # The second window was not finished.
    (tmp_path / "count.marks").write_text("3 0 0\n0 0 0\n0 100 10\n0 200 20\n")
    assert [row["kernel"] for row in report.collect(tmp_path)["results"]] == [10]


def test_the_spread_of_windows_is_reported(results, tmp_path):
    results.add("results", {"peer": "peer", "queues": 1, "job": "job", "requests": 1, "attempt": 0})
    (tmp_path / "count.marks").write_text("3 0 0\n0 0 0\n0 100 0\n0 100 0\n0 210 0\n0 210 0\n0 300 0\n")
    (row,) = report.collect(tmp_path)["results"]
    assert (row["kernel"], row["rounds"]) == (100, 3)
    assert row["spread"] == pytest.approx(0.2)


def test_a_number_of_devices_that_fails_is_reported(results, monkeypatch):
    monkeypatch.setattr(many.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(many, "PEERS", {"sh": (lambda _count: contextlib.nullcontext(), 10)})
    many.measure([1], None, False, results)
    assert list(results.failed) == ["sh, 1 devices"]
    assert results.failed["sh, 1 devices"].startswith("'NoneType'")


def test_a_missed_goal_is_bold():
    def row(peer, kernel):
        return {"peer": peer, "queues": 1, "job": "randread-4k-qd1", "kernel": kernel, "user": 0}

    # The peer's best mode counts.
    rows = [row("ublk-null", 11), row("kublk-null", 12), row("kublk-null-batch", 10)]
    table = goals.table({"results": rows, "many": []})
    assert "| null against kublk's null: instructions | at most 1.00 | randread-4k-qd1 **1.10** |" in table
    rows[0] = row("ublk-null", 10)
    assert "| randread-4k-qd1 1.00 |" in goals.table({"results": rows, "many": []})


def test_drivers_are_compared_peer_by_peer():
    def row(peer, kernel):
        return {"peer": peer, "queues": 1, "job": "job", "kernel": kernel, "user": 0}

    rows = [row("a", 100), row("a@bundled", 99), row("b", 100), row("b@bundled", 102)]
    assert "| job (b) **1.02** |" in goals.table({"results": rows, "many": []})
