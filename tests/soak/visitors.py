"""Visitors: each asks again and again, checks every byte, and tells what didn't fit."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from house import House, Agent
from service import PIECE, body, chunk, pattern, read_head

PATIENCE = 30.0
"""Seconds that any one step of a visitor may take: less than the proxy's own limits."""

BROKEN = (OSError, EOFError, asyncio.TimeoutError, asyncio.LimitOverrunError)
"""How a connection that broke shows."""


class Wrong(Exception):
    """An answer that no fault explains: another's, or not what was asked for."""


class Refused(Exception):
    """The proxy's own answer."""


@dataclass
class Trouble:
    """A request that failed."""

    agent: str
    kind: str
    begun: float
    ended: float
    text: str
    wrong: bool


@dataclass
class Tally:
    """What all visitors have met."""

    done: Counter[str] = field(default_factory=Counter)
    explained: Counter[str] = field(default_factory=Counter)
    troubles: list[Trouble] = field(default_factory=list)
    small_ms: list[float] = field(default_factory=list)
    body_bytes: int = 0


class Crowd:
    """All visitors; they share a tally and the numbers of their requests."""

    def __init__(self, house: House, seed: int):
        self.house = house
        self.seed = seed
        self.tally = Tally()
        self.ids = itertools.count(1)
        self.stopping = asyncio.Event()

    async def run(self, count: int, seconds: float) -> None:
        """Lets so many visitors come for a while, and waits until the last has gone."""
        self.stopping.clear()
        tasks = [asyncio.create_task(self.visit(number)) for number in range(count)]
        await asyncio.sleep(seconds)
        self.stopping.set()
        await asyncio.gather(*tasks)

    async def visit(self, number: int) -> None:
        dice = random.Random(f"{self.seed} {number} {next(self.ids)}")
        while not self.stopping.is_set():
            agent = dice.choice(self.house.agents)
            kind = dice.choices(
                ["small", "download", "upload", "echo", "drip", "slow", "abort", "idle"],
                [30, 12, 10, 6, 4, 6, 12, 4],
            )[0]
            begun = time.monotonic()
            try:
                await Visit(self, agent, dice).run(kind)
                self.tally.done[kind] += 1
            except (Wrong, Refused, *BROKEN) as error:
                text = f"{type(error).__name__}: {error}"
                wrong = isinstance(error, Wrong)
                ended = time.monotonic()
                self.tally.troubles.append(Trouble(agent.id, kind, begun, ended, text, wrong))
                # Whoever is refused tries again, and not at once.
                await asyncio.sleep(dice.uniform(0.02, 0.2))


class Visit:
    """One connection."""

    def __init__(self, crowd: Crowd, agent: Agent, dice: random.Random):
        self.crowd = crowd
        self.agent = agent
        self.dice = dice

    async def run(self, kind: str) -> None:
        connecting = asyncio.open_connection("127.0.0.1", self.agent.port, limit=4 * PIECE)
        self.reader, self.writer = await within(connecting)
        try:
            await getattr(self, kind)()
        finally:
            # What isn't taken yet isn't waited for.
            self.writer.transport.abort()

    # --- What visitors do ---------------------------------------------------------------------

    async def small(self) -> None:
        for _ in range(self.dice.randint(1, 30)):
            begun = time.monotonic()
            await self.ask("GET", "/small")
            if await self.read_all() != b"small\n":
                raise Wrong("another body than asked for")
            if self.agent.steady:
                self.crowd.tally.small_ms.append((time.monotonic() - begun) * 1000)

    async def download(self) -> None:
        await self.check_pattern(self.dice.choice([1, 1000, 100_000, 1 << 20, 4 << 20]))

    async def slow(self) -> None:
        """Reads a part of it at leisure, and then the rest, or none of it."""
        await self.check_pattern(1 << 20, pause=self.dice.uniform(0.05, 0.3))

    async def upload(self) -> None:
        length = self.dice.choice([0, 1, 5000, 300_000, 2 << 20])
        seed = str(self.dice.random())
        block, digest, left = pattern(seed), hashlib.sha256(), length
        chunked = self.dice.random() < 0.5
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {length}"
        await self.send_head("POST", "/sink", framing)
        while left:
            piece = block[:left]
            left -= len(piece)
            digest.update(piece)
            self.writer.write(chunk(piece) if chunked else piece)
            await within(self.writer.drain())
        if chunked:
            self.writer.write(b"0\r\n\r\n")
        await self.read_answer()
        if await self.read_all() != f"{length} {digest.hexdigest()}".encode():
            raise Wrong("the service got another body than was sent")
        self.crowd.tally.body_bytes += length

    async def echo(self) -> None:
        """Sends and reads at once."""
        length, block = self.dice.choice([1000, 200_000, 1 << 20]), pattern(str(self.dice.random()))
        sent = hashlib.sha256()
        await self.send_head("POST", "/echo", "Transfer-Encoding: chunked")

        async def send() -> None:
            left = length
            while left:
                piece = block[: min(left, self.dice.randint(1, PIECE))]
                left -= len(piece)
                sent.update(piece)
                self.writer.write(chunk(piece))
                await within(self.writer.drain())
            self.writer.write(b"0\r\n\r\n")

        sending = asyncio.create_task(send())
        try:
            await self.read_answer()
            came = await self.read_all()
            await within(sending)
            if hashlib.sha256(came).digest() != sent.digest():
                raise Wrong("something else came back than was sent")
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        self.crowd.tally.body_bytes += 2 * length

    async def drip(self) -> None:
        count = self.dice.randint(1, 20)
        await self.ask("GET", f"/drip/{count}")
        if await self.read_all() != b"".join(b"line %d\n" % number for number in range(count)):
            raise Wrong("another body than asked for")

    async def abort(self) -> None:
        """Leaves in the middle: of a head, of an upload, of a download, or while it waits."""
        await asyncio.sleep(self.dice.uniform(0, 0.05))
        how = self.dice.randrange(4)
        if how == 0:
            self.writer.write(b"GET /small HTT")
        elif how == 1:
            await self.send_head("POST", "/sink", "Content-Length: 1000000")
            self.writer.write(bytes(100_000))
        elif how == 2:
            await self.send_head("GET", "/bytes/4000000/abort")
            await within(self.reader.read(PIECE))
        else:
            await self.send_head("GET", "/drip/1000")
        await asyncio.sleep(self.dice.uniform(0, 0.2))

    async def idle(self) -> None:
        """A connection that is kept, and used again after a while."""
        await self.small()
        await asyncio.sleep(self.dice.uniform(0.2, 2))
        await self.small()

    # --- How they do it -----------------------------------------------------------------------

    async def check_pattern(self, length: int, pause: float = 0.0) -> None:
        seed = str(self.dice.random())
        await self.ask("GET", f"/bytes/{length}/{seed}")
        block, seen = pattern(seed), 0
        async for piece in self.pieces():
            for at in range(0, len(piece), PIECE):
                part = piece[at : at + PIECE]
                start = (seen + at) % PIECE
                if (block + block)[start : start + len(part)] != part:
                    raise Wrong("a byte of another body")
            seen += len(piece)
            if pause and seen < length / 2:
                await asyncio.sleep(pause)
        if seen != length:
            raise Wrong(f"{seen} bytes of {length}, and a clean end")
        self.crowd.tally.body_bytes += length

    async def ask(self, method: str, target: str) -> None:
        await self.send_head(method, target)
        await self.read_answer()

    async def send_head(self, method: str, target: str, framing: str | None = None) -> None:
        self.id = f"{next(self.crowd.ids)}"
        lines = [f"{method} {target} HTTP/1.1", "Host: soak", f"X-Soak-Id: {self.id}"]
        lines += [framing] if framing else []
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        await within(self.writer.drain())

    async def read_answer(self) -> None:
        first, self.headers = await within(read_head(self.reader))
        status = first.split(" ")[1]
        if "x-silo-error" in self.headers:
            raise Refused(f"{status} {self.headers['x-silo-error']}")
        if status != "200":
            raise Wrong(f"status {status}")
        told = self.headers.get("x-service"), self.headers.get("x-soak-id")
        if told != (self.agent.service, self.id):
            raise Wrong(f"the answer of {told} for request {self.id} to {self.agent.service}")

    async def pieces(self):
        pieces = body(self.reader, self.headers)
        while True:
            try:
                piece = await within(anext(pieces))
            except StopAsyncIteration:
                return
            except ValueError:
                # A chunk's size that is cut off, by the connection's end.
                raise EOFError("the body is cut off") from None
            yield piece

    async def read_all(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


async def within(awaitable):
    """The same, but not for longer than anybody should have to wait."""
    return await asyncio.wait_for(awaitable, PATIENCE)
