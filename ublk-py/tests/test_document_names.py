# SPDX-License-Identifier: MIT OR Apache-2.0

"""Commands, options and names that README and documentation mention exist."""

import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ublk

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

CODE = re.compile(r"```sh\n(.*?)```|(?<!`)`([^`]+)`(?!`)", re.DOTALL)
COMMAND = re.compile(r"^(?:sudo )?(?:\S*/)?ublk ([a-z]+)(?= |$)(.*)$", re.MULTILINE)
OPTION = re.compile(r"(?<!\S)(--[a-z][a-z-]*|-[a-zA-Z])(?=[\s=]|$)")


@functools.cache
def help_of(command):
    """The options of a command, or `None` if there is no such command."""
    line = [sys.executable, "-m", "ublk", command, "--help"]
    done = subprocess.run(line, capture_output=True, text=True)
    return set(OPTION.findall(done.stdout.replace(",", " "))) if done.returncode == 0 else None


def unknown(text):
    """What a page mentions that does not exist."""
    found = []
    for block, inline in CODE.findall(text):
        for command, rest in COMMAND.findall((block or inline).replace("\\\n", " ")):
            known = help_of(command)
            if known is None:
                found.append(f"ublk {command}")
                continue
            own = re.split(r" -- |  #", f"{rest} ")[0]
            found += [f"ublk {command} {option}" for option in OPTION.findall(own) if option not in known]
        for name in re.findall(r"^ublk\.([A-Za-z_]+)", inline):
            if not hasattr(ublk, name) and name != "testing":
                found.append(f"ublk.{name}")
        for name in re.findall(r"^[Dd]evice\.([a-z_]+)", inline):
            if not hasattr(ublk.Device, name):
                found.append(f"Device.{name}")
        for name in re.findall(r"^start\(([a-z_]+)=", inline):
            if name not in inspect.signature(ublk.BlockDevice.start).parameters:
                found.append(f"start({name}=)")
    return found


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_a_page_mentions_only_what_exists(page):
    assert unknown(page.read_text()) == []


def test_what_does_not_exist_is_found():
    page = """
`ublk add --fast`, `ublk add -t null --count 3`, `ublk remove`, `ublk.Disk`, `ublk.BlockDevice`, `device.sop()`,
`Device.stop`, `start(threads=2)`, `start(queues=2)`

```sh
sudo venv/bin/ublk run disk.py:Disk --sise 1G -- \\
    sh -c 'mkfs --quiet {dev}'
ublk stat -n 0 --watch   # not --an-option
```
"""
    assert unknown(page) == [
        "ublk add --fast",
        "ublk remove",
        "ublk.Disk",
        "Device.sop",
        "start(threads=)",
        "ublk run --sise",
    ]
