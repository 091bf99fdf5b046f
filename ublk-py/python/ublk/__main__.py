# SPDX-License-Identifier: MIT OR Apache-2.0

"""``python -m ublk``: the ``ublk`` command."""

from ublk._cli import entry

entry()
