# SPDX-License-Identifier: MIT OR Apache-2.0
"""The judge of power cuts on made-up logs: what it has to accept, and planted faults that it has to see. Host only."""

import random

import pytest
from tools import content
from tools.history import EARLY, FOREIGN, LOST, Extent, History, Write
from tools.power_log import MODES, NOTHING, Entry, PowerLog

RUN = 7


def history(*writes: Write, count: int = 4) -> History:
    return History(RUN, [Extent(8, count, list(writes))])


def entry(began: int, ended: int, version: int, count: int = 4) -> Entry:
    return Entry(began, ended, 8 * 512, content.sectors(RUN, 8, count, version))


def kinds(record: History, log: list[Entry], cut: int, mode: str = "nothing") -> set[str]:
    image = PowerLog(bytes(1 << 16), log).cut(cut, random.Random(1), mode)
    return {wrong.kind for wrong in record.check_all(cut, image.read)}


@pytest.mark.parametrize("mode", MODES)
def test_a_write_before_an_acknowledged_flush_is_there(mode):
    record = history(Write(1, 10, 20))
    record.flushed(30, 40)
    assert kinds(record, [entry(12, 18, 1), Entry(32, 38)], 40, mode) == set()


def test_a_flush_that_did_not_reach_the_disk_is_seen():
    record = history(Write(1, 10, 20))
    record.flushed(30, 40)
    assert kinds(record, [entry(12, 18, 1)], 40) == {LOST}


def test_a_write_that_reached_the_disk_after_its_flush_is_seen():
    record = history(Write(1, 10, 20))
    record.flushed(30, 40)
    assert kinds(record, [Entry(32, 38), entry(39, 45, 1)], 40) == {LOST}


def test_a_flush_promises_nothing_for_writes_under_way():
    record = history(Write(1, 10, 35))
    record.flushed(30, 40)
    assert kinds(record, [Entry(32, 34), entry(33, 36, 1)], 40) == set()


def test_a_durable_write_needs_no_flush_of_the_client():
    record = history(Write(1, 10, 20, durable=True))
    assert kinds(record, [entry(12, 14, 1), Entry(15, 16)], 20) == set()
    assert kinds(record, [entry(12, 14, 1)], 20) == {LOST}
    # It was not acknowledged yet.
    assert kinds(record, [entry(12, 14, 1)], 19) == set()


@pytest.mark.parametrize("mode", MODES)
def test_sectors_of_an_unflushed_write_may_survive_one_by_one(mode):
    record = history(Write(1, 10, 20), Write(2, 50, 60))
    record.flushed(30, 40)
    assert kinds(record, [entry(12, 18, 1), Entry(32, 38), entry(52, 58, 2)], 70, mode) == set()


def test_an_old_write_that_lands_late_is_seen():
    record = history(Write(1, 10), Write(2, 20, 30))
    record.flushed(40, 50)
    assert kinds(record, [entry(21, 25, 2), entry(12, 35, 1), Entry(42, 45)], 50) == {LOST}


def test_bytes_of_another_place_are_seen():
    record = history(Write(1, 10, 20))
    record.flushed(30, 40)
    log = [Entry(12, 18, 8 * 512, content.sectors(RUN, 9, 4, 1)), Entry(32, 38)]
    assert kinds(record, log, 40) == {FOREIGN}


def test_a_damaged_sector_is_seen():
    record = history(Write(1, 10, 20), count=1)
    record.flushed(30, 40)
    damaged = bytearray(content.sector(RUN, 8, 1))
    damaged[300] ^= 1
    assert kinds(record, [Entry(12, 18, 8 * 512, bytes(damaged)), Entry(32, 38)], 40) == {FOREIGN}


def test_a_version_of_the_future_is_seen():
    record = history(Write(1, 10, 20), Write(2, 60, 70))
    assert kinds(record, [entry(12, 18, 2)], 40, "everything") == {EARLY}


def test_zeros_are_a_content_of_their_own():
    record = history(Write(1, 10, 20), Write(2, 21, 22, zeros=True))
    record.flushed(30, 40)
    log = [entry(12, 18, 1), Entry(21, 22, 8 * 512, bytes(4 * 512)), Entry(32, 38)]
    assert kinds(record, log, 40) == set()
    assert kinds(record, [log[0], log[2]], 40) == {LOST}


def test_a_live_disk_has_the_last_acknowledged_write():
    record = history(Write(1, 10, 20), Write(2, 30), Write(3, 40, 50), count=1)
    extent = record.extents[0]
    assert not record.check_live(extent, content.sector(RUN, 8, 3))
    assert [wrong.kind for wrong in record.check_live(extent, content.sector(RUN, 8, 2))] == [LOST]
    assert [wrong.kind for wrong in record.check_live(extent, bytes(512))] == [LOST]


def test_a_failed_write_may_or_may_not_be_there():
    record = history(Write(1, 10, 20), Write(2, 30), count=1)
    extent = record.extents[0]
    assert not record.check_live(extent, content.sector(RUN, 8, 1))
    assert not record.check_live(extent, content.sector(RUN, 8, 2))


def test_cuts_at_every_acknowledgement_see_what_a_later_flush_hides():
    # The first flush does not reach the disk; after the second all is there.
    record = history(Write(1, 10, 20))
    record.flushed(30, 40)
    record.flushed(50, 60)
    log = PowerLog(bytes(1 << 16), [entry(12, 18, 1), Entry(52, 58)])
    found = [record.check_new(cut, log.cut(cut, random.Random(1), NOTHING).read) for cut in record.moments()]
    assert [{wrong.kind for wrong in wrongs} for wrongs in found] == [{LOST}, set()]


def test_cuts_at_every_acknowledgement_accept_what_each_made_durable():
    record = history(Write(1, 10, 20), Write(2, 42, 46, durable=True))
    record.flushed(30, 40)
    log = PowerLog(bytes(1 << 16), [entry(12, 18, 1), Entry(32, 38), entry(43, 44, 2), Entry(44, 45)])
    found = [record.check_new(cut, log.cut(cut, random.Random(1), NOTHING).read) for cut in record.moments()]
    assert found == [[], []]
    assert record.extents[0].checked == 2
