# SPDX-License-Identifier: MIT OR Apache-2.0

"""The command line of ``ublk run``, as far as it needs no driver."""

import argparse
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import ublk
from ublk import _cli, _signals, testing


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("4k", 4096), ("64KiB", 65536), ("1.5G", 3 << 29), ("2TB", 2 << 40), ("7B", 7)],
)
def test_sizes_have_suffixes(text, size):
    assert _cli.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1.3", "1..5G", "0x10", "1GG"])
def test_nonsense_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError):
        _cli.parse_size(text)


def test_servers_run_no_module_of_the_working_directory(tmp_path, monkeypatch):
    programs = []
    monkeypatch.setattr(_cli._ublk, "main", lambda _arguments, program, *_: programs.append(program) or 0)
    assert _cli.main(["list"]) == 0
    (tmp_path / "asyncio.py").write_text("print('not this one', flush=True)")
    done = subprocess.run([*programs[0], "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "not this one" in done.stdout) == (0, False), done.stderr


def test_bench_has_a_disk_in_python(monkeypatch):
    disks = []
    monkeypatch.setattr(_cli._ublk, "main", lambda *arguments: disks.extend(arguments[3]) or 0)
    assert _cli.main(["bench"]) == 0
    ((name, argv),) = disks
    assert name == "python-null"
    assert argv[-2] == "run"
    with testing.open(_cli._make(argv[-1], None, [])) as file:
        file.pwrite(4096, b"x" * 4096)
        assert len(file.pread(4096, 4096)) == 4096


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "mydisk.py"
    path.write_text(
        "import ublk\n"
        "class Disk(ublk.BlockDevice):\n"
        "    def __init__(self, size, name='x', level=1):\n"
        "        super().__init__(size=size)\n"
        "        self.name, self.level = name, level\n"
        "    def read(self, offset, buf): pass\n"
        "other = 3\n"
    )
    return path


def test_a_class_is_made_from_a_file_with_its_arguments(disk):
    made = _cli._make(f"{disk}:Disk", 4096, [("name", "y"), ("level", 2)])
    assert (made.size, made.name, made.level) == (4096, "y", 2)


def test_arguments_are_literals_or_strings():
    assert _cli._parse_argument("n=3") == ("n", 3)
    assert _cli._parse_argument("n=a b") == ("n", "a b")
    assert _cli._parse_argument("n={'a': [1]}") == ("n", {"a": [1]})


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("Disk", "neither FILE.py:CLASS nor package.module:CLASS"),
        ("/nonexistent.py:Disk", "/nonexistent.py: no such file"),
        ("{disk}:Nothing", "mydisk.py does not define Nothing"),
        ("{disk}:other", "not a subclass of ublk.BlockDevice"),
        ("no.such.module:Disk", "importing no.such.module: ModuleNotFoundError"),
        ("{disk}:Disk", "does it need --size"),
    ],
)
def test_what_cannot_be_served_is_status_1_with_the_reason(disk, capsys, what, words):
    assert _cli.main(["run", what.format(disk=disk)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run"], ["run", "--depth", "x", "a:B"], ["run", "a:B", "--"], ["frobnicate"]])
def test_wrong_usage_is_status_2(arguments, capfd):
    assert _cli.main(arguments) == 2


def test_the_help_knows_run(capfd):
    assert _cli.main(["--help"]) == 0
    assert "Serve a block device written in Python" in capfd.readouterr().out


def test_the_man_pages_and_completions_know_run(tmp_path, capfd):
    assert _cli.main(["man", str(tmp_path / "man8")]) == 0
    page = (tmp_path / "man8" / "ublk-run.8").read_text().replace("\\-", "-").replace("\\*(Aq", "'")
    options = [name for action in _cli._parser()._actions for name in action.option_strings]
    assert "--reload" in options
    assert [name for name in options if name not in page] == []
    assert "replaced by the device's path" in page
    assert "ublk-run(8)" in (tmp_path / "man8" / "ublk.8").read_text().replace("\\-", "-")
    assert _cli.main(["completions", "bash"]) == 0
    script = tmp_path / "ublk"
    script.write_text(capfd.readouterr().out)
    assert "--reload" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


class Asleep:
    """A command that sleeps in the kernel, even when killed, until the disk is gone."""

    def __init__(self):
        self.disk_is_gone = self.is_interrupted = self.is_collected = False

    def poll(self):
        return None

    def send_signal(self, number): ...

    def kill(self): ...

    def wait(self, timeout=None):
        if not self.is_interrupted:
            self.is_interrupted = True
            raise KeyboardInterrupt
        assert timeout is not None, "it waits without a limit"
        if not self.disk_is_gone:
            raise subprocess.TimeoutExpired("command", timeout)
        self.is_collected = True
        return -9


@pytest.mark.parametrize("fails", [False, True])
def test_a_command_that_sleeps_in_the_disk_does_not_keep_it(monkeypatch, fails):
    child = Asleep()

    class Device:
        path = "/dev/ublkb0"

        def stop(self):
            child.disk_is_gone = True
            if fails:
                raise ublk.UblkError(5, "requests unfinished")

    monkeypatch.setattr(_cli.subprocess, "Popen", lambda *_, **__: child)
    with pytest.raises(ublk.UblkError if fails else KeyboardInterrupt):
        _cli._run_command(["command"], Device, None)
    assert child.is_collected


@pytest.fixture
def popen(monkeypatch):
    """`subprocess.Popen` as `_cli` calls it: keeps the children, whatever interrupts it, and ends them."""
    children, make = [], subprocess.Popen

    def keep(*arguments, **options):
        children.append(make(*arguments, **options))
        for action in actions:
            action()
        return children[-1]

    actions = []
    monkeypatch.setattr(_cli.subprocess, "Popen", keep)
    yield SimpleNamespace(children=children, actions=actions)
    for child in children:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


RUNNING = SimpleNamespace(path="/dev/ublkb0", running=True, stop=lambda: None)


@pytest.fixture
def terminates():
    """SIGTERM raises as while devices run."""

    def terminate(number, _frame):
        raise _signals.Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_command_starts_ends_the_command(popen, terminates, number):
    popen.actions.append(lambda: signal.raise_signal(number))
    with pytest.raises((_signals.Terminated, KeyboardInterrupt)):
        _cli._run_command(["sleep", "300"], lambda: RUNNING, None)
    assert popen.children[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_grace_of_a_command(popen, terminates, number):
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    interrupted = threading.Event()

    def wait(child, _reloader):
        assert child.stdout.readline() == b"deaf\n"
        interrupted.set()
        signal.raise_signal(number)

    def interrupt_again():
        interrupted.wait()
        # For longer than two signals count as one.
        time.sleep(1)
        signal.pthread_kill(main, number)

    main = threading.get_ident()
    make = _cli.subprocess.Popen
    threading.Thread(target=interrupt_again, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cli, "_wait", wait)
        patch.setattr(_cli.subprocess, "Popen", lambda *a, **options: make(*a, stdout=subprocess.PIPE, **options))
        patch.setattr(_cli, "_COMMAND_GRACE", 300.0)
        with pytest.raises((_signals.Terminated, KeyboardInterrupt)):
            _cli._run_command([sys.executable, "-c", code], lambda: RUNNING, None)
    assert popen.children[0].returncode == -signal.SIGKILL


def test_a_signal_before_a_command_is_being_ended_leaves_no_command(popen, monkeypatch):
    def end(child, running):
        raise KeyboardInterrupt

    def wait(child, reloader):
        raise KeyboardInterrupt

    monkeypatch.setattr(_cli, "_end_command", end)
    monkeypatch.setattr(_cli, "_wait", wait)
    with pytest.raises(KeyboardInterrupt):
        _cli._run_command(["sleep", "300"], lambda: RUNNING, None)
    assert popen.children[0].wait(20) == -signal.SIGKILL
