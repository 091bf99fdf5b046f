# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which of the scripts are run."""

import argparse
import re


class SelectionError(Exception):
    """There is nothing to run."""


def shard(text: str) -> tuple[int, int]:
    """Reads I/N: the I-th of N parts."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 1 <= I <= N")
    return int(match[1]), int(match[2])


def choose(available: list[str], wanted: list[str], part: tuple[int, int]) -> list[str]:
    """The scripts that `wanted` names, one by one or by group (all if it is empty), and of these the part.

    Neighbours go to different parts, since those of a group take about the same time.
    """
    chosen = available
    if wanted:
        names = {word.removeprefix("test_").removesuffix(".sh") for word in wanted}
        groups = {name.rpartition("_")[0] for name in available}
        if unknown := names - set(available) - groups:
            raise SelectionError(f"there is no script {', '.join(sorted(unknown))}; see --list")
        chosen = [name for name in available if name in names or name.rpartition("_")[0] in names]
    number, parts = part
    if not (mine := chosen[number - 1 :: parts]):
        raise SelectionError(f"part {number} of {parts} is empty: there are {len(chosen)} scripts")
    return mine
