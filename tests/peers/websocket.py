"""Python's websockets as a service or as a visitor, for websocket.rs.

    websocket.py server             prints its port and serves until it is killed
    websocket.py client HOST:PORT BYTES
                                    prints what it saw, as JSON; a message has up to BYTES

What a path does is the same in websocket.js: /echo sends back each message, /pieces in fragments,
/headers says which header lines the service got, /ping waits for a pong, /close?CODE closes with
the code when something comes, /drop closes the connection without a word, /refuse is answered by
401.
"""

import asyncio
import hashlib
import http
import json
import logging
import random
import sys

import websockets

# What isn't the same from one connection to the next, or is what the tunnel is there to add.
PASSING = {"date", "host", "sec-websocket-key", "sec-websocket-accept", "x-request-id"}
REASON = "genug gr\u00fc\u00dfe"


def lines(headers):
    kept = [(name.lower(), value) for name, value in headers.raw_items()]
    kept = [
        [name, value.lower() if name in ("connection", "upgrade") else value]
        for name, value in kept
        if name not in PASSING and not name.startswith("x-forwarded-")
    ]
    return sorted(kept)


async def handle(socket):
    path = socket.path
    if path == "/headers":
        await socket.send(json.dumps(lines(socket.request_headers)))
    elif path == "/ping":
        await (await socket.ping(b"are you there"))
        await socket.send("ponged")
    elif path == "/drop":
        await socket.recv()
        socket.transport.abort()
    elif path.startswith("/close?"):
        await socket.recv()
        await socket.close(int(path[len("/close?") :]), REASON)
    async for message in socket:
        if path == "/pieces":
            await socket.send([message[:1], message[1:7], message[7:]])
        else:
            await socket.send(message)


async def refuse(path, _headers):
    if path == "/refuse":
        return http.HTTPStatus.UNAUTHORIZED, [("WWW-Authenticate", 'Basic realm="x"')], b"who are you?"


async def serve():
    async with websockets.serve(
        handle,
        "127.0.0.1",
        0,
        process_request=refuse,
        subprotocols=["superchat", "chat"],
        max_size=None,
    ) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Future()


def digest(message):
    kind = "text" if isinstance(message, str) else "binary"
    data = message.encode() if kind == "text" else message
    return [kind, len(data), hashlib.sha256(data).hexdigest()]


async def visit(address, most):
    seen = []

    def connect(path, **options):
        return websockets.connect(f"ws://{address}{path}", max_size=None, **options)

    async def echoed(socket, message, sent=None):
        await socket.send(message if sent is None else sent)
        back = await socket.recv()
        assert back == message, (len(back), len(message))
        seen.append(digest(back))

    generator = random.Random(7)
    sizes = [0, 1, 125, 126, 65_535, 65_536, 300_000, most]
    for compression in "deflate", None:
        async with connect("/echo", compression=compression) as socket:
            seen.append(lines(socket.response_headers))
            seen.append([repr(extension) for extension in socket.extensions])
            for size in sizes:
                # What is large and doesn't repeat takes long to compress.
                if size <= 1_000_000 or not compression:
                    await echoed(socket, generator.randbytes(size))
                if size <= 1_000_000 or compression:
                    await echoed(socket, "\u00e9" * (size // 2))
            # In fragments, with a ping between them.
            await echoed(socket, "abcdefghijk", ["abc", "", "defghijk"])

            async def pieces():
                yield b"one "
                pong = await socket.ping(b"between")
                await pong
                yield b"two"

            await echoed(socket, b"one two", pieces())
            # Many on the way at once.
            for number in range(300):
                await socket.send(f"number {number}")
            for number in range(300):
                assert await socket.recv() == f"number {number}"
            await socket.close(4000, REASON)
        seen.append([socket.close_code, socket.close_reason])
    async with connect("/pieces") as socket:
        await echoed(socket, "in pieces on the way back")
        await echoed(socket, b"\x00" * 100_000)
    async with connect("/ping") as socket:
        seen.append(await socket.recv())
    async with connect("/headers", user_agent_header="\u00b5/1") as socket:
        seen.append(json.loads(await socket.recv()))
    for offer in ["chat"], ["other"], ["chat", "superchat"]:
        async with connect("/echo", subprotocols=offer) as socket:
            seen.append([offer, socket.subprotocol])
    for path in "/close?1000", "/close?1011", "/close?4999", "/drop":
        async with connect(path) as socket:
            await socket.send("x")
            try:
                await socket.recv()
            except websockets.ConnectionClosed:
                pass
            seen.append([path, socket.close_code, socket.close_reason])
    try:
        await connect("/refuse")
        raise AssertionError("it isn't refused")
    except websockets.InvalidStatusCode as error:
        kept = [line for line in lines(error.headers) if line[0] == "www-authenticate"]
        seen.append(["refused", error.status_code, kept])
    print(json.dumps(seen), flush=True)


# A visitor who leaves is no news to a service here.
logging.disable()
if sys.argv[1] == "server":
    asyncio.run(serve())
else:
    asyncio.run(visit(sys.argv[2], int(sys.argv[3])))
