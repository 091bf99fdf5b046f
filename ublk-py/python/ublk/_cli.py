# SPDX-License-Identifier: MIT OR Apache-2.0

"""The ``ublk`` command: the one of `ublk-core`, and ``ublk run``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ublk import _bench, _signals, _ublk
from ublk._block_device import BlockDevice
from ublk._errors import UblkError
from ublk._log import print_error
from ublk._reload import POLL_SECONDS, Reloader, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    from ublk._device import Device

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGTP]?)(?:I?B)?", re.IGNORECASE | re.ASCII)
_SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_COMMAND_GRACE = 10.0
# Limit for the end of a command that was killed.
_KILL_GRACE = 5.0


class _UsageError(Exception):
    """Invalid command line."""


def entry() -> None:
    """Run the command with the arguments of this process, and exit."""
    logging.basicConfig(format="ublk: %(levelname)s: %(message)s", level=os.environ.get("UBLK_LOG", "WARNING").upper())
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 0, 1 for a failure, 2 for wrong usage."""
    if arguments and arguments[0] == "run":
        return _run(arguments[1:])
    # The command line of servers and helpers: without -P they would import modules from the working directory first.
    program = [sys.executable, "-P", "-m", "ublk"]
    bench = [("python-null", [*program, "run", f"{_bench.__name__}:{_bench.Null.__name__}"])]
    return _ublk.main(list(arguments), program, [_description()], bench)


def parse_size(text: str) -> int:
    """Parse ``4096``, ``64K``, ``512MiB``, ``1.5G``; suffixes are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; examples: 4096, 64K, 512M, 1.5G")
    value = Fraction(match[1]) * (1 << _SUFFIXES[match[2].upper()])
    if value.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes")
    return value.numerator


def _parse_argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ublk run",
        description="Serve a block device written in Python until Ctrl-C, SIGTERM or SIGHUP, then stop it and exit. "
        "With a command, run that, stop the device when it exits, and exit with its status.",
        usage="ublk run [options] WHAT [-- COMMAND [ARG ...]]",
    )
    parser.add_argument("what", metavar="WHAT", help="FILE.py:CLASS or package.module:CLASS")
    parser.add_argument("-s", "--size", type=parse_size, help="pass size=SIZE (4096, 64K, 1G ...) to the class")
    parser.add_argument(
        "-a",
        "--arg",
        metavar="NAME=VALUE",
        type=_parse_argument,
        action="append",
        default=[],
        help="pass another argument to the class: a Python literal, or else a string; may be repeated",
    )
    parser.add_argument(
        "-n", "--number", "--id", dest="id", type=int, help="device number (default: the lowest free one)"
    )
    parser.add_argument("-q", "--queues", type=int, default=1, help="number of hardware queues (default: 1)")
    parser.add_argument("-d", "--depth", type=int, default=128, help="requests in flight per queue (default: 128)")
    parser.add_argument(
        "-w", "--workers", type=int, help="number of threads that call plain methods, for methods that block"
    )
    parser.add_argument(
        "--coalesce-usecs",
        metavar="N",
        type=int,
        default=0,
        help="coalesce requests: under load, wait up to N microseconds and handle what has arrived as one batch, for "
        "less work per request and more latency (default: 0)",
    )
    parser.add_argument(
        "-R",
        "--reload",
        action="store_true",
        help="replace the running code whenever the source file changes, without failing a request or unmounting "
        "(Linux 6.16, or this project's driver)",
    )
    parser.epilog = (
        "{dev} in COMMAND is replaced by the device's path, which is also in the environment variable UBLK_DEV."
    )
    return parser


def _description() -> dict[str, Any]:
    """Describe ``ublk run`` for the help text, the man pages and the shell completions."""
    parser = _parser()
    arguments = []
    for action in parser._actions:
        names = list(action.option_strings)
        if "--help" not in names:
            value = None if action.nargs == 0 else str(action.metavar or action.dest.upper())
            arguments.append({"names": names, "value": value, "help": action.help or ""})
    return {
        "name": "run",
        "about": "Serve a block device written in Python, or run a command on it",
        "description": f"{parser.description}\n\n{parser.epilog}",
        "usage": parser.usage or "",
        "arguments": arguments,
    }


def _run(arguments: Sequence[str]) -> int:
    options = list(arguments)
    command: list[str] | None = None
    if "--" in options:
        at = options.index("--")
        options, command = options[:at], options[at + 1 :]
    parser = _parser()
    try:
        parsed = parser.parse_args(options)
        if command is not None and not command:
            parser.error("no command given after --")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2
    shape: dict[str, Any] = {"queues": parsed.queues, "depth": parsed.depth, "id": parsed.id}
    serving: dict[str, Any] = {"workers": parsed.workers, "coalesce_usecs": parsed.coalesce_usecs}
    make = functools.partial(_make, parsed.what, parsed.size, parsed.arg)
    try:
        target = make()
        with contextlib.ExitStack() as stack:
            if parsed.reload:
                source = Source(inspect.getfile(type(target)))
                reloader = Reloader(target, make, source, **serving)
                reloader.start(**shape)
                stack.callback(reloader.close)
            else:
                reloader = None
                device = stack.enter_context(target.start(**shape, **serving))

            def running() -> Device:
                return device if reloader is None else reloader.device

            if command is None:
                print(running().path, flush=True)
                if reloader is None:
                    device.wait()
                else:
                    while not reloader.wait(POLL_SECONDS):
                        reloader.look()
                return 0
            return _run_command(command, running, reloader)
    except (_UsageError, UblkError, ValueError, TypeError) as error:
        print_error(f"ublk: {_describe(error)}")
        return 1
    except KeyboardInterrupt:
        return 130 if command else 0
    except _signals.Terminated as terminated:
        return int(terminated.code or 0) if command else 0


def _describe(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, UblkError) and error.strerror else str(error)


def _make(what: str, size: int | None, arguments: Sequence[tuple[str, Any]]) -> BlockDevice:
    """Import the class and create an instance."""
    place, colon, name = what.rpartition(":")
    if not colon or not place or not name:
        raise _UsageError(f"{what!r} is neither FILE.py:CLASS nor package.module:CLASS")
    module = _import(place)
    try:
        made = getattr(module, name)
    except AttributeError:
        raise _UsageError(f"{place} does not define {name}") from None
    if not (isinstance(made, type) and issubclass(made, BlockDevice)):
        raise _UsageError(f"{what} is not a subclass of ublk.BlockDevice")
    keywords = dict(arguments)
    if size is not None:
        keywords["size"] = size
    try:
        return made(**keywords)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        hint = " (does it need --size or --arg?)" if isinstance(error, TypeError) else ""
        raise _UsageError(f"{name}({given}): {type(error).__name__}: {error}{hint}") from error


def _import(place: str) -> ModuleType:
    if not place.endswith(".py"):
        _search(os.getcwd())
        with _import_errors(place):
            return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise _UsageError(f"{place}: no such file")
    # Like for a script, modules in its directory can be imported.
    _search(str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise _UsageError(f"{place} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with _import_errors(place):
        spec.loader.exec_module(module)
    return module


def _search(place: str) -> None:
    if place not in sys.path:
        sys.path.insert(0, place)


@contextlib.contextmanager
def _import_errors(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logging.getLogger("ublk").info("importing %s", place, exc_info=error)
        raise _UsageError(f"importing {place}: {type(error).__name__}: {error}") from error


def _run_command(command: Sequence[str], running: Callable[[], Device], reloader: Reloader | None) -> int:
    """Run a command on the device and return its exit status like a shell."""
    path = running().path
    words = [word.replace("{dev}", path) for word in command]
    environment = {**os.environ, "UBLK_DEV": path}
    child: subprocess.Popen[bytes] | None = None
    try:
        try:
            # A signal in between would leave a command that is not known here.
            with _signals.deferred():
                child = subprocess.Popen(words, env=environment)
        except OSError as error:
            print_error(f"ublk: {words[0]}: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126
        status = _wait(child, reloader)
    except BaseException:
        if child is not None:
            try:
                _end_command(child, running)
            except BaseException:
                child.kill()
                raise
        raise
    if not running().running:
        print_error(f"ublk: {path} ended before the command did")
        return status or 1
    return status if status >= 0 else 128 - status


def _end_command(child: subprocess.Popen[bytes], running: Callable[[], Device]) -> None:
    """End the command before the device, if possible."""
    # A second signal ends the grace period.
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt, _signals.Terminated):
        # The command receives Ctrl-C from the terminal, but not other signals.
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        child.wait(_COMMAND_GRACE)
        return
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_KILL_GRACE)
        return
    # It may wait for the disk in the kernel, and ends only when its requests do.
    try:
        running().stop()
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_KILL_GRACE)


def _wait(child: subprocess.Popen[bytes], reloader: Reloader | None) -> int:
    """Wait until the command ends, and look for new code meanwhile."""
    if reloader is None:
        return child.wait()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(POLL_SECONDS)
        reloader.look()
