"""Many agents on one server: descriptors, memory, time to register, the admin port under load.

Driven by `silo-proxy swarm --server A --count N`: N agents in one process, each with a connection and a
port of its own and a built-in service behind it, connected until SIGINT.
"""

from __future__ import annotations

import json
import math
import resource
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import loads
import machine
from peers import Lab, agent_ports, silo_server_config
from process import Failed, Process, finish_load, get, run_bounded, start_load, wait_http, wait_until

SPARE_PORTS = 64
"""More ports than agents, should another program hold some."""

DESCRIPTORS = 20_000
REGISTER_SECONDS = 10.0
IDLE_AGENT_KB = 16.0
LEFT_MB = 20.0
POLLS_PER_SECOND = 10
POLL_P99_MS = 50.0
CROWD = 1_000
"""Pollers, each of which asks once a second."""

POLLED_SECONDS = 5
"""How long a run with pollers or without them lasts."""

LEASE = "1h"
"""For so long ports stay bound after their agents have left, where they are to."""


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

    name: str
    server: Process
    admin: int
    tunnel: int
    tls: Path | None = None
    """The directory of certificates, with TLS."""
    swarm: Process | None = None
    ports: list[int] = field(default_factory=list)

    def memory(self) -> int:
        return sum(self.server.memory().values())

    def agents_memory(self) -> int:
        return sum(self.swarm.memory().values())


def figures(agents: int) -> dict[str, DensityFigure]:
    """The rows, not measured yet."""
    n = f"{agents:,}"
    goal = f"≤ {POLL_P99_MS:g} ms"
    polled, crowd = f"p99 of GET /agents with {n} agents, at full load", f"{CROWD:,} pollers, once a second each"
    rows = [
        DensityFigure("registered", f"{n} agents registered, in seconds", f"all, within {REGISTER_SECONDS:g} s"),
        DensityFigure("descriptors", f"the server's file descriptors with {n} agents", f"≤ {DESCRIPTORS:,}"),
        DensityFigure("idle", "server memory a never-used agent, without TLS", f"≤ {IDLE_AGENT_KB:g} KB"),
        DensityFigure("used", "the same after a request to each", ""),
        DensityFigure("tls_registered", f"{n} agents registered with TLS, in seconds", ""),
        DensityFigure("tls_idle", "server memory a never-used agent, with TLS", ""),
        DensityFigure("tls_used", "the same after a request to each", ""),
        DensityFigure("port", "a bound port whose agent has left: file descriptors, server memory", ""),
        DensityFigure("accept", f"new connections/s to one port with {n} bound, against a one-port server", "≥ 0.9"),
        DensityFigure("poll", polled, goal),
        DensityFigure("cost", f"throughput lost to {POLLS_PER_SECOND} such polls a second", "≤ 10 %"),
        DensityFigure("tagged", f"{polled}: {crowd}, that send the list's ETag", ""),
        DensityFigure("tagged_cost", "throughput lost to them", ""),
        DensityFigure("whole", f"{polled}: {crowd}, that want the whole list", ""),
        DensityFigure("whole_cost", "throughput lost to them", ""),
        DensityFigure("left", f"server memory after all {n} left, against before they came", f"≤ {LEFT_MB:g} MB"),
    ]
    return {row.key: row for row in rows}


PARTS: dict[str, tuple[str, ...]] = {
    "plain": ("registered", "descriptors", "idle", "used", "accept", "poll", "cost", "left"),
    "tls": ("tls_registered", "tls_idle", "tls_used"),
    "ports": ("port",),
    "crowd": ("tagged", "tagged_cost", "whole", "whole_cost"),
}
"""The parts, each with a server of its own, and the rows that they fill."""


@dataclass
class Run:
    """What all parts share."""

    lab: Lab
    agents: int
    rounds: int
    rows: dict[str, DensityFigure]
    sites: list[Site] = field(default_factory=list)
    """Those that may run."""
    first_port: int | None = None
    """Of a block with one for each agent, in which one server after the other has its agents' ports."""

    def start_server(self, name: str, ports: int, *, lease: str = "0s", tls: Path | None = None) -> Site:
        """A server with so many ports for agents."""
        lab = self.lab
        binary = lab.binary("silo-proxy")
        if self.first_port is None:
            self.first_port = lab.ports.take(self.agents + SPARE_PORTS)
        admin, tunnel = lab.ports.take(), lab.ports.take()
        config = lab.directory / f"density-{name}.yaml"
        last = self.first_port + ports - 1
        config.write_text(silo_server_config(admin, tunnel, self.first_port, last, lease=lease, tls=tls))
        server = lab.processes.start(f"density-{name}-server", [binary, "server", "--config", config])
        site = Site(name, server, admin, tunnel, tls)
        self.sites.append(site)
        wait_until("admin port", lambda: get(admin, "/health")[0] == 200 or None, [server])
        return site

    def start_crowded(self, name: str, *, lease: str = "0s", tls: Path | None = None) -> Site:
        """A server with ports for all agents."""
        return self.start_server(name, self.agents + SPARE_PORTS, lease=lease, tls=tls)

    def stop_all(self) -> None:
        for site in self.sites:
            for process in (site.swarm, site.server):
                if process is not None:
                    self.lab.processes.stop(process)
        self.sites.clear()

    def say(self, text: str) -> None:
        say(self.lab, text)


def measure(lab: Lab, agents: int, rounds: int, parts: set[str]) -> list[DensityFigure]:
    """All rows; in each part what comes after a failure keeps its reason."""
    run = Run(lab, agents, rounds, figures(agents))
    fill = {"plain": plain, "tls": with_tls, "ports": ports_alone, "crowd": crowd_of_pollers}
    for part, keys in PARTS.items():
        reason = "asked for by --density"
        if part in parts:
            try:
                fill[part](run)
            except (Failed, OSError, ValueError, KeyError) as failure:
                reason = str(failure) or type(failure).__name__
                say(lab, f"density: {part}: {reason}")
            finally:
                run.stop_all()
        for key in keys:
            if run.rows[key].text is None:
                run.rows[key].reason = reason
    return list(run.rows.values())


def plain(run: Run) -> None:
    """What agents cost without TLS, at rest and in use, and what remains of them."""
    run.say("density: a one-port server")
    alone = one_port_rates(run)

    run.say(f"density: {run.agents} agents")
    site = run.start_crowded("many")
    empty, seconds, count = come(run, site, run.rows["registered"])
    run.rows["registered"].reached = count == run.agents and seconds <= REGISTER_SECONDS
    descriptors = site.server.descriptors()
    run.rows["descriptors"].set(f"{descriptors:,}", descriptors <= DESCRIPTORS and count == run.agents, descriptors)
    idle = idle_cost(site, empty, count, run.rows["idle"])
    run.rows["idle"].reached = idle.server <= IDLE_AGENT_KB

    port = site.ports[len(site.ports) // 2]
    wait_http(port, [site.server, site.swarm])
    crowded = [loads.ab(port, 30_000, 6).per_second for _ in range(run.rounds)]
    polls(run, site, port)
    used_cost(run, site, idle, run.rows["used"])

    run.say("density: all leave")
    leave(site)
    left = (lowest_memory(site, 15.0) - empty) / 1e6
    run.rows["left"].set(f"{left:+.1f} MB", left <= LEFT_MB, left)
    run.stop_all()

    alone += one_port_rates(run)
    share = median(crowded) / median(alone)
    text = f"{share:.2f} ({median(crowded):,.0f} of {median(alone):,.0f})"
    run.rows["accept"].set(text, share >= 0.9, {"crowded": crowded, "alone": alone})


def with_tls(run: Run) -> None:
    """What agents cost with TLS."""
    run.say(f"density: {run.agents} agents with TLS")
    directory = run.lab.directory / "certs"
    make = [run.lab.binary("silo-proxy"), "certs", "init", "--force", "--host", "127.0.0.1", "--dir", directory]
    words = run_bounded(make, 10)
    if not (directory / "server.pem").is_file():
        raise Failed(f"silo-proxy certs: {loads.last_line(words)}")
    site = run.start_crowded("tls", tls=directory)
    empty, _, count = come(run, site, run.rows["tls_registered"])
    idle = idle_cost(site, empty, count, run.rows["tls_idle"])
    used_cost(run, site, idle, run.rows["tls_used"])


def ports_alone(run: Run) -> None:
    """What a port costs that stays bound for an agent which has left."""
    run.say(f"density: {run.agents} ports without their agents")
    site = run.start_crowded("ports", lease=LEASE)
    before = site.server.descriptors()
    empty, _, count = come(run, site)
    port = site.ports[len(site.ports) // 2]
    leave(site)
    size = (lowest_memory(site, 15.0) - empty) / count / 1000
    if (status := get(port)[0]) != 503:
        raise Failed(f"a port whose agent has left answered {status}")
    descriptors = (site.server.descriptors() - before) / count
    text = f"{descriptors:.2f}, {size:.1f} KB (with what agents leave behind)"
    run.rows["port"].set(text, None, {"descriptors": descriptors, "kb": size, "ports": count})


def crowd_of_pollers(run: Run) -> None:
    """Throughput without pollers, with those who have the list, and with those of whole lists, in turn."""
    site = run.start_crowded("crowd")
    come(run, site)
    port = site.ports[len(site.ports) // 2]
    wait_http(port, [site.server, site.swarm])
    loads.wrk(port, 64, 1)
    quiet: list[float] = []
    taken: dict[str, list[dict]] = {"tagged": [], "whole": []}
    for turn in range(run.rounds):
        run.say(f"density: {CROWD} pollers, round {turn + 1} of {run.rounds}")
        quiet.append(loads.wrk(port, 64, POLLED_SECONDS).per_second)
        for mode, samples in taken.items():
            samples.append(polled_by_crowd(site, port, mode))
    for mode, samples in taken.items():
        p99 = quantile([latency for sample in samples for latency in sample.pop("latencies")], 0.99) * 1000
        sums = {key: sum(sample[key] for sample in samples) for key in ("answered", "seconds", "bytes")}
        answers, bytes_in = (sums[key] / sums["seconds"] for key in ("answered", "bytes"))
        text = f"{p99:,.0f} ms" if p99 >= 100 else f"{p99:.1f} ms"
        text += f" ({answers:,.0f} answers/s, {bytes_in / 1e6:.1f} MB/s)"
        run.rows[mode].set(text, None, {"p99_ms": p99, "runs": samples})
        polled = [sample["requests_s"] for sample in samples]
        lost = 1 - median(polled) / median(quiet)
        pollers, admin = (median(sample[key] for sample in samples) for key in ("pollers_share", "admin_share"))
        text = f"{lost:.0%} (of the processor the pollers had {pollers:.0%}, the admin thread {admin:.0%})"
        run.rows[f"{mode}_cost"].set(text, None, {"quiet": quiet, "polled": polled})


def polled_by_crowd(site: Site, port: int, mode: str) -> dict:
    """One run of small requests beside the pollers: their own words, and what they cost."""
    pollers = start_load([sys.executable, Path(__file__).with_name("pollers.py"), site.admin, CROWD, mode])
    try:
        if (line := pollers.stdout.readline()) != "ready\n":
            raise Failed(f"pollers: {loads.last_line(line + finish_load(pollers, 5))}")
        before, since = site.server.thread_cpu("silo-admin"), time.monotonic()
        rate = loads.wrk(port, 64, POLLED_SECONDS).per_second
        admin = (site.server.thread_cpu("silo-admin") - before) / (time.monotonic() - since)
        pollers.terminate()
        output = finish_load(pollers, 30)
    finally:
        if pollers.poll() is None:
            pollers.kill()
            pollers.communicate()
    try:
        result = json.loads(output)
    except ValueError:
        raise Failed(f"pollers: {loads.last_line(output)}") from None
    result["requests_s"] = rate
    result["pollers_share"] = result["cpu"] / result["seconds"] / machine.cores()
    result["admin_share"] = admin / machine.cores()
    return result


def come(run: Run, site: Site, row: DensityFigure | None = None) -> tuple[int, float, int]:
    """All agents connect: the server's memory before, the seconds until all are listed, how many are."""
    agent_ports(site.admin)
    empty = settled_memory(site)
    seconds, count = start_swarm(run.lab, site, run.agents, 60.0)
    if row is not None:
        raw = {"seconds": seconds, "registered": count, "swarm_says": site.swarm.last_words()}
        row.set(f"{count:,} in {seconds:.1f} s", None, raw)
    if count == 0:
        raise Failed(f"no agent was registered: {site.swarm.last_words()}")
    return empty, seconds, count


@dataclass(frozen=True)
class AgentCost:
    """KB of memory for one agent."""

    server: float
    agent: float
    """In the agent's own process, as far as that grows with agents."""


def idle_cost(site: Site, empty: int, count: int, row: DensityFigure) -> AgentCost:
    """What each agent takes that has done nothing yet."""
    cost = AgentCost((settled_memory(site) - empty) / count / 1000, site.agents_memory() / count / 1000)
    row.set(f"{cost.server:.1f} KB (the agent itself {cost.agent:.1f} KB)", None, vars(cost))
    return cost


def used_cost(run: Run, site: Site, idle: AgentCost, row: DensityFigure) -> None:
    """What each takes after a request."""
    run.say("density: a request to each agent")
    before, agents_before = settled_memory(site), site.agents_memory()
    visited = visit(site)
    if not visited:
        raise Failed("no descriptors are left for requests")
    server = idle.server + (settled_memory(site) - before) / visited / 1000
    agent = idle.agent + (site.agents_memory() - agents_before) / visited / 1000
    text = f"{server:.1f} KB (the agent and its service {agent:.1f} KB; {visited:,} agents)"
    row.set(text, None, {**vars(AgentCost(server, agent)), "agents": visited})


def leave(site: Site) -> None:
    """All agents go."""
    site.swarm.interrupt()

    def gone() -> bool | None:
        _, body = get(site.admin, "/agents")
        # With a lease those who are away are listed.
        here = [agent for agent in json.loads(body)["agents"] if agent["state"] == "serving"]
        return None if here else True

    wait_until("end of all tunnels in GET /agents", gone, [site.server], 60.0, pause=0.2)


def one_port_rates(run: Run) -> list[float]:
    """New connections a second to a server with one agent."""
    site = run.start_server("one", 1)
    start_swarm(run.lab, site, 1, 15.0)
    if not site.ports:
        raise Failed(f"swarm: no agent was registered: {site.swarm.last_words()}")
    wait_http(site.ports[0], [site.server, site.swarm])
    rates = [loads.ab(site.ports[0], 30_000, 6).per_second for _ in range((run.rounds + 1) // 2)]
    run.stop_all()
    return rates


def polls(run: Run, site: Site, port: int) -> None:
    """Throughput with and without a poller, in turn, and how long the polls took."""
    quiet = [loads.wrk(port, 64, POLLED_SECONDS).per_second]
    polled: list[float] = []
    times: list[float] = []
    for turn in range(run.rounds):
        run.say(f"density: polls, round {turn + 1} of {run.rounds}")
        with Poller(site.admin) as poller:
            polled.append(loads.wrk(port, 64, POLLED_SECONDS).per_second)
        quiet.append(loads.wrk(port, 64, POLLED_SECONDS).per_second)
        times += poller.times
    p99 = quantile(times, 0.99) * 1000
    run.rows["poll"].set(f"{p99:.1f} ms ({len(times)} polls)", p99 <= POLL_P99_MS, times)
    # Each run against the two beside it: a machine that others use changes its speed in the meantime.
    losses = [1 - with_polls / mean(quiet[turn : turn + 2]) for turn, with_polls in enumerate(polled)]
    lost = median(losses)
    text = f"{lost:.1%} ({min(losses):.1%} to {max(losses):.1%})"
    run.rows["cost"].set(text, lost <= 0.10, {"quiet": quiet, "polled": polled})


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


def quantile(values: list[float], share: float) -> float:
    """The value that so many of them don't exceed."""
    if not values:
        raise Failed("no poll of GET /agents came back")
    return sorted(values)[math.ceil(len(values) * share) - 1]


def start_swarm(lab: Lab, site: Site, count: int, seconds: float) -> tuple[float, int]:
    """Starts the agents; the seconds until all are listed (or the bound), and how many are."""
    begun = time.monotonic()
    argv = [lab.binary("silo-proxy"), "swarm", "--server", f"127.0.0.1:{site.tunnel}", "--count", count]
    if site.tls is not None:
        argv += ["--tls-ca", site.tls / "ca.pem"]
    site.swarm = lab.processes.start(f"density-{site.name}-swarm", argv)

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
