# SPDX-License-Identifier: MIT OR Apache-2.0

"""Tests of the Python package on the stand-in driver: no kernel, no privileges."""

import signal

import pytest

from ublk._ublk import FakeDriver


def pytest_sessionstart():
    # Whoever starts this in the background may have SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def driver():
    """A driver of the test's own, on which nothing may be left and no rule broken."""
    driver = FakeDriver()
    yield driver
    assert driver.devices() == []
    assert driver.violations() == []
