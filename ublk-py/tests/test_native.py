# SPDX-License-Identifier: MIT OR Apache-2.0

"""Disks that the engine serves without Python."""

import errno
import os

import pytest

import ublk
from ublk import testing

SIZE = 1 << 20


def test_a_ram_disk_keeps_its_content_for_as_long_as_the_object_lives():
    disk = ublk.Mem(SIZE)
    with testing.open(disk, queues=2) as file:
        file.pwrite(1000, b"x" * 1000)
        file.write_zeroes(1024, 512)
    with testing.open(disk) as file:
        assert file.pread(1000, 1000) == b"x" * 24 + bytes(512) + b"x" * 464
        assert file.device.stats().entries == 0


def test_a_null_disk_takes_everything():
    with testing.open(ublk.Null(1 << 40, block_size=4096)) as file:
        assert (file.size, file.device.block_size) == (1 << 40, 4096)
        file.pwrite(1 << 39, bytes(4096))


def test_a_file_disk_is_its_file(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"f" * SIZE)
    disk = ublk.File(path, direct=False)
    with testing.open(disk) as file:
        file.pwrite(4096, b"g" * 512)
        file.flush()
        assert file.pread(4096, 1024) == b"g" * 512 + b"f" * 512
        with pytest.raises(ublk.UblkError, match="another") as raised:
            ublk.File(path)
        assert raised.value.errno in (errno.EBUSY, errno.EAGAIN)
    assert path.read_bytes()[4096:5120] == b"g" * 512 + b"f" * 512
    del disk, file
    read_only = ublk.File(path, read_only=True)
    with testing.open(read_only) as file:
        assert read_only.read_only
        assert not file.writable()


def test_a_zoned_disk_has_zones(driver):
    disk = ublk.Zoned(SIZE, zone_size=1 << 18, max_open_zones=2)
    assert (disk.size, disk.block_size) == (SIZE, 4096)
    with disk.start() as device:
        assert device.size == SIZE


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: ublk.Mem(1000), ValueError),
        (lambda: ublk.Mem(-1), OverflowError),
        (lambda: ublk.Null(SIZE, block_size=1000), ValueError),
        (lambda: ublk.File("/nonexistent/disk.img"), ublk.UblkError),
        (lambda: ublk.Zoned(SIZE, zone_size=0), ValueError),
        (lambda: ublk.Zoned(SIZE, zone_size=1000), ValueError),
        (lambda: ublk.Null(SIZE).start(recoverable="x"), ValueError),
    ],
)
def test_what_cannot_be_is_refused(make, kind):
    with pytest.raises(kind):
        make()


@pytest.mark.parametrize("recoverable", [True, "queue", "reissue", "fail-io"])
@pytest.mark.parametrize(
    "make", [lambda: ublk.Mem(SIZE), lambda: ublk.Zoned(SIZE, zone_size=SIZE)], ids=["mem", "zoned"]
)
def test_a_disk_in_memory_cannot_be_recoverable(driver, make, recoverable):
    with pytest.raises(ValueError, match="in this process's memory and is lost with it"):
        make().start(recoverable=recoverable)


def test_a_disk_in_files_can_be_recoverable(driver, tmp_path):
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    (tmp_path / "zones").mkdir()
    for disk in (ublk.File(tmp_path / "disk.img"), ublk.Zoned(SIZE, zone_size=SIZE, directory=tmp_path / "zones")):
        with disk.start(recoverable=True) as device:
            assert device.recovery == "reissue"


def test_a_disk_in_memory_takes_no_other_disk_over(driver):
    with ublk.Null(SIZE).start(recoverable=True) as device:
        device.quiesce()
        with pytest.raises(ValueError, match="in this process's memory"):
            ublk.recover(device.id, ublk.Mem(SIZE))
        device = ublk.recover(device.id, ublk.Null(SIZE))
        device.stop()


def test_it_takes_a_disk_over_from_python_and_gives_it_back(driver):
    class Ram(ublk.BlockDevice):
        def read(self, offset, buf):
            buf[:] = b"p" * len(buf)

        def write(self, offset, buf): ...

        def flush(self): ...

    device = Ram(size=SIZE).start(recoverable=True)
    device.quiesce()
    with pytest.raises(ValueError, match="native disk"):
        ublk.recover(device.id, ublk.Null(SIZE), workers=2)
    device = ublk.recover(device.id, ublk.Null(SIZE))
    assert driver.read(device.id, 0, 512) != b"p" * 512
    device.quiesce()
    with ublk.recover(device.id, Ram(size=SIZE)) as device:
        assert driver.read(device.id, 0, 512) == b"p" * 512


def test_a_file_that_took_the_name_does_not_let_a_disk_grow(driver, tmp_path):
    path, other = tmp_path / "disk.img", tmp_path / "other.img"
    path.write_bytes(bytes(SIZE))
    other.write_bytes(bytes(4 * SIZE))
    with ublk.File(path).start() as device:
        os.rename(other, path)
        with pytest.raises(ValueError, match="exceeds the backing store"):
            device.resize(4 * SIZE)
        os.unlink(path)
        device.resize(SIZE)


@pytest.mark.parametrize("kind", ["mem", "file"])
def test_a_disk_does_not_grow_beyond_what_it_has(driver, tmp_path, kind):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    disk = ublk.Mem(1 << 20) if kind == "mem" else ublk.File(path)
    with disk.start() as dev:
        with pytest.raises(ValueError, match="exceeds the backing store"):
            dev.resize(2 << 20)
        dev.resize(1 << 19)
        dev.resize(1 << 20)
        if kind == "file":
            os.truncate(path, 2 << 20)
            dev.resize(2 << 20)
            assert dev.size == 2 << 20


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_a_file_that_was_resized_is_served_with_that_size_again(driver, tmp_path, size):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    disk = ublk.File(path)
    old = disk.start(recoverable=True)
    os.truncate(path, max(size, SIZE))
    old.resize(size)
    old.quiesce()

    def use_the_end(device):
        assert device.size == size
        driver.write(device.id, size - 512, b"x" * 512)
        assert driver.read(device.id, size - 512, 512) == b"x" * 512

    with ublk.recover(old.id, disk) as device:
        use_the_end(device)
    with disk.start() as device:
        use_the_end(device)


def replace(path):
    """Replace a file or directory by an empty one of its kind, as a restore that ends with a rename."""
    new = path.with_name("restored")
    new.mkdir() if path.is_dir() else new.write_bytes(bytes(SIZE))
    path.rename(path.with_name("old"))
    new.rename(path)


STORED = {
    "file": lambda path: ublk.File(path, direct=False),
    "zoned": lambda path: ublk.Zoned(SIZE, zone_size=1 << 18, directory=path),
}


@pytest.mark.parametrize(("kind", "resized"), [("file", False), ("file", True), ("zoned", False)])
def test_a_file_that_replaced_the_disks_file_is_not_recovered(driver, tmp_path, kind, resized):
    path = tmp_path / "disk"
    path.mkdir() if kind == "zoned" else path.write_bytes(bytes(SIZE))
    old = STORED[kind](path)
    device = old.start(recoverable=True)
    driver.write(device.id, 0, b"acknowledged".ljust(4096, b"\0"))
    if resized:
        device.resize(SIZE // 2)
    device.quiesce()
    replace(path)
    new = STORED[kind](path)
    new.size = old.size
    with pytest.raises(ValueError, match=r"another file has taken its name.*accept_replaced=True"):
        ublk.recover(device.id, new)
    # The disk's own file has another name by now.
    device = ublk.recover(device.id, old)
    assert driver.read(device.id, 0, 4096).startswith(b"acknowledged")
    device.quiesce()
    with ublk.recover(device.id, new, accept_replaced=True):
        assert driver.read(device.id, 0, 4096) == bytes(4096)


def test_a_disk_of_python_is_recovered_as_a_file(driver, tmp_path):
    class Ram(ublk.BlockDevice):
        def read(self, offset, buf):
            buf[:] = bytes(len(buf))

    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    device = Ram(size=SIZE, read_only=True).start(recoverable=True)
    device.quiesce()
    ublk.recover(device.id, ublk.File(path, read_only=True)).stop()
