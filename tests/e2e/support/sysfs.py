# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the kernel says about a disk."""

import os
from pathlib import Path


def attribute(path: str, name: str) -> str:
    """An attribute of /dev/NAME, such as queue/logical_block_size."""
    return Path("/sys/block", os.path.basename(path), name).read_text().strip()


def number(path: str, name: str) -> int:
    return int(attribute(path, name))


def size(path: str) -> int:
    """The disk's size in bytes."""
    return number(path, "size") * 512


def advertised(path: str) -> dict[str, bool]:
    """The operations that the disk says it can do."""
    return {
        "write": attribute(path, "ro") == "0",
        "flush": attribute(path, "queue/write_cache") == "write back",
        "fua": attribute(path, "queue/fua") == "1",
        "discard": number(path, "queue/discard_max_bytes") > 0,
        "write_zeroes": number(path, "queue/write_zeroes_max_bytes") > 0,
    }


def requests(path: str) -> int:
    """Reads and writes that have been finished."""
    fields = attribute(path, "stat").split()
    return int(fields[0]) + int(fields[4])


def in_flight(path: str) -> int:
    """Requests that the driver has been given and not finished."""
    return sum(map(int, attribute(path, "inflight").split()))


def queue_cpus(path: str) -> list[set[int]]:
    """The CPUs of each hardware queue."""
    queues = sorted(Path("/sys/block", os.path.basename(path), "mq").iterdir(), key=lambda queue: int(queue.name))
    return [{int(cpu) for cpu in (queue / "cpu_list").read_text().split(",") if cpu.strip()} for queue in queues]
