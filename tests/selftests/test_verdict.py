# SPDX-License-Identifier: MIT OR Apache-2.0
"""The judgement of what the guest saw."""

import pytest
from linux_selftests.expectations import HARMLESS, KNOWN, Expectation, expectation, harmless, kernel_lines
from linux_selftests.observation import Observation
from linux_selftests.verdict import Kind, Verdict, complaints, judge

PASSED = "ublk selftest: recover_03 starting\nrecover_03 : [PASS]\n"

KNOWN_FAILURE = Expectation("recover_03", "fail", "a reason", ("intree",), ("output",))
KNOWN_SKIP = Expectation("recover_03", "skip", "a reason", ("intree",))


def seen(**values) -> Observation:
    return Observation("recover_03", **{"status": 0, "output": PASSED, **values})


def test_a_clean_run_passes():
    judgement = judge(seen(), None, [])
    assert (judgement.verdict, judgement.acceptable, judgement.label, judgement.reason) == (
        Verdict.PASS,
        True,
        "pass",
        "",
    )


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"status": 1}, Kind.STATUS),
        ({"status": -9}, Kind.STATUS),
        ({"status": None}, Kind.STATUS),
        ({"status": None, "blocked": "stacks"}, Kind.HANG),
        ({"output": ""}, Kind.OUTPUT),
        ({"output": PASSED + "device isn't quiesced(LIVE) after quiesce_dev\n"}, Kind.OUTPUT),
        ({"status": 4, "output": "delete dev 3 failed\n"}, Kind.OUTPUT),
        ({"residue": "nodes: /dev/ublkc0"}, Kind.RESIDUE),
        ({"kernel_trouble": ["WARNING: somewhere"]}, Kind.KERNEL),
        ({"void": "kublk does not delay"}, Kind.VOID),
        ({"status": None, "machine": "it ended"}, Kind.MACHINE),
    ],
)
def test_each_kind_of_problem_fails_a_script(values, kind):
    judgement = judge(seen(**values), None, [])
    assert judgement.verdict is Verdict.FAIL
    assert [problem.kind for problem in judgement.problems] == [kind]
    assert not judgement.acceptable
    assert judgement.label == "FAIL"
    assert judgement.reason


@pytest.mark.parametrize(
    "line",
    [
        "device isn't quiesced(LIVE) after quiesce_dev",
        "device isn't dead(LIVE) after killing daemon",
        "faile to recover to LIVE(DEAD)",
        "delete dev 2 failed",
        "/dev/ublkc2 isn't removed",
        "stress_05 failure: -t null -q 4",
        "__cmd_dev_add: command failed",
        "fail to add ublk dev -t null",
        "dd took 7 seconds to exit (>= 5s tolerance)! dd unexpectedly exited successfully!",
        "out_of_order: sector 8 started at seq 2 but completed at seq 1",
        "only 5 handled I/O! expected 6",
        "metadata_size 0 != 8",
        "kublk.c 12: assert!",
        "./test_null_01.sh: line 12: fio: command not found",
        "./test_null_01.sh: line 12:  1234 Segmentation fault      kublk add",
        "mount: /mnt: wrong fs type: No such device",
    ],
)
def test_what_the_scripts_and_their_tool_say_of_failures(line):
    assert complaints(f"fine\n{line}\n", []) == [line]


@pytest.mark.parametrize(
    "line",
    [
        PASSED,
        "PASS: Device transitioned to DEAD in 2s without hanging",
        "logical block larger than physical block",
        "SET_PARAMS returned -22",
        "dev id 0: nr_hw_queues 2 queue_depth 128 block size 512 dev_capacity 524288000",
    ],
)
def test_what_they_say_when_all_is_well(line):
    assert complaints(line, []) == []


def test_harmless_lines_are_harmless_to_the_letter():
    harmless = [r"^too many zones$"]
    assert complaints("too many zones\n", harmless) == []
    assert complaints("it can't open too many zones\n", harmless) == ["it can't open too many zones"]


def test_a_known_failure_is_accepted_with_its_reason():
    judgement = judge(seen(output=PASSED + "recover_03 failure: -t null\n"), KNOWN_FAILURE, [])
    assert judgement.verdict is Verdict.FAIL
    assert judgement.acceptable
    assert (judgement.label, judgement.reason) == ("known failure", "a reason")


@pytest.mark.parametrize(
    "values",
    [
        {"status": 255},
        {"residue": "nodes: /dev/ublkc0"},
        {"kernel_trouble": ["BUG: x"]},
        {"status": None, "blocked": "stacks"},
        {"status": None, "machine": "it ended"},
    ],
)
def test_a_known_failure_covers_no_other(values):
    judgement = judge(seen(**{"output": "recover_03 failure: x [PASS]", **values}), KNOWN_FAILURE, [])
    assert not judgement.acceptable
    assert judgement.label == "FAIL"


def test_a_known_failure_that_passes_is_told_and_accepted():
    judgement = judge(seen(), KNOWN_FAILURE, [])
    assert judgement.acceptable
    assert judgement.label == "pass, not expected"
    assert "a reason" in judgement.reason


def test_only_a_known_skip_is_accepted():
    skip = seen(status=4, output="Requires something newer\n")
    assert judge(skip, KNOWN_SKIP, []).acceptable
    unknown = judge(skip, None, [])
    assert not unknown.acceptable
    assert (unknown.label, unknown.reason) == ("SKIP", "Requires something newer")
    # A script that should fail and skips is not what is on record either.
    assert not judge(skip, KNOWN_FAILURE, []).acceptable


def test_the_table_of_known_outcomes_is_sound():
    kinds = {kind.value for kind in Kind}
    for entry in KNOWN:
        assert entry.verdict in ("fail", "skip")
        assert entry.reason
        assert set(entry.drivers) <= {"intree", "bundled"}
        assert set(entry.kinds) <= kinds
        assert bool(entry.kinds) == (entry.verdict == "fail")
        for driver in entry.drivers:
            assert expectation(entry.script, driver) is entry
    assert expectation("null_01", "intree") is None
    assert all(expression[0] == "^" and expression[-1] == "$" for script in HARMLESS for expression in harmless(script))


def test_requests_may_fail_only_where_a_script_makes_them_fail():
    assert kernel_lines("null_01") is None
    assert kernel_lines("generic_07") is None
    assert kernel_lines("stress_05") == kernel_lines("generic_06") == []
    assert kernel_lines("integrity_03")
