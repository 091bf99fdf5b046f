# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a program learns that has too little memory for a device's buffers."""

import subprocess
import sys

PROGRAM = """
import errno, resource
import ublk
from ublk import testing

resource.setrlimit(resource.RLIMIT_AS, (600 << 20,) * 2)
try:
    testing.open(ublk.Null(1 << 20), depth=4096)
except ublk.UblkError as error:
    print(errno.errorcode[error.errno])
"""


def test_buffers_that_do_not_fit_into_memory_are_enomem():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "ENOMEM\n", result
