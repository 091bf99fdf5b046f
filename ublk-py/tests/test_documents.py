# SPDX-License-Identifier: MIT OR Apache-2.0

"""The Python code of README and documentation runs as it is printed.

The blocks of a page are run in order, in one namespace, on the stand-in driver. A block that follows a line
``% not run: REASON`` is only compiled.
"""

import re
import threading
from pathlib import Path

import pytest

import ublk
from ublk import _driver

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "ublk-py/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(^% not run: .+\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The code of each block, at its lines of the page, and whether to run it."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        code = "\n" * text.count("\n", 0, match.start(2)) + match.group(2)
        yield compile(code, str(page), "exec"), match.group(1) is None


class Served:
    """Devices run on the stand-in driver. Each one is read once and then stopped, unless the page does so itself."""

    def __init__(self, driver):
        self.driver = driver
        self.threads = []

    def stop_later(self, device):
        def client():
            device.wait_ready()
            assert len(self.driver.read(device.id, 0, 4096)) == 4096
            device.stop()

        thread = threading.Thread(target=client)
        thread.start()
        self.threads.append(thread)

    def join(self):
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def served(monkeypatch, driver):
    served = Served(driver)
    start, start_async = ublk.BlockDevice.start, ublk.BlockDevice.start_async

    def started(self, **options):
        device = start(self, **options)
        # A device of `ublk.testing` has its own driver.
        if _driver.current() is driver and not options.get("recoverable"):
            served.stop_later(device)
        return device

    async def started_async(self, **options):
        device = await start_async(self, **options)
        served.stop_later(device)
        return device

    monkeypatch.setattr(ublk.BlockDevice, "start", started)
    monkeypatch.setattr(ublk.BlockDevice, "start_async", started_async)
    return served


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_the_code_of_a_page_runs(served, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for code, is_run in blocks(page):
        if is_run:
            exec(code, names)
    served.join()


def test_a_block_that_fails_is_found(served, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nassert 1 == 1\nassert 1 == 2\n```\n")
    ((code, is_run),) = blocks(page)
    assert is_run
    with pytest.raises(AssertionError) as caught:
        exec(code, {})
    assert caught.traceback[-1].lineno + 1 == 5
