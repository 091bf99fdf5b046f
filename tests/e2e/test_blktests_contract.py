# SPDX-License-Identifier: MIT OR Apache-2.0
"""What test suites expect of the program that they are told to use for ublk: they take the state and
the server's pid from `list` by position, and delete devices whose server they killed."""

import os
from pathlib import Path

import pytest
from support.command import Result, run
from support.face import Face

pytestmark = pytest.mark.long

HELPERS = """
set -eu
state() { $UBLK_PROG list -n "$1" | grep "state" | awk '{print $11}'; }
daemon() { $UBLK_PROG list -n "$1" | grep "pid" | awk '{print $7}'; }
wait_for_state() {
    tries=0
    while [ "$(state "$1")" != "$2" ]; do
        tries=$((tries + 1))
        [ $tries -lt 500 ] || { echo "device $1 is $(state "$1"), not $2"; exit 1; }
        sleep 0.1
    done
}
is() { [ "$1" = "$2" ] || { echo "$3: '$1' instead of '$2'"; exit 1; }; }
"""


def script(face: Face, body: str, limit: float = 100, **options) -> Result:
    environment = os.environ | {"UBLK_PROG": " ".join(face.argv)}
    return run(["bash", "-c", HELPERS + body], env=environment, timeout=limit, **options)


@pytest.mark.time_limit(120)
def test_state_and_pid_are_found_by_position(face: Face) -> None:
    script(
        face,
        """
        $UBLK_PROG add -t null -n 0 > /dev/null
        udevadm settle
        is "$(state 0)" LIVE state
        pid=$(daemon 0)
        [ -d "/proc/$pid" ] || { echo "no process $pid"; exit 1; }
        is "$(state 0 | wc -l)" 1 "lines with state"
        is "$(daemon 0 | wc -l)" 1 "lines with pid"
        $UBLK_PROG del -n 0
        [ ! -e /dev/ublkb0 ]
        """,
    )


def load(seconds: int = 30) -> str:
    """Commands that keep a disk busy in the background, until it is gone."""
    return (
        "fio --name=job --filename=/dev/ublkb0 --ioengine=libaio --direct=1 --rw=randrw --iodepth=16 "
        f"--time_based --runtime={seconds} > /dev/null 2>&1 &\nfio=$!\n"
        """
        tries=0
        while ! awk '$1 + $5 > 200 { found = 1 } END { exit !found }' /sys/block/ublkb0/stat; do
            tries=$((tries + 1)); [ $tries -lt 200 ] || { echo "fio does nothing"; exit 1; }; sleep 0.1
        done
        """
    )


TARGETS = {"null": "-t null", "loop": '-t loop -f "$PWD/img"'}
each_target = pytest.mark.parametrize("target", TARGETS)


@pytest.mark.io_errors
@pytest.mark.time_limit(120)
@each_target
def test_deletion_of_a_disk_in_use(target: str, face: Face, scratch: Path) -> None:
    script(
        face,
        f"""
        truncate -s 64M img
        $UBLK_PROG add {TARGETS[target]} -n 0 > /dev/null
        udevadm settle
        {load()}
        $UBLK_PROG del -n 0
        wait $fio && {{ echo "fio succeeded on a disk that is gone"; exit 1; }}
        [ ! -e /dev/ublkb0 ] && [ ! -e /dev/ublkc0 ]
        """,
        cwd=scratch,
    )


@pytest.mark.io_errors
@pytest.mark.time_limit(250)
@each_target
@pytest.mark.parametrize("kills", [1, 2])
def test_recovery_with_the_reference_tools_options(kills: int, target: str, face: Face, scratch: Path) -> None:
    script(
        face,
        f"""
        truncate -s 64M img
        $UBLK_PROG add {TARGETS[target]} -n 0 -r > /dev/null
        udevadm settle
        {load(60)}
        kill -9 "$(daemon 0)"
        wait_for_state 0 QUIESCED
        [ "$(daemon 0)" != -1 ] || {{ echo "kill would end every process"; exit 1; }}
        $UBLK_PROG recover {TARGETS[target]} -n 0 > /dev/null
        wait_for_state 0 LIVE
        if [ {kills} = 2 ]; then kill -9 "$(daemon 0)"; fi
        $UBLK_PROG del -n 0
        wait $fio && {{ echo "fio succeeded on a disk that is gone"; exit 1; }}
        [ ! -e /dev/ublkb0 ] && [ ! -e /dev/ublkc0 ]
        """,
        cwd=scratch,
        limit=220,
    )


@pytest.mark.io_errors
@pytest.mark.time_limit(120)
def test_recovery_that_is_asked_for_by_number(face: Face) -> None:
    script(
        face,
        """
        $UBLK_PROG add -t null -n 0 -r 1 -q 2 -d 64 > /dev/null
        udevadm settle
        kill -9 "$(daemon 0)"
        wait_for_state 0 QUIESCED
        is "$(kill -9 "$(daemon 0)" 2> /dev/null; echo $?)" 1 "killing a server that there is not"
        # What another program has made has no state here.
        rm -f /run/ublk/ublkb0.json
        $UBLK_PROG recover -t null -n 0 > /dev/null
        is "$(state 0)" LIVE state
        $UBLK_PROG recover -t loop -f /etc/passwd -n 0 > /dev/null 2>&1 && exit 1
        $UBLK_PROG del -n 0
        """,
        limit=110,
    )


@pytest.mark.time_limit(120)
def test_a_mounted_disk_is_not_deleted_by_a_script(face: Face, scratch: Path) -> None:
    script(
        face,
        """
        truncate -s 64M img
        $UBLK_PROG add -t loop -f "$PWD/img" -n 0 > /dev/null
        udevadm settle
        mkfs.ext4 -q -F /dev/ublkb0
        mkdir mnt
        mount /dev/ublkb0 mnt
        $UBLK_PROG del -n 0 2> said && { echo "a mounted disk was deleted"; exit 1; }
        grep -q mnt said
        umount mnt
        rmdir mnt
        $UBLK_PROG del -n 0
        """,
        cwd=scratch,
    )


@pytest.mark.io_errors
def test_deletion_right_after_the_daemon_was_killed(face: Face) -> None:
    script(
        face,
        """
        $UBLK_PROG add -t null -n 0 > /dev/null
        udevadm settle
        fio --name=job --filename=/dev/ublkb0 --ioengine=libaio --direct=1 --rw=randrw --iodepth=16 \
            --time_based --runtime=20 > /dev/null 2>&1 &
        fio=$!
        sleep 1
        kill -9 "$(daemon 0)"
        $UBLK_PROG del -n 0
        wait $fio && { echo "fio succeeded on a disk that is gone"; exit 1; }
        [ ! -e /dev/ublkb0 ] && [ ! -e /dev/ublkc0 ]
        """,
    )


@pytest.mark.io_errors
def test_the_state_of_a_device_whose_daemon_was_killed(native: Face) -> None:
    script(
        native,
        """
        $UBLK_PROG add -t null -n 0 > /dev/null
        kill -9 "$(daemon 0)"
        wait_for_state 0 DEAD
        $UBLK_PROG del -n 0
        is "$($UBLK_PROG list | wc -l)" 0 "lines of list"
        """,
    )


def test_a_file_system_on_a_loop_target(native: Face, scratch: Path) -> None:
    script(
        native,
        """
        truncate -s 64M img
        $UBLK_PROG add -t loop -f "$PWD/img" -n 0 -q 2 > /dev/null
        udevadm settle
        mkfs.ext4 -q -F /dev/ublkb0
        mkdir mnt
        mount /dev/ublkb0 mnt
        dd if=/dev/urandom of=mnt/file bs=1M count=16 status=none
        sum=$(sha256sum < mnt/file)
        umount mnt
        fsck.ext4 -fn /dev/ublkb0 > /dev/null
        mount -o ro /dev/ublkb0 mnt
        is "$(sha256sum < mnt/file)" "$sum" checksum
        umount mnt
        rmdir mnt
        $UBLK_PROG del -n 0
        """,
        cwd=scratch,
    )


def test_deletion_of_everything(native: Face) -> None:
    script(
        native,
        """
        for id in 0 1 2; do $UBLK_PROG add -t null -n $id > /dev/null; done
        $UBLK_PROG del -a
        is "$($UBLK_PROG list | wc -l)" 0 "lines of list"
        $UBLK_PROG del -a
        """,
    )


def test_the_driver_can_be_removed_afterwards(native: Face) -> None:
    script(
        native,
        """
        $UBLK_PROG add -t null > /dev/null
        $UBLK_PROG del -a
        module=$(ls /opt/ublk/driver/ublk_drv.ko 2> /dev/null || true)
        rmmod ublk_drv
        if [ -n "$module" ]; then insmod "$module"; else modprobe ublk_drv; fi
        udevadm settle
        $UBLK_PROG add -t null > /dev/null
        $UBLK_PROG del -a
        """,
    )
