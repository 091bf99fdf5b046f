# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is written is what is read, on every kind of disk that stores data."""

import errno
import os
import random
from pathlib import Path

import pytest
from support import backends, fio, sysfs
from support.backends import SIZE, Backend
from support.blockio import PAGE, SECTOR, Disk, error_of, together
from support.command import run
from support.model import Model, compare, exercise

SHORT = {backends.MEM, backends.PYTHON_RAM}

every_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, id=b.name, marks=[pytest.mark.short] if b in SHORT else []) for b in backends.ALL],
)
# One of each way in which bytes move.
each_way = pytest.mark.parametrize(
    "backend", [backends.MEM, backends.FILE_DIRECT, backends.FILE_BUFFERED, backends.PYTHON_RAM], ids=repr
)


@every_backend
def test_random_direct_io_matches_a_model(backend: Backend, scratch: Path) -> None:
    with backend.serve(scratch) as served, Disk(served.path, direct=True) as disk:
        exercise(disk, Model(SIZE), unit=served.unit, longest=served.longest, steps=250, seed=1, zeroing=True)


@every_backend
def test_random_buffered_io_matches_a_model(backend: Backend, scratch: Path) -> None:
    with backend.serve(scratch) as served, Disk(served.path, direct=False) as disk:
        # Through the page cache any byte can be addressed.
        exercise(disk, Model(SIZE), unit=1, longest=100_001, steps=250, seed=2)


@each_way
def test_every_size_from_a_sector_to_beyond_the_longest_request(backend: Backend, scratch: Path) -> None:
    numbers = random.Random(3)
    with backend.serve(scratch) as served, Disk(served.path, direct=True) as disk:
        assert sysfs.number(served.path, "queue/max_sectors_kb") << 10 == served.longest
        model = Model(SIZE)
        for length in [512, 1024, 1536, 3584, 4096, 4608, 65536, 65536 + 512, 512 << 10, (512 << 10) + 512, 2 << 20]:
            # Neither the place on the disk nor the memory is aligned to pages.
            offset = 3 * PAGE + 512
            model.write(disk, offset, numbers.randbytes(length), skew=512)
            model.check(disk, offset - 512, length + 1024, step=4 << 20, skew=1024)


@each_way
def test_the_last_sector_is_part_of_the_disk_and_the_next_is_not(backend: Backend, scratch: Path) -> None:
    last = SIZE - SECTOR
    data = random.Random(4).randbytes(SECTOR)
    with backend.serve(scratch) as served, Disk(served.path, direct=True) as disk:
        assert disk.size == SIZE
        disk.write(last, data)
        compare(disk.read(last, SECTOR), data, last)
        assert disk.read(SIZE, SECTOR) == b""
        compare(disk.read(last, 2 * SECTOR), data, last)
        assert error_of(lambda: disk.write(SIZE, data)) == errno.ENOSPC
        compare(disk.read(last, SECTOR), data, last)


@each_way
def test_buffered_writes_reach_the_disk_by_fsync(backend: Backend, scratch: Path) -> None:
    numbers = random.Random(5)
    model = Model(SIZE)
    with backend.serve(scratch) as served, Disk(served.path, direct=False) as disk:
        for _ in range(40):
            length = numbers.randint(1, 30_000)
            model.write(disk, numbers.randint(0, SIZE - length), numbers.randbytes(length))
        disk.sync()
        # Before anything is closed or dropped.
        with Disk(served.path, direct=True) as direct:
            model.check(direct)


@each_way
def test_two_queues_give_one_disk(backend: Backend, scratch: Path) -> None:
    half = SIZE // 2
    with backend.serve(scratch, queues=2) as served:
        queues = sysfs.queue_cpus(served.path)
        assert len(queues) == 2, f"a queue has no CPU: {queues}"
        assert all(queues), f"a queue has no CPU: {queues}"
        model = Model(SIZE)
        with Disk(served.path, direct=True) as disk:

            def work(start: int, seed: int) -> None:
                exercise(disk, model, unit=512, longest=128 << 10, steps=100, seed=seed, start=start, end=start + half)

            together([lambda: work(0, 6), lambda: work(half, 7)], cpus=[min(queues[0]), min(queues[1])], seconds=50)
            # Each half read by way of the other queue.
            together(
                [lambda: model.check(disk, half, half), lambda: model.check(disk, 0, half)],
                cpus=[min(queues[0]), min(queues[1])],
            )


@pytest.mark.long
@each_way
@pytest.mark.parametrize("depth", [1, 2, 128])
def test_parallel_writes_are_verified_at_every_depth(backend: Backend, depth: int, scratch: Path) -> None:
    with backend.serve(scratch, depth=depth) as served:
        job = fio.verify(served.path, bsrange="512-64k", iodepth=2 * depth, size=SIZE, verify_interval=512)
        assert job["write"]["io_bytes"] == SIZE
        assert job["read"]["io_bytes"] == SIZE


@pytest.mark.parametrize("backend", [backends.MEM, backends.PYTHON_RAM], ids=repr)
def test_the_driver_s_deepest_queue_works(backend: Backend, scratch: Path) -> None:
    with backend.serve(scratch, depth=4096) as served:
        assert sysfs.number(served.path, "mq/0/nr_tags") == 4096
        job = fio.verify(served.path, bs="512", iodepth=4096, size=4 << 20)
        assert job["write"]["total_ios"] == (4 << 20) // 512


@each_way
def test_zeroing_a_range_leaves_its_neighbours(backend: Backend, scratch: Path) -> None:
    numbers = random.Random(8)
    with backend.serve(scratch) as served, Disk(served.path, direct=True) as disk:
        model = Model(SIZE)
        model.write(disk, 0, numbers.randbytes(SIZE))
        for zero, offset, length in [
            (disk.punch, 512, 512),
            (disk.punch, 5 * PAGE + 512, 3 * PAGE),
            (disk.zero_range, (1 << 20) - 512, 1 << 20),
            (disk.zero_range, SIZE - 512, 512),
            (disk.punch, (4 << 20) + 512, 2 << 20),
        ]:
            zero(offset, length)
            model.zero(offset, length)
        model.check(disk)


@each_way
def test_blkdiscard_zeroout(backend: Backend, scratch: Path) -> None:
    with backend.serve(scratch) as served, Disk(served.path, direct=True) as disk:
        model = Model(SIZE)
        model.write(disk, 0, random.Random(9).randbytes(SIZE))
        run(["blkdiscard", "--zeroout", "--offset", "1536", "--length", str(3 << 20), served.path])
        model.zero(1536, 3 << 20)
        model.check(disk)


@each_way
def test_a_discarded_range_reads_as_zeros_and_its_neighbours_stay(backend: Backend, scratch: Path) -> None:
    # What a discarded range holds is up to the disk; all of these promise zeros.
    with backend.serve(scratch) as served, Disk(served.path, direct=True) as disk:
        model = Model(SIZE)
        model.write(disk, 0, random.Random(10).randbytes(SIZE))
        run(["blkdiscard", "--offset", str(1 << 20), "--length", str(2 << 20), served.path])
        model.zero(1 << 20, 2 << 20)
        model.check(disk)
        run(["blkdiscard", served.path])
        model.zero(0, SIZE)
        model.check(disk)


@each_way
def test_durable_writes_are_readable_at_once(backend: Backend, scratch: Path) -> None:
    numbers = random.Random(11)
    with backend.serve(scratch) as served, Disk(served.path, direct=True) as disk:
        model = Model(SIZE)
        for length in [512, PAGE, 65536 + 512, 1 << 20]:
            offset = 512 * numbers.randint(0, (SIZE - length) // 512)
            data = numbers.randbytes(length)
            disk.write_durably(offset, data)
            model.data[offset : offset + length] = data
        model.check(disk)


def test_a_new_ram_disk_is_full_of_zeros(native_disk) -> None:
    path = native_disk("-t", "mem", "--size", "4M")
    with Disk(path, direct=True) as disk:
        compare(disk.read(0, 4 << 20), bytes(4 << 20))


def test_a_ram_disk_gives_discarded_memory_back(native_disk, native) -> None:
    # A shallow queue, because its buffers count as well.
    path = native_disk("-t", "mem", "--size", "64M", "-d", "2")
    pid = native.info(path)["pid"]

    def resident() -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE

    before = resident()
    with Disk(path, direct=True) as disk:
        for offset in range(0, 64 << 20, 1 << 20):
            disk.write(offset, os.urandom(1 << 20))
    full = resident()
    run(["blkdiscard", path])
    after = resident()
    assert full - before >= 60 << 20, (before, full, after)
    assert after - before <= 8 << 20, (before, full, after)
