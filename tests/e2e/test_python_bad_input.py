# SPDX-License-Identifier: MIT OR Apache-2.0
"""The Python library refuses what cannot be, by the right exception, and leaves nothing behind."""

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from support.command import NOBODY, run
from support.face import Face
from support.server import HERE
from test_bad_input import no_driver  # noqa: F401 (a fixture)

pytestmark = pytest.mark.long

PROGRAM = """
import json, sys
sys.path.insert(0, {here!r})
import ublk
from disks import *
for statement in {statements!r}:
    try:
        eval(statement)
    except BaseException as error:
        number = getattr(error, "errno", None)
        print(json.dumps([type(error).__name__, isinstance(error, OSError), number, str(error)]))
    else:
        print(json.dumps(["", False, None, ""]))
"""

Raised = tuple[str, bool, int | None, str]


def raised_by(statements: Iterable[str], **options: Any) -> list[Raised]:
    """What each statement raises: the class, whether it is an OSError, its errno and its text."""
    program = PROGRAM.format(here=str(HERE), statements=list(statements))
    result = run([sys.executable, "-c", program], **options)
    return [tuple(json.loads(line)) for line in result.out.splitlines()]


def raised(statement: str, **options: Any) -> Raised:
    (only,) = raised_by([statement], **options)
    return only


IMPOSSIBLE = {
    "Ram(size=0).start()": ["size", "0"],
    "Ram(size=1000).start()": ["size", "1000", "512"],
    "Ram(size=1 << 20, block_size=513).start()": ["block size|block_size", "513"],
    "Ram(size=1 << 20, block_size=256).start()": ["block size|block_size", "256"],
    "Ram(size=1 << 20, block_size=8192).start()": ["block size|block_size", "8192"],
    "Ram(size=1 << 20, block_size=0).start()": ["block size|block_size", "0"],
    "Ram(size=1 << 20, physical_block_size=3000).start()": ["3000"],
    "Ram(size=1 << 20, max_io_bytes=1000).start()": ["1000"],
    "Ram(size=1 << 20, max_io_bytes=64 << 20).start()": [str(64 << 20)],
    "Ram().start(depth=0)": ["depth", "0", "4096"],
    "Ram().start(depth=4097)": ["depth", "4097", "4096"],
    "Ram().start(queues=0)": ["queues", "0"],
    "Ram().start(queues=5000)": ["queues", "5000"],
    "Ram().start(id=-1)": ["id", "-1"],
    "Ram().start(id=1 << 20)": ["id", "1048576"],
    "ReadOnly(size=-512).start()": ["size", "-512"],
    "ReadOnly(size=1 << 70).start()": ["size"],
}


def test_an_impossible_value_is_a_value_error() -> None:
    found = raised_by(IMPOSSIBLE)
    assert {statement: kind for statement, (kind, *_) in zip(IMPOSSIBLE, found, strict=True)} == dict.fromkeys(
        IMPOSSIBLE, "ValueError"
    )
    for (statement, words), (*_, text) in zip(IMPOSSIBLE.items(), found, strict=True):
        for word in words:
            assert any(part in text for part in word.split("|")), f"{statement}: {word!r} is not in {text!r}"


WRONG_TYPE = {
    "NotReadable().start()": "read",
    "ReadOnly(size='1M').start()": "size",
    "ReadOnly(size=1.5e6).start()": "size",
    "Ram().start(depth='8')": "depth",
    "Ram().start(queues=None)": "queues",
    "Ram().start(id=1.5)": "id",
    "Ram().start(colour='red')": "colour",
    "ublk.Device()": "start",
}


def test_a_wrong_type_is_a_type_error() -> None:
    found = raised_by(WRONG_TYPE)
    for (statement, word), (kind, _, _, text) in zip(WRONG_TYPE.items(), found, strict=True):
        assert kind == "TypeError", (statement, kind, text)
        assert word in text, (statement, text)


def test_a_class_that_forgets_its_super_init_is_told_so() -> None:
    kind, _, _, text = raised("type('Forgets', (Ram,), {'__init__': lambda self: None})().start()")
    assert kind in ("TypeError", "AttributeError", "RuntimeError"), (kind, text)
    assert "__init__" in text, (kind, text)


def test_an_id_in_use_is_eexist_and_the_owner_does_not_notice(native: Face) -> None:
    path = native.add("-t", "null", "-n", "5")
    before = native.list()
    kind, is_os_error, number, text = raised("Ram().start(id=5)")
    assert (kind, is_os_error, number) == ("UblkError", True, 17), (kind, text)
    assert "5" in text
    assert native.list() == before
    native.run("del", "-n", "5")
    assert not os.path.exists(path)


@pytest.mark.parametrize("statement", ["Ram().start()", "ublk.features()", "ublk.devices()"])
def test_a_missing_driver_is_enoent_and_says_what_to_do(no_driver: None, statement: str) -> None:  # noqa: F811
    kind, is_os_error, number, text = raised(statement)
    assert (kind, is_os_error, number) == ("UblkError", True, 2), (kind, text)
    assert "/dev/ublk-control" in text
    assert "modprobe ublk_drv" in text


@pytest.mark.parametrize("statement", ["Ram().start()", "ublk.features()"])
def test_no_permission_is_eacces_and_says_why(statement: str) -> None:
    kind, is_os_error, number, text = raised(statement, cwd="/", **NOBODY)
    assert (kind, is_os_error, number) == ("UblkError", True, 13), (kind, text)
    assert "/dev/ublk-control" in text
    assert "root" in text or "CAP_SYS_ADMIN" in text


def test_a_disk_without_read_is_refused_before_anything_is_made(native: Face) -> None:
    assert raised("NotReadable().start()")[0] == "TypeError"
    assert native.list() == []


def test_after_a_failed_start_the_next_one_works(native: Face) -> None:
    kind, _, _, text = raised("[caught(lambda: Ram().start(depth=0)), Ram(size=1 << 20).start(id=0).stop()]")
    assert kind == "", text
    assert native.list() == []


def test_the_package_can_be_imported_without_a_driver(no_driver: None) -> None:  # noqa: F811
    assert raised("ublk.BlockDevice(size=512)") == ("", False, None, "")
