# SPDX-License-Identifier: MIT OR Apache-2.0
"""A handler's buffer is valid for one request. What Python makes of it and keeps is its own memory."""

import random

import pytest
from support.blockio import Disk
from support.model import Model, exercise
from support.server import Server


def test_what_a_handler_gets() -> None:
    with Server("Describes") as server, Disk(server.path, direct=True) as disk:
        disk.write(512, bytes(1536))
        disk.read(1024, 4096 + 512)
        common = {"type": "memoryview", "format": "B", "itemsize": 1, "ndim": 1, "contiguous": True, "offset": "int"}
        assert server.ask("disk.seen") == {
            "write": common | {"readonly": True, "length": 1536},
            "read": common | {"readonly": False, "length": 4608},
        }


@pytest.mark.short
def test_a_kept_view_raises_after_the_request() -> None:
    with Server("KeepsViews") as server, Disk(server.path, direct=True) as disk:
        server.ask("disk.views.clear()")
        for index in range(4):
            disk.write(index * 4096, bytes([index]) * 4096)
            disk.read(index * 4096, 4096)
        assert server.ask("disk.touch()") == ["ValueError"] * 8


@pytest.mark.parametrize(
    "how", ["numpy", pytest.param("slice", marks=pytest.mark.long), pytest.param("cast", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("operation", ["read", "write"])
def test_what_was_kept_never_sees_another_request(how: str, operation: str) -> None:
    # One tag only: its memory would be used again by the very next request.
    with Server("KeepsExports", how=how, depth=1) as server, Disk(server.path, direct=True) as disk:
        numbers = random.Random(50)
        model = Model(disk.size)
        model.write(disk, 0, numbers.randbytes(disk.size))
        server.ask("disk.let_go()")
        for index in range(16):
            if operation == "read":
                model.check(disk, index * 4096, 4096)
            else:
                model.write(disk, index * 4096, numbers.randbytes(4096))
        assert server.ask("len(disk.kept)") == 16
        server.ask("setattr(disk, 'keeping', False)")
        exercise(disk, model, unit=512, longest=65536, steps=60, seed=51)
        assert server.ask("disk.changed()") == 0


def test_writing_to_what_was_kept_changes_no_other_request() -> None:
    with Server("KeepsExports", how="numpy", depth=2) as server, Disk(server.path, direct=True) as disk:
        numbers = random.Random(52)
        model = Model(disk.size)
        model.write(disk, 0, numbers.randbytes(disk.size))
        server.ask("disk.let_go()")
        for index in range(8):
            model.check(disk, index * 4096, 4096)
        assert server.ask("disk.writable()") == [True] * 8
        for _ in range(5):
            assert server.ask("disk.scribble()") >= 8
            model.check(disk, 0, 65536)
            model.write(disk, 65536, numbers.randbytes(65536))
        model.check(disk)


def test_what_was_kept_of_a_write_is_read_only() -> None:
    with Server("KeepsExports", how="numpy") as server, Disk(server.path, direct=True) as disk:
        server.ask("disk.let_go()")
        disk.write(0, bytes(4096))
        assert server.ask("disk.writable()") == [False]


def test_what_was_kept_survives_the_device() -> None:
    with Server("KeepsExports", how="numpy") as server:
        with Disk(server.path, direct=True) as disk:
            server.ask("disk.let_go()")
            disk.write(0, b"\x3a" * 65536)
            disk.read(0, 65536)
            server.ask("setattr(disk, 'keeping', False)")
        server.ask("dev.stop()")
        assert server.ask("disk.changed()") == 0
        assert server.ask("disk.scribble()") == 1
        server.ask("disk.let_go()")


def test_memory_that_was_let_go_is_given_back() -> None:
    with Server("KeepsExports", how="numpy", size=4 << 20) as server, Disk(server.path, direct=True) as disk:
        page = 4096

        def resident() -> int:
            with open(f"/proc/{server.pid}/statm") as file:
                return int(file.read().split()[1]) * page

        def read_everything() -> None:
            for offset in range(0, 4 << 20, 256 << 10):
                disk.read(offset, 256 << 10)

        read_everything()
        server.ask("disk.let_go()")
        before = resident()
        for _ in range(8):
            read_everything()
        kept = resident()
        assert server.ask("len(disk.kept)") >= 8 * 16
        # The copies that the disk compares with are freed as well.
        server.ask("disk.let_go()")
        for _ in range(3):
            read_everything()
            server.ask("disk.let_go()")
        after = resident()
        assert kept - before >= 8 * (4 << 20), (before, kept, after)
        assert after - before <= 16 << 20, (before, kept, after)
