# SPDX-License-Identifier: MIT OR Apache-2.0
"""A RAM disk for nbdkit's Python plugin, equivalent to the example ramdisk.py."""

API_VERSION = 2
_data = bytearray()


def thread_model():
    import nbdkit

    return nbdkit.THREAD_MODEL_PARALLEL


def config(key, value):
    if key == "size":
        _data.extend(bytes(int(value)))


def config_complete():
    pass


def open(readonly):
    return 1


def get_size(h):
    return len(_data)


def pread(h, buf, offset, flags):
    buf[:] = _data[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    _data[offset : offset + len(buf)] = buf
