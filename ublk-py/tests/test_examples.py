# SPDX-License-Identifier: MIT OR Apache-2.0

"""The examples keep data, each in its own way."""

import hashlib
import http.server
import importlib.util
import os
import random
import threading
from pathlib import Path

import pytest

from ublk import testing

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = 1 << 20


def load(name):
    """Import an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exercise(disk, content=None, **options):
    """Write and read at random, and compare with plain memory."""
    chance, model = random.Random(5), bytearray(content or bytes(SIZE))
    with testing.open(disk, **options) as file:
        assert file.pread(0, SIZE) == model
        for _ in range(60):
            offset = chance.randrange(SIZE)
            length = chance.randrange(min(100_000, SIZE - offset) + 1)
            if chance.random() < 0.6:
                model[offset : offset + length] = data = chance.randbytes(length)
                file.pwrite(offset, data)
            else:
                assert file.pread(offset, length) == model[offset : offset + length]
        file.flush()
        assert file.pread(0, SIZE) == model
    return model


@pytest.mark.parametrize(
    ("example", "name"),
    [
        ("ramdisk", "RamDisk"),
        ("batches", "Batches"),
        ("compressed", "Compressed"),
        ("numpy_disk", "Flipped"),
    ],
)
def test_a_disk_in_memory_keeps_data(example, name):
    exercise(getattr(load(example), name)(SIZE), queues=2)


def test_the_file_is_the_disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(content := os.urandom(SIZE))
    model = exercise(load("file").FileDisk(path), content)
    assert path.read_bytes() == model


def test_compressed_blocks_are_small_and_gone_when_discarded():
    disk = load("compressed").Compressed(SIZE)
    with testing.open(disk) as file:
        file.pwrite(0, b"x" * 200_000)
        assert len(disk.blocks) == 4
        assert sum(map(len, disk.blocks.values())) < 4096
        file.discard(65536, 65536)
        assert len(disk.blocks) == 3
        assert file.pread(65536, 65536) == bytes(65536)


def test_the_encrypted_file_shows_nothing_and_is_readable_with_its_key(tmp_path):
    pytest.importorskip("cryptography")
    encrypted = load("encrypted").Encrypted
    path, key = tmp_path / "disk.img", tmp_path / "key"
    path.write_bytes(bytes(SIZE))
    key.write_bytes(os.urandom(64))
    with testing.open(encrypted(path, key)) as file:
        file.pwrite(0, b"secret" * 10_000)
        file.pwrite(500_000, b"secret" * 10_000)
    assert b"secret" not in path.read_bytes()
    # The same text looks different in each block.
    stored = path.read_bytes()
    assert len({hashlib.sha256(stored[at : at + 4096]).digest() for at in range(0, 40_960, 4096)}) == 10
    with testing.open(encrypted(path, key)) as file:
        assert file.pread(500_000, 60_000) == b"secret" * 10_000
    key.write_bytes(bytes(63))
    with pytest.raises(ValueError, match="63 bytes"):
        encrypted(path, key)


@pytest.mark.parametrize("queues", [1, 2])
def test_a_snapshot_leaves_the_image_alone_and_is_found_again(tmp_path, queues):
    snapshot = load("snapshot").Snapshot
    image, changes = tmp_path / "image", tmp_path / "changes"
    image.write_bytes(content := os.urandom(SIZE))
    disk = snapshot(image, changes)
    model = exercise(disk, content, queues=queues)
    assert image.read_bytes() == content
    with testing.open(snapshot(image, changes)) as file:
        assert file.pread(0, SIZE) == model


def test_a_snapshot_whose_server_was_killed_has_what_was_written(tmp_path):
    snapshot = load("snapshot").Snapshot
    image, changes = tmp_path / "image", tmp_path / "changes"
    image.write_bytes(os.urandom(SIZE))
    data = os.urandom(4096)
    with testing.open(snapshot(image, changes)) as file:
        file.pwrite(70_000, data)
        # As after SIGKILL: nothing was flushed, and the first server does nothing more.
        with testing.open(snapshot(image, changes)) as recovered:
            assert recovered.pread(70_000, len(data)) == data


def test_bytes_of_a_web_server_are_a_disk():
    content = os.urandom(SIZE)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(SIZE))
            self.end_headers()

        def do_GET(self):
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(content[first : last + 1])

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        disk = load("http_range").HttpDisk(f"http://127.0.0.1:{server.server_port}/disk.img")
        with testing.open(disk) as file:
            assert not file.writable()
            assert file.pread(0, SIZE) == content
            assert file.pread(12345, 6789) == content[12345 : 12345 + 6789]
        server.shutdown()
