# SPDX-License-Identifier: MIT OR Apache-2.0

"""Several interpreters in one process."""

import subprocess
import sys

PROGRAM = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import ublk
from ublk import testing

class Disk(ublk.BlockDevice):
    def read(self, offset, buf):
        buf[:] = b"r" * len(buf)

with testing.File(Disk(size=1 << 20)) as file:
    other = interpreters.create()
    interpreters.run_string(other, '''
try:
    import ublk
except ImportError as error:
    print(error, flush=True)
''')
    interpreters.destroy(other)
    print(file.read(4))
"""


def test_devices_do_not_end_with_another_interpreter():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=120)
    refusal, content = done.stdout.splitlines()
    # Since Python 3.12 the interpreter refuses the module itself.
    assert "main interpreter only" in refusal or "does not support loading in subinterpreters" in refusal, done.stderr
    assert content == "b'rrrr'"
    assert done.returncode == 0
