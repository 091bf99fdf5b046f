# SPDX-License-Identifier: MIT OR Apache-2.0

"""Read-only disk whose bytes are fetched from a web server by range requests, many of them concurrently.

Run it with ``ublk run http_range.py:HttpDisk -a url=http://host/disk.img``, and mount it read-only.
"""

import asyncio
import errno
import urllib.request
from urllib.parse import urlsplit

import ublk


class HttpDisk(ublk.BlockDevice):
    """Disk with the content of a URL (plain HTTP)."""

    def __init__(self, url):
        self.url = urlsplit(url)
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            if answer.headers.get("Accept-Ranges") != "bytes":
                raise ValueError(f"{url}: the server does not give parts of it")
            size = int(answer.headers["Content-Length"])
        super().__init__(size=size // 512 * 512)

    async def read(self, offset, buf):
        reader, writer = await asyncio.open_connection(self.url.hostname, self.url.port or 80)
        try:
            writer.write(
                f"GET {self.url.path or '/'} HTTP/1.1\r\nHost: {self.url.netloc}\r\nConnection: close\r\n"
                f"Range: bytes={offset}-{offset + len(buf) - 1}\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 206 " not in head.split(b"\r\n", 1)[0]:
                raise OSError(errno.EREMOTEIO, f"the server says {head.splitlines()[0]!r}")
            buf[:] = await reader.readexactly(len(buf))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise OSError(errno.EREMOTEIO, str(error)) from error
        finally:
            writer.close()
