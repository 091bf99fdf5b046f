# SPDX-License-Identifier: MIT OR Apache-2.0
"""Rules for every test: it has a time limit, and it leaves the machine as it was."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kmemleak, raw, udev
from support.face import NATIVE, PYTHON, Face, device_id
from support.features import offered
from support.kernel_log import KernelLog
from support.pace import patience
from support.processes import blocked_stacks
from support.residue import Snapshot

# The kernel's own limit for a hung task in the test machine is longer.
TIME_LIMIT = 60.0

_report = pytest.StashKey[dict[str, pytest.TestReport]]()


def _load_loop_devices() -> None:
    # Nothing loads this by itself where no node of it exists.
    subprocess.run(["modprobe", "loop"], check=True, timeout=patience(300))


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.geteuid() != 0 or not Path("/dev/ublk-control").exists():
        raise pytest.UsageError(
            "the end-to-end tests make and remove block devices: they want root, the ublk driver, and a machine "
            "of their own (`vm/run -- python3 -m pytest tests/e2e`)"
        )
    _load_loop_devices()
    udev.look_only_at_new_disks()
    # What was lost before is not the tests' doing.
    kmemleak.forget()
    # A shell that starts this in the background may ignore SIGINT, which servers would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Stable: the others stay in their order.
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    item.stash.setdefault(_report, {})[report.when] = report
    return report


class Watchdog:
    """Ends a test that hangs: with its servers dead, its I/O fails and it goes on."""

    def __init__(self, before: Snapshot, seconds: float) -> None:
        self.seconds = patience(seconds)
        self.stacks = ""
        self._before = before
        self._timer = threading.Timer(self.seconds, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def _bite(self) -> None:
        self.stacks = blocked_stacks()
        self._before.kill_new_processes()
        # Requests of processes that are not servers may have been waiting for those that are.
        threading.Timer(5, self._before.kill_new_processes).start()

    def cancel(self) -> None:
        self._timer.cancel()


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """The machine is the same after the test as before it, and its kernel had nothing to complain about."""
    node = request.node
    limit = node.get_closest_marker("time_limit")
    log = KernelLog()
    log.note(f"begin {node.name}")
    before = Snapshot()
    watchdog = Watchdog(before, limit.args[0] if limit else TIME_LIMIT)
    yield
    watchdog.cancel()
    problems = []
    if watchdog.stacks:
        problems.append(f"the test took more than {watchdog.seconds:g} s; blocked then:\n{watchdog.stacks}")
    if residue := before.settled_residue():
        problems.append(f"left behind: {residue}")
        problems.append(before.clean())
    io_errors = node.get_closest_marker("io_errors")
    lines = log.trouble(None if io_errors is None else io_errors.args)
    if lines:
        problems.append("the kernel's log has:\n" + "\n".join(lines))
    log.note(f"end {node.name}")
    log.close()
    call = node.stash[_report].get("call")
    if call is not None and call.failed:
        # The failure itself is what to look at; this belongs to it.
        node.add_report_section("teardown", "kernel log", "\n".join(text for _, text in log.lines))
        if problems:
            node.add_report_section("teardown", "left by the failed test", "\n".join(filter(None, problems)))
            print("\n".join(filter(None, problems)))
        return
    assert not problems, "\n".join(filter(None, problems))


@pytest.fixture(scope="session", autouse=True)
def about_the_machine(record_testsuite_property: Callable[[str, object], None]) -> None:
    """Properties of a JUnit document, which `tests/matrix` reads."""
    record_testsuite_property("driver", os.environ.get("UBLK_DRIVER", "unknown"))
    record_testsuite_property("series", os.environ.get("UBLK_KERNEL", "unknown"))
    record_testsuite_property("kernel", os.uname().release)
    record_testsuite_property("commit", os.environ.get("UBLK_COMMIT", "unknown"))
    record_testsuite_property("offered", " ".join(sorted(offered())))


@pytest.fixture(scope="module", autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernel has lost no memory when the tests of a module are over. Looking for that takes long; that
    is why it is not done after each of them."""
    yield
    lost = kmemleak.lost()
    # They resemble each other.
    shown = "\n".join(lost[:5])
    assert not lost, f"the kernel lost {len(lost)} pieces of memory during {request.node.name}, such as:\n{shown}"


@pytest.fixture(params=[NATIVE, PYTHON], ids=repr)
def face(request: pytest.FixtureRequest) -> Face:
    """Both programs in turn."""
    return request.param


@pytest.fixture
def native() -> Face:
    """The Rust program."""
    return NATIVE


@pytest.fixture
def python() -> Face:
    """The Python package's program."""
    return PYTHON


@pytest.fixture
def native_disk() -> Iterator["Adder"]:
    """Adds devices with the Rust program; they are deleted, and seen to be gone, at the end."""
    adder = Adder(NATIVE)
    yield adder
    adder.remove()


class Adder:
    """Devices that are deleted when the test is over."""

    def __init__(self, face: Face) -> None:
        self._face = face
        self._paths: list[str] = []

    def __call__(self, *words: str | os.PathLike) -> str:
        path = self._face.add(*words)
        self._paths.append(path)
        return path

    def forget(self, path: str) -> None:
        """The test deletes this one itself."""
        self._paths.remove(path)

    def remove_one(self, path: str) -> None:
        self.forget(path)
        self._face.run("del", "-n", str(device_id(path)))
        assert not os.path.exists(path), f"{path} is there after del"

    def remove(self) -> None:
        # The last one may stand on the first.
        for path in reversed(self._paths[:]):
            self.remove_one(path)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A directory on a file system that can do direct I/O and punch holes."""
    path = Path("/root/scratch")
    path.mkdir(exist_ok=True)
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return path


@pytest.fixture
def for_users() -> Iterator[None]:
    """Ordinary users may make devices."""
    before = os.stat(raw.CONTROL).st_mode
    os.chmod(raw.CONTROL, 0o666)
    yield
    os.chmod(raw.CONTROL, before & 0o777)
