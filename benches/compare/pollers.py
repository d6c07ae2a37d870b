"""Many pollers of GET /agents in one process, each over a connection of its own.

Each asks once a second, evenly spread over the second; one whose answer takes longer asks again at once.
Bodies are read and not looked at. With `whole` every answer is the whole list, the worst case; with `tagged`
every poll names the newest ETag, and gets 304 as long as nothing changes.

Usage: pollers.py PORT COUNT whole|tagged
Prints `ready` when all have been asking for two seconds, and on SIGTERM one line of JSON: `latencies` in
seconds from when a poll was sent (one without its answer yet counts with its age), `answered` whole answers
and 304s, `unchanged` 304s among them, `bytes` read, `seconds` since ready, `cpu` seconds of this process.
"""

from __future__ import annotations

import heapq
import json
import resource
import selectors
import signal
import socket
import sys
import time

PERIOD = 1.0
WARM_UP = 2.0
LAST_CHUNK = b"\r\n0\r\n\r\n"
BUFFER = bytearray(256 * 1024)


class Poller:
    """One connection: waiting until it is due, or for the rest of an answer."""

    def __init__(self, number: int, port: int):
        self.number = number
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setblocking(False)
        self.due = 0.0
        self.sent: float | None = None
        """When the poll under way was sent, if there is one."""
        self.head = b""
        self.left: int | None = None
        """Bytes of the body to come; None while the head isn't there, and for a body in chunks."""
        self.end = b""
        """The last bytes of a body in chunks."""

    def send(self, now: float, request: bytes) -> None:
        self.sent, self.head, self.left, self.end = now, b"", None, b""
        # A request fits into an empty socket's buffer.
        self.socket.send(request)

    def receive(self) -> tuple[int, bytes | None]:
        """Takes what is there: how much, and the answer's head if the answer is whole now."""
        count = self.socket.recv_into(BUFFER)
        if count == 0:
            raise ConnectionError("the admin port closed a connection")
        if b"\r\n\r\n" not in self.head:
            self.head += BUFFER[:count]
            head, found, body = self.head.partition(b"\r\n\r\n")
            if not found:
                return count, None
            self.head = head + found
            length = field(self.head, b"content-length")
            if head.startswith(b"HTTP/1.1 304"):
                self.left = 0
            elif not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(f"a poll was answered {head.splitlines()[0]!r}")
            elif length is not None:
                self.left = int(length) - len(body)
            else:
                self.end = body[-len(LAST_CHUNK) :]
        elif self.left is not None:
            self.left -= count
        else:
            tail = BUFFER[max(count - len(LAST_CHUNK), 0) : count]
            self.end = (self.end + tail)[-len(LAST_CHUNK) :]
        # A list of agents can't be confused with its end: it has no line ends of its own.
        whole = self.end == LAST_CHUNK if self.left is None else self.left == 0
        return count, self.head if whole else None


def field(head: bytes, name: bytes) -> bytes | None:
    """A header's value."""
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip()
    return None


def main() -> None:
    port, count, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    selector = selectors.DefaultSelector()
    pollers = [Poller(number, port) for number in range(count)]
    begin = time.monotonic()
    waiting: list[tuple[float, int]] = []
    for poller in pollers:
        poller.due = begin + PERIOD * poller.number / count
        heapq.heappush(waiting, (poller.due, poller.number))
        selector.register(poller.socket, selectors.EVENT_READ, poller)

    latencies: list[float] = []
    answered = unchanged = received = 0
    tag = b""
    ready_at: float | None = None
    cpu_then = 0.0
    while not stopped:
        now = time.monotonic()
        if ready_at is None and now >= begin + WARM_UP:
            ready_at, cpu_then = now, own_cpu()
            print("ready", flush=True)
        while waiting and waiting[0][0] <= now:
            _, number = heapq.heappop(waiting)
            condition = b"If-None-Match: %s\r\n" % tag if tag and mode == "tagged" else b""
            pollers[number].send(now, b"GET /agents HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % condition)
        pause = min(max(waiting[0][0] - now, 0.0), 0.1) if waiting else 0.1
        for key, _ in selector.select(pause):
            poller = key.data
            taken, head = poller.receive()
            if ready_at is not None:
                received += taken
            if head is None:
                continue
            now = time.monotonic()
            tag = field(head, b"etag") or tag
            if ready_at is not None:
                latencies.append(now - poller.sent)
                answered += 1
                unchanged += head.startswith(b"HTTP/1.1 304")
            poller.sent = None
            poller.due = max(poller.due + PERIOD, now)
            heapq.heappush(waiting, (poller.due, poller.number))
    now = time.monotonic()
    latencies += [now - poller.sent for poller in pollers if poller.sent is not None]
    result = {
        "latencies": latencies,
        "answered": answered,
        "unchanged": unchanged,
        "bytes": received,
        "seconds": now - (ready_at or now),
        "cpu": own_cpu() - cpu_then,
    }
    print(json.dumps(result), flush=True)


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
