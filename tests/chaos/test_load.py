# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a client takes for acknowledged, on a file instead of a disk. Host only."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "e2e"))

from support.blockio import Disk
from support.waiting import until
from tools.history import Extent, History
from tools.load import Client

RUN = 7


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 16))
    with Disk(str(path), direct=False) as disk:
        yield disk


def client_of(extent: Extent, **options: bool) -> Client:
    return Client("", History(RUN, [extent]), [extent], "seed", cpu=0, direct=False, **options)


def test_a_write_to_the_page_cache_is_acknowledged_at_once(disk):
    extent = Extent(8, 4)
    client_of(extent)._write(disk, extent, durable=False, zeros=False)
    assert extent.acked() == 1


def test_where_requests_fail_the_next_sync_acknowledges_it(disk):
    extent = Extent(8, 4)
    client = client_of(extent, pages_may_be_lost=True)
    client._write(disk, extent, durable=False, zeros=False)
    assert extent.acked() == 0
    client._synced(began=1)
    assert extent.acked() == 1
    assert extent.writes[0].durable


def test_a_durable_write_is_acknowledged_at_once(disk):
    extent = Extent(8, 4)
    client_of(extent, pages_may_be_lost=True)._write(disk, extent, durable=True, zeros=False)
    assert extent.acked() == 1


def test_an_error_leaves_it_open_whether_writes_before_were_carried_out(disk, monkeypatch):
    extent = Extent(8, 4)
    client = client_of(extent, pages_may_be_lost=True)
    client._path = disk.path
    client._write(disk, extent, durable=False, zeros=False)

    def fail(_disk):
        client.stop()
        raise OSError(5, "the page could not be written")

    monkeypatch.setattr(client, "_step", fail)
    client.run()
    client._synced(began=1)
    assert extent.acked() == 0


def test_a_client_that_has_rested_begins_with_a_sync(disk, monkeypatch):
    extent = Extent(8, 4)
    client = client_of(extent)
    client._path = disk.path
    # Without the rest it writes.
    monkeypatch.setattr(client._dice, "random", lambda: 0.6)
    client.rest()
    client.start()
    until(lambda: client.resting, "the client rests")
    assert client.counts.all() == 0
    client.resume()
    until(lambda: client.counts.writes, "a write")
    client.stop()
    client.join()
    assert client.counts.flushes == 1
    assert extent.writes[0].began >= client._history.moments()[0]
