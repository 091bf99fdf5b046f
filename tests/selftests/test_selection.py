# SPDX-License-Identifier: MIT OR Apache-2.0
"""The choice of scripts."""

from argparse import ArgumentTypeError

import pytest
from linux_selftests.selection import SelectionError, choose, shard

ALL = ["loop_01", "loop_02", "null_01", "stress_01", "stress_02"]
WHOLE = (1, 1)


def test_all_are_run_if_none_is_named():
    assert choose(ALL, [], WHOLE) == ALL


@pytest.mark.parametrize("name", ["null_01", "test_null_01", "test_null_01.sh"])
def test_a_script_has_three_names(name):
    assert choose(ALL, [name], WHOLE) == ["null_01"]


def test_a_group_is_all_of_its_scripts():
    assert choose(ALL, ["stress", "loop_02"], WHOLE) == ["loop_02", "stress_01", "stress_02"]


@pytest.mark.parametrize("name", ["nul", "null_02", "", "null_", "test"])
def test_what_does_not_exist_is_refused(name):
    with pytest.raises(SelectionError):
        choose(ALL, ["null_01", name], WHOLE)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_parts_are_the_whole(parts):
    chosen = [choose(ALL, [], (number, parts)) for number in range(1, parts + 1)]
    assert sorted(name for names in chosen for name in names) == ALL


def test_a_part_is_a_number_of_a_number():
    assert shard("2/3") == (2, 3)
    for bad in ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3"]:
        with pytest.raises(ArgumentTypeError):
            shard(bad)


def test_an_empty_part_is_no_success():
    with pytest.raises(SelectionError):
        choose(ALL, [], (6, 6))
