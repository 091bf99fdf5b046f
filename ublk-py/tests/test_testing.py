# SPDX-License-Identifier: MIT OR Apache-2.0

"""`ublk.testing`: files on disks without a kernel."""

import errno
import io
import os
import random
import threading
import time

import pytest

import ublk
from ublk import testing


class Ram(ublk.BlockDevice):
    def __init__(self, size=1 << 20, **shape):
        super().__init__(size=size, **shape)
        self.data = bytearray(size)
        self.lengths = []

    def read(self, offset, buf):
        self.lengths.append(len(buf))
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.lengths.append(len(buf))
        self.data[offset : offset + len(buf)] = buf


class Full(Ram):
    def __init__(self):
        super().__init__()
        self.flushed = 0

    def flush(self):
        self.flushed += 1

    def discard(self, offset, length):
        self.data[offset : offset + length] = b"\xdd" * length

    def write_zeroes(self, offset, length):
        self.data[offset : offset + length] = bytes(length)


def test_it_is_a_file():
    with testing.open(Ram()) as file:
        assert (file.seekable(), file.readable(), file.writable()) == (True, True, True)
        assert file.write(b"abc" * 512) == 1536
        assert file.tell() == 1536
        assert file.seek(-512, os.SEEK_CUR) == 1024
        assert file.read(3) == b"bca"
        assert file.seek(0, os.SEEK_END) == file.size == 1 << 20
        assert file.read(1) == b""
        assert io.BufferedReader(file).seek(1) == 1
    assert file.closed


def test_ranges_of_any_kind_are_those_of_plain_memory():
    chance = random.Random(7)
    disk, model = Ram(block_size=4096), bytearray(1 << 20)
    with testing.open(disk, queues=2) as file:
        for _ in range(200):
            offset = chance.randrange(len(model))
            length = chance.randrange(min(20000, len(model) - offset))
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                file.pwrite(offset, data)
                model[offset : offset + length] = data
            else:
                assert file.pread(offset, length) == model[offset : offset + length]
    assert disk.data == model
    assert all(length % 4096 == 0 for length in disk.lengths)


def test_what_is_longer_than_a_request_becomes_several():
    disk = Ram(max_io_bytes=65536)
    with testing.open(disk) as file:
        file.pwrite(0, bytes(200_704))
    assert disk.lengths == [65536, 65536, 65536, 4096]


def test_errors_are_those_of_the_request():
    class Broken(Ram):
        def read(self, offset, buf):
            raise OSError(errno.EILSEQ, "wrong checksum")

    with testing.open(Broken()) as file, pytest.raises(OSError) as raised:
        file.read(512)
    assert raised.value.errno == errno.EILSEQ


def test_operations_are_those_of_the_class():
    disk = Full()
    with testing.open(disk) as file:
        file.pwrite(0, b"x" * 4096)
        file.flush()
        file.discard(512, 512)
        file.write_zeroes(1024, 512)
        assert disk.data[:2048] == b"x" * 512 + b"\xdd" * 512 + bytes(512) + b"x" * 512
        with pytest.raises(OSError) as raised:
            file.discard(1, 512)
        assert raised.value.errno == errno.EINVAL
    assert disk.flushed == 2
    with testing.open(Ram()) as file:
        file.pwrite(0, b"x" * 4096)
        file.write_zeroes(512, 512)
        assert file.pread(0, 1024) == b"x" * 512 + bytes(512)
        with pytest.raises(OSError) as raised:
            file.discard(0, 512)
        assert raised.value.errno == errno.EOPNOTSUPP


def test_beyond_the_end_is_no_disk():
    with testing.open(Ram()) as file:
        file.seek(0, os.SEEK_END)
        with pytest.raises(OSError) as raised:
            file.write(b"x")
        assert raised.value.errno == errno.ENOSPC


def test_a_read_only_disk_is_not_written_to():
    with testing.open(Ram(read_only=True)) as file:
        assert not file.writable()
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")


def test_a_disk_of_any_style_is_a_file():
    class Tasks(ublk.BlockDevice):
        async def read(self, offset, buf):
            buf[:] = b"t" * len(buf)

    class Batches(ublk.BlockDevice):
        def handle(self, requests):
            for request in requests:
                request.buffer[:] = b"b" * request.length
                request.complete()

    with testing.open(Tasks(size=4096)) as file:
        assert file.read(512) == b"t" * 512
        assert not file.writable()
    with testing.open(Batches(size=4096)) as file:
        assert file.read(512) == b"b" * 512


def test_threads_write_parts_of_one_block():
    class Slow(Ram):
        def read(self, offset, buf):
            super().read(offset, buf)
            time.sleep(0.01)

    with testing.open(Slow(), workers=4) as file:
        threads = [threading.Thread(target=file.pwrite, args=(n * 64, bytes([65 + n]) * 64)) for n in range(7)]
        # A whole block that is written, and one that is zeroed, beside parts of them.
        threads.append(threading.Thread(target=file.pwrite, args=(448, b"H" * 1088)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert file.pread(0, 1536) == b"".join(bytes([65 + n]) * 64 for n in range(7)) + b"H" * 1088


def test_a_part_of_a_block_reads_the_block_once():
    disk = Ram()
    with testing.open(disk) as file:
        file.pwrite(100, b"x" * 10)
        assert disk.lengths == [512, 512]
        file.pwrite(500, b"x" * 24)
        assert disk.lengths == [512, 512, 512, 512, 1024]
        assert file.pread(0, 1024) == bytes(100) + b"x" * 10 + bytes(390) + b"x" * 24 + bytes(500)


@pytest.mark.parametrize("operation", ["discard", "write_zeroes"])
@pytest.mark.parametrize("length", [0, 512, (2 << 40) - 512, 2 << 40, (4 << 40) + 512])
def test_lengths_beyond_32_bits_of_sectors_become_several_requests(operation, length):
    class Large(ublk.BlockDevice):
        def read(self, offset, buf):
            buf[:] = bytes(len(buf))

        def write(self, offset, buf):
            pass

        def discard(self, offset, length):
            seen.append((offset, length))

        write_zeroes = discard

    seen = []
    with testing.open(Large(size=1 << 50)) as file:
        getattr(file, operation)(4096, length)
    at = 4096
    for offset, part in seen:
        assert offset == at
        assert 0 < part < 2 << 40
        at += part
    assert at == 4096 + length


def test_a_file_whose_device_cannot_be_stopped_stays_open():
    class Closes(Ram):
        def read(self, offset, buf):
            with pytest.raises(RuntimeError, match="own device"):
                self.file.close()
            super().read(offset, buf)

    disk = Closes()
    disk.file = testing.open(disk)
    disk.file.pread(0, 512)
    assert not disk.file.closed
    disk.file.close()
    assert disk.file.closed
    assert not disk.file.device.running


def test_bytes_that_a_handler_does_not_fill_are_poison():
    class Forgets(Ram):
        def read(self, offset, buf):
            if offset < 4096:
                super().read(offset, buf)

    class Requests(ublk.BlockDevice):
        def handle(self, requests):
            for request in requests:
                if request.op == "write":
                    assert bytes(request.buffer) == b"password" * 64
                else:
                    assert len(request.buffer) == request.length
                request.complete()

    for disk, options in ((Forgets(), {}), (Forgets(), {"workers": 1}), (Requests(size=1 << 20), {})):
        with testing.open(disk, depth=1, **options) as file:
            for _ in range(3):
                file.pwrite(0, b"password" * 64)
                assert file.pread(8192, 512) == bytes([testing.POISON]) * 512


def test_positions_are_those_of_any_file():
    with testing.open(Ram()) as file:
        with pytest.raises(ValueError, match="whence"):
            file.seek(0, 9)
        file.seek(2 << 20)
        assert file.read(1) == b""
        assert file.read() == b""


def test_a_power_cut_flushes_nothing():
    disk = Full()
    with pytest.raises(RuntimeError, match="power cut"), testing.open(disk) as file:
        file.pwrite(0, b"x" * 512)
        raise RuntimeError("power cut")
    assert (disk.flushed, file.closed, file.device.running) == (0, True, False)
    file = testing.open(disk)
    file.abort()
    file.abort()
    file.close()
    assert disk.flushed == 0
    testing.open(disk).close()
    assert disk.flushed == 1


def test_options_are_numbers_by_index():
    class Number:
        def __index__(self):
            return 2

    class Disk(ublk.BlockDevice):
        def read(self, offset, buf):
            buf[:] = bytes(len(buf))

    two = Number()
    with testing.open(Disk(size=1 << 20), queues=two, depth=two, id=two, workers=two, coalesce_usecs=two) as file:
        assert (file.device.queues, file.device.depth, file.device.id) == (2, 2, 2)
        assert file.pread(0, 512) == bytes(512)


def test_a_flush_of_a_disk_that_has_ended_fails():
    class Dies(ublk.BlockDevice):
        def read(self, offset, buf): ...

        def write(self, offset, buf):
            raise SystemExit

        def flush(self): ...

    file = testing.open(Dies(size=1 << 20))
    with pytest.raises(OSError):
        file.pwrite(0, bytes(512))
    with pytest.raises(SystemExit):
        file.device.wait(10)
    with pytest.raises(OSError) as caught:
        file.flush()
    assert caught.value.errno == errno.ENODEV
    file.close()
