"""The services behind the agents, in one process: one listener for each, and each says who it is.

Usage: service.py PORT... ; the service on the first port is called s0, the next s1, and so on. What they answer
can be checked by whoever asked: every answer names the service and the request, and bodies follow from a seed.

  GET  /small            a line of text
  GET  /bytes/SIZE/SEED  so many bytes of the seed's pattern
  GET  /drip/COUNT       a chunked answer, a line every 50 ms
  POST /sink             reads all, answers with the length and the SHA-256 of it
  POST /echo             chunked, as it comes
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator

PIECE = 64 * 1024


def pattern(seed: str) -> bytes:
    """A block that no other seed has; a body is this again and again."""
    return hashlib.shake_128(seed.encode()).digest(PIECE)


async def read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    """The first line and the header lines, names in lower case."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    pairs = (line.split(":", 1) for line in lines)
    return first, {name.lower(): value.strip() for name, value in pairs}


async def body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The pieces of a message's body; it must say how long it is."""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readline() != b"\r\n":
            pass
        return
    left = int(headers.get("content-length", "0"))
    while left:
        piece = await reader.read(min(left, PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Service:
    def __init__(self, name: str):
        self.name = name

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self.answer(reader, writer)
        except (OSError, EOFError, ValueError):
            # The agent has closed the connection, perhaps in the middle of something.
            pass
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, headers = await read_head(reader)
        _, target, _ = first.split(" ")
        what, *arguments = target.strip("/").split("/")
        common = f"HTTP/1.1 200 OK\r\nX-Service: {self.name}\r\nX-Soak-Id: {headers['x-soak-id']}\r\n"

        def begin(framing: str) -> None:
            writer.write(f"{common}{framing}\r\n\r\n".encode())

        if what == "small":
            begin("Content-Length: 6")
            writer.write(b"small\n")
        elif what == "bytes":
            left, block = int(arguments[0]), pattern(arguments[1])
            begin(f"Content-Length: {left}")
            while left:
                writer.write(block[:left])
                left -= min(left, PIECE)
                await writer.drain()
        elif what == "drip":
            begin("Transfer-Encoding: chunked")
            for number in range(int(arguments[0])):
                writer.write(chunk(b"line %d\n" % number))
                await writer.drain()
                await asyncio.sleep(0.05)
            writer.write(b"0\r\n\r\n")
        elif what == "sink":
            length, digest = 0, hashlib.sha256()
            async for piece in body(reader, headers):
                length += len(piece)
                digest.update(piece)
            text = f"{length} {digest.hexdigest()}".encode()
            begin(f"Content-Length: {len(text)}")
            writer.write(text)
        elif what == "echo":
            begin("Transfer-Encoding: chunked")
            async for piece in body(reader, headers):
                writer.write(chunk(piece))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        else:
            raise ValueError(target)
        await writer.drain()


async def main() -> None:
    servers = [
        await asyncio.start_server(Service(f"s{number}").serve, "127.0.0.1", int(port), backlog=1024)
        for number, port in enumerate(sys.argv[1:])
    ]
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main())
