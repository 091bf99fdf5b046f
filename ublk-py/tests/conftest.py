# SPDX-License-Identifier: MIT OR Apache-2.0

"""Tests of the Python package on the stand-in driver: no kernel, no privileges."""

import signal

import pytest

from ublk import _driver
from ublk._ublk import FakeDriver


def pytest_sessionstart():
    # A shell that starts this in the background may ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def driver():
    """A stand-in driver that the test's devices are created on; the test must leave no device and break no rule."""
    driver = FakeDriver()
    with _driver.using(driver):
        yield driver
    assert driver.devices() == []
    assert driver.violations() == []
