# SPDX-License-Identifier: MIT OR Apache-2.0
"""Python disks that say where their bytes lie; the engine moves them."""

import hashlib
import os
import signal
from pathlib import Path

import pytest
from support import fio
from support.backends import image
from support.blockio import Disk
from support.command import run
from support.features import has
from support.model import Model, exercise
from support.server import Child, Server

SIZE = 32 << 20
SNAPSHOT = "/opt/ublk/examples/snapshot.py:Snapshot"


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_bytes_never_enter_python(scratch: Path) -> None:
    file = image(scratch, SIZE)
    with Server("Whole", path=str(file), queues=2, depth=32) as server:
        expected = "auto-zero-copy" if has("AUTO_BUF_REG") else "zero-copy" if has("SUPPORT_ZERO_COPY") else "copy"
        assert server.ask("dev.data_movement") == expected
        with Disk(server.path, direct=True) as disk:
            # Once for reads, and once for writes.
            disk.write(0, disk.read(0, 4096))
            before = server.ask("dev.stats().entries")
            fio.verify(server.path, bs="4k", iodepth=32, size=8 << 20)
            fio.verify(server.path, bs="128k", iodepth=4, offset=8 << 20, size=8 << 20)
            assert server.ask("[dev.stats().entries, disk.asked, disk.handled]") == [before, 2, 0]
            model = Model(SIZE)
            model.data[:] = disk.read(0, SIZE)
            exercise(disk, model, unit=512, longest=1 << 18, steps=60, seed=7)
            assert hashlib.sha256(model.data).hexdigest() == digest(file)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "workers"),
    [("Halves", 4), ("TaskHalves", None), ("Returns", None), ("Returns", 4), ("TaskReturns", None)],
)
def test_a_part_of_the_requests_is_handled(kind: str, workers: int | None, scratch: Path) -> None:
    file = image(scratch, SIZE)
    with Server(kind, path=str(file), queues=2, depth=32, workers=workers) as server:
        fio.verify(server.path, bs="16k", iodepth=32, offset=12 << 20, size=8 << 20)
        with Disk(server.path, direct=True) as disk:
            model = Model(SIZE)
            model.data[:] = disk.read(0, SIZE)
            exercise(disk, model, unit=512, longest=1 << 18, steps=60, seed=9)
            assert hashlib.sha256(model.data).hexdigest() == digest(file)


def test_requests_are_put_together_from_pieces_of_several_files(scratch: Path) -> None:
    files = [image(scratch, 2 << 20, str(number)) for number in range(2)]
    with Server("Striped", paths=[str(file) for file in files], queues=2) as server:
        fio.verify(server.path, bs="64k", iodepth=16, size=2 << 20)
        with Disk(server.path, direct=True) as disk:
            model = Model(server.ask("dev.size"))
            model.data[:] = disk.read(0, len(model))
            exercise(disk, model, unit=512, longest=1 << 18, steps=60, seed=8)
            model.check(disk)
        stripes = [file.read_bytes() for file in files]
        for at in range(0, len(model), 8192):
            where = at // 8192
            assert model.data[at : at + 8192] == stripes[where % 2][where // 2 * 8192 :][:8192]


@pytest.mark.long
@pytest.mark.time_limit(150)
def test_a_snapshot_leaves_its_image_alone_and_is_found_again(python, scratch: Path, tmp_path: Path) -> None:
    file = image(scratch, SIZE)
    run(["mkfs.ext4", "-q", "-F", file])
    before = digest(file)
    changes = scratch / "changes"
    serve = [*python.argv, "run", SNAPSHOT, "-a", f"image={file}", "-a", f"changes={changes}", "-q", "2"]
    data = os.urandom(4 << 20)
    for turn in range(2):
        with Child(serve) as server:
            path = server.line()
            run(["mount", path, tmp_path])
            try:
                if turn == 0:
                    (tmp_path / "file").write_bytes(data)
                    run(["sync", "-f", tmp_path])
                assert (tmp_path / "file").read_bytes() == data
            finally:
                run(["umount", tmp_path])
            run(["e2fsck", "-f", "-n", path])
            server.signal(signal.SIGINT)
            assert server.wait() in (0, 130), server.log
    assert digest(file) == before
    assert changes.stat().st_blocks * 512 < SIZE


@pytest.mark.long
def test_a_snapshot_under_load_is_verified(python, scratch: Path) -> None:
    file = image(scratch, SIZE)
    before = digest(file)
    serve = [*python.argv, "run", SNAPSHOT, "-a", f"image={file}", "-a", f"changes={scratch / 'changes'}", "-q", "2"]
    with Child(serve) as server:
        path = server.line()
        fio.verify(path, rw="randwrite", bsrange="512-128k", bs_unaligned=0, iodepth=16, size=16 << 20)
        with Disk(path, direct=True) as disk:
            model = Model(SIZE)
            model.data[:] = disk.read(0, SIZE)
            exercise(disk, model, unit=512, longest=1 << 18, steps=80, seed=9)
            model.check(disk)
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130), server.log
    assert digest(file) == before


@pytest.mark.io_errors
def test_a_file_that_is_too_short_is_an_error_of_the_request(scratch: Path) -> None:
    file = image(scratch, SIZE)
    with Server("Whole", path=str(file)) as server, Disk(server.path, direct=True) as disk:
        os.truncate(file, SIZE // 2)
        with pytest.raises(OSError):
            disk.read(SIZE - 4096, 4096)
        assert disk.read(0, 4096) == bytes(4096)
