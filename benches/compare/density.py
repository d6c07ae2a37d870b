"""Many agents on one server: descriptors, memory, time to register, the admin port under load.

Driven by `silo-proxy swarm --server A --count N`: N agents in one process, each with a connection and a
port of its own and a built-in service behind it, connected until SIGINT.
"""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median

import loads
from peers import Lab, agent_ports, silo_server_config
from process import Failed, Process, get, wait_http, wait_until

SPARE_PORTS = 64
"""More ports than agents, should another program hold some."""

DESCRIPTORS = 20_000
REGISTER_SECONDS = 10.0
IDLE_AGENT_KB = 16.0
LEFT_MB = 20.0
POLLS_PER_SECOND = 10
POLL_P99_MS = 50.0


@dataclass
class DensityFigure:
    """One line of the density table."""

    key: str
    title: str
    goal: str
    text: str | None = None
    reached: bool | None = None
    reason: str = ""
    raw: object = None

    def set(self, text: str, reached: bool | None, raw: object) -> None:
        self.text, self.reached, self.raw = text, reached, raw


@dataclass
class Site:
    """A server with a swarm connected to it."""

    server: Process
    admin: int
    tunnel: int
    swarm: Process | None = None
    ports: list[int] = field(default_factory=list)

    def memory(self) -> int:
        return sum(self.server.memory().values())


def figures(agents: int) -> dict[str, DensityFigure]:
    """The rows, not measured yet."""
    n = f"{agents:,}"
    rows = [
        DensityFigure("registered", f"{n} agents registered, in seconds", f"all, within {REGISTER_SECONDS:g} s"),
        DensityFigure("descriptors", f"the server's file descriptors with {n} agents", f"≤ {DESCRIPTORS:,}"),
        DensityFigure("idle", "server memory a never-used agent, without TLS", f"≤ {IDLE_AGENT_KB:g} KB"),
        DensityFigure("used", "the same after a request to each", ""),
        DensityFigure("tls", "server memory a never-used agent, with TLS", ""),
        DensityFigure("accept", f"new connections/s to one port with {n} bound, against a one-port server", "≥ 0.9"),
        DensityFigure("poll", f"p99 of GET /agents with {n} agents, at full load", f"≤ {POLL_P99_MS:g} ms"),
        DensityFigure("cost", f"throughput lost to {POLLS_PER_SECOND} such polls a second", "≤ 10 %"),
        DensityFigure("left", f"server memory after all {n} left, against before they came", f"≤ {LEFT_MB:g} MB"),
    ]
    return {row.key: row for row in rows}


def not_measured(agents: int, reason: str) -> list[DensityFigure]:
    rows = figures(agents)
    for row in rows.values():
        row.reason = reason
    return list(rows.values())


def measure(lab: Lab, agents: int, rounds: int) -> list[DensityFigure]:
    """All rows; what comes after a failure keeps its reason."""
    rows = figures(agents)
    rows["tls"].reason = "swarm speaks plain TCP"
    try:
        fill(lab, agents, rounds, rows)
    except (Failed, OSError, ValueError, KeyError) as failure:
        for row in rows.values():
            if row.text is None and not row.reason:
                row.reason = str(failure) or type(failure).__name__
    return list(rows.values())


def fill(lab: Lab, agents: int, rounds: int, rows: dict[str, DensityFigure]) -> None:
    say(lab, "density: a one-port server")
    alone = one_port_rates(lab, rounds)

    say(lab, f"density: {agents} agents")
    site = start_server(lab, "many", agents + SPARE_PORTS)
    agent_ports(site.admin)
    empty = settled_memory(site)
    seconds, count = start_swarm(lab, site, "many", agents, 60.0)
    rows["registered"].set(
        f"{count:,} in {seconds:.1f} s",
        count == agents and seconds <= REGISTER_SECONDS,
        {"seconds": seconds, "registered": count, "swarm_says": site.swarm.last_words()},
    )
    if count == 0:
        raise Failed("no agent was registered")
    descriptors = site.server.descriptors()
    rows["descriptors"].set(f"{descriptors:,}", descriptors <= DESCRIPTORS and count == agents, descriptors)
    idle = (settled_memory(site) - empty) / count / 1000
    rows["idle"].set(f"{idle:.1f} KB", idle <= IDLE_AGENT_KB, idle)

    port = site.ports[len(site.ports) // 2]
    wait_http(port, [site.server, site.swarm])
    crowded = [loads.ab(port, 30_000, 6).per_second for _ in range(rounds)]
    polls(lab, site, port, rounds, rows)

    say(lab, "density: a request to each agent")
    before = settled_memory(site)
    visited = visit(site)
    if visited:
        used = idle + (settled_memory(site) - before) / visited / 1000
        rows["used"].set(f"{used:.1f} KB ({visited:,} agents)", None, used)

    say(lab, "density: all leave")
    site.swarm.interrupt()
    wait_until("empty GET /agents", lambda: True if not agent_ports(site.admin) else None, [site.server], 60.0)
    left = (lowest_memory(site, 15.0) - empty) / 1e6
    rows["left"].set(f"{left:+.1f} MB", left <= LEFT_MB, left)
    stop(lab, site)

    alone += one_port_rates(lab, rounds)
    share = median(crowded) / median(alone)
    text = f"{share:.2f} ({median(crowded):,.0f} of {median(alone):,.0f})"
    rows["accept"].set(text, share >= 0.9, {"crowded": crowded, "alone": alone})


def one_port_rates(lab: Lab, rounds: int) -> list[float]:
    """New connections a second to a server with one agent."""
    site = start_server(lab, "one", 1)
    start_swarm(lab, site, "one", 1, 15.0)
    if not site.ports:
        raise Failed(f"swarm: no agent was registered: {site.swarm.last_words()}")
    wait_http(site.ports[0], [site.server, site.swarm])
    rates = [loads.ab(site.ports[0], 30_000, 6).per_second for _ in range((rounds + 1) // 2)]
    stop(lab, site)
    return rates


def polls(lab: Lab, site: Site, port: int, rounds: int, rows: dict[str, DensityFigure]) -> None:
    """Throughput with and without a poller, in turn, and how long the polls took."""
    quiet: list[float] = []
    polled: list[float] = []
    times: list[float] = []
    for turn in range(rounds):
        say(lab, f"density: polls, round {turn + 1} of {rounds}")
        quiet.append(loads.wrk(port, 64, 5).per_second)
        with Poller(site.admin) as poller:
            polled.append(loads.wrk(port, 64, 5).per_second)
        times += poller.times
    if not times:
        raise Failed("no poll of GET /agents came back")
    p99 = sorted(times)[min(int(len(times) * 0.99), len(times) - 1)] * 1000
    rows["poll"].set(f"{p99:.1f} ms ({len(times)} polls)", p99 <= POLL_P99_MS, times)
    lost = 1 - median(polled) / median(quiet)
    rows["cost"].set(f"{lost:.1%}", lost <= 0.10, {"quiet": quiet, "polled": polled})


class Poller:
    """Asks GET /agents ten times a second over one connection, and reads the answers without parsing them."""

    def __init__(self, admin: int):
        self.times: list[float] = []
        self.done = threading.Event()
        self.socket = socket.create_connection(("127.0.0.1", admin), timeout=10)
        self.thread = threading.Thread(target=self.poll, daemon=True)

    def __enter__(self) -> Poller:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join(15)
        self.socket.close()

    def poll(self) -> None:
        buffer = bytearray(1 << 20)
        due = time.monotonic()
        while not self.done.is_set():
            begun = time.monotonic()
            self.socket.sendall(b"GET /agents HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            if not self.read_answer(buffer):
                return
            # A late answer delays the next poll and is counted from when that poll was due.
            self.times.append(time.monotonic() - min(due, begun))
            due += 1 / POLLS_PER_SECOND
            self.done.wait(max(due - time.monotonic(), 0))

    def read_answer(self, buffer: bytearray) -> bool:
        head = b""
        while b"\r\n\r\n" not in head:
            more = self.socket.recv(65_536)
            if not more:
                return False
            head += more
        lines, _, body = head.partition(b"\r\n\r\n")
        if not lines.startswith(b"HTTP/1.1 200"):
            return False
        fields = dict(line.split(b":", 1) for line in lines.lower().split(b"\r\n")[1:])
        if b"content-length" not in fields:
            return self.read_chunks(buffer, body)
        left = int(fields[b"content-length"]) - len(body)
        while left > 0:
            count = self.socket.recv_into(buffer, min(left, len(buffer)))
            if count == 0:
                return False
            left -= count
        return True

    def read_chunks(self, buffer: bytearray, end: bytes) -> bool:
        """To the last chunk, with which no list of agents can be confused."""
        last = b"\r\n0\r\n\r\n"
        while not end.endswith(last):
            count = self.socket.recv_into(buffer)
            if count == 0:
                return False
            end = (end + buffer[max(count - len(last), 0) : count])[-len(last) :]
        return True


def start_server(lab: Lab, name: str, ports: int) -> Site:
    binary = lab.binary("silo-proxy")
    admin, tunnel, first = lab.ports.take(), lab.ports.take(), lab.ports.take(ports)
    config = lab.directory / f"density-{name}.yaml"
    config.write_text(silo_server_config(admin, tunnel, first, first + ports - 1))
    server = lab.processes.start(f"density-{name}-server", [binary, "server", "--config", config])
    wait_until("admin port", lambda: get(admin, "/health")[0] == 200 or None, [server])
    return Site(server, admin, tunnel)


def start_swarm(lab: Lab, site: Site, name: str, count: int, seconds: float) -> tuple[float, int]:
    """Starts the agents; the seconds until all are listed (or the bound), and how many are."""
    begun = time.monotonic()
    argv = [lab.binary("silo-proxy"), "swarm", "--server", f"127.0.0.1:{site.tunnel}", "--count", count]
    site.swarm = lab.processes.start(f"density-{name}-swarm", argv)

    def all_listed() -> float | None:
        _, body = get(site.admin, "/agents")
        return time.monotonic() - begun if json.loads(body)["count"] >= count else None

    try:
        # Asked rarely: the answer is large, and asking must not slow down what it waits for.
        what, both = f"{count} agents in GET /agents", [site.server, site.swarm]
        taken = wait_until(what, all_listed, both, seconds, pause=0.2)
    except Failed:
        if not site.server.alive or not site.swarm.alive:
            raise
        taken = time.monotonic() - begun
    site.ports = sorted(agent_ports(site.admin).values())
    return taken, len(site.ports)


def stop(lab: Lab, site: Site) -> None:
    for process in (site.swarm, site.server):
        if process is not None:
            lab.processes.stop(process)


def visit(site: Site) -> int:
    """One request to each agent, or to as many as the swarm has descriptors for; says how many.

    In the swarm's process an agent has one for its tunnel, and one visited two more for a while: the
    connection to its service, at both ends.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    ports = site.ports[: max((limit - len(site.ports) - 500) // 2, 0)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda port: get(port)[0], ports))
    if bad := sum(status != 200 for status in answers):
        raise Failed(f"{bad} of {len(answers)} agents didn't answer 200")
    return len(ports)


def settled_memory(site: Site) -> int:
    """Memory once it has moved by less than 1 % within a second, at most 10 s from now."""
    last = site.memory()
    for _ in range(10):
        time.sleep(1.0)
        now = site.memory()
        if abs(now - last) <= last // 100:
            return now
        last = now
    return last


def lowest_memory(site: Site, seconds: float) -> int:
    """The lowest within some seconds: an allocator gives pages back a little later."""
    lowest, deadline = site.memory(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.5)
        lowest = min(lowest, site.memory())
    return lowest


def say(lab: Lab, text: str) -> None:
    print(text, file=lab.out, flush=True)
