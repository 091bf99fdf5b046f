# SPDX-License-Identifier: MIT OR Apache-2.0
"""What test suites expect of the program that they are told to use for ublk: they take the state and
the server's pid from `list` by position, and delete devices whose server they killed."""

import os
from pathlib import Path

import pytest
from support.command import Result, run
from support.face import Face

HELPERS = """
set -eu
state() { $UBLK_PROG list -n "$1" | grep "state" | awk '{print $11}'; }
daemon() { $UBLK_PROG list -n "$1" | grep "pid" | awk '{print $7}'; }
wait_for_state() {
    tries=0
    while [ "$(state "$1")" != "$2" ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || { echo "device $1 is $(state "$1"), not $2"; exit 1; }
        sleep 0.1
    done
}
is() { [ "$1" = "$2" ] || { echo "$3: '$1' instead of '$2'"; exit 1; }; }
"""


def script(face: Face, body: str, **options) -> Result:
    environment = os.environ | {"UBLK_PROG": " ".join(face.argv)}
    return run(["bash", "-c", HELPERS + body], env=environment, timeout=50, **options)


@pytest.mark.short
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
