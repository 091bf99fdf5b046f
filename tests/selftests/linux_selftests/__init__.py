# SPDX-License-Identifier: MIT OR Apache-2.0
"""Linux's own selftests of ublk: built here, run in the virtual machine, judged by more than their exit status."""
