"""What is measured, and what is to be reached: the rows of the table."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Callable

import crowd
import loads
from loads import Download, Upload
from peers import LARGE_PATH, SHARE_PATH, Peer
from process import Process


@dataclass(frozen=True)
class Goal:
    """A bound on silo-proxy's figure: as a multiple of a peer's, or in its own unit if `peer` is None."""

    word: str
    at_least: bool
    factor: float
    peer: str | None

    def text(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{self.word} {sign} {self.factor:g}" + (f" x {self.peer}" if self.peer else "")

    def reached(self, figure: float | None) -> bool | None:
        """Whether the ratio to the peer, or the figure itself, keeps the bound; None without a figure."""
        if figure is None:
            return None
        return figure >= self.factor if self.at_least else figure <= self.factor


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    title: str
    unit: str
    goals: tuple[Goal, ...] = ()
    only: str | None = None
    """The one peer that it is about, if it isn't about all."""


@dataclass
class Sample:
    """One run against one peer: a value a row, what stands behind it, and what to know about it."""

    values: dict[str, float]
    detail: dict[str, object] = field(default_factory=dict)
    note: str | None = None
    turn: int = 0
    """The round it was taken in."""


@dataclass(frozen=True)
class Plan:
    """How long and how much: whole or quick."""

    keep_alive: int = 5
    """Seconds of a run with connections kept alive."""
    single: int = 3
    """Seconds of the run over one connection."""
    stall: int = 4
    """Seconds of each of the runs before, beside and after the stalled reader."""
    new_connections: int = 30_000
    new_seconds: int = 6
    """A run of new connections ends at whichever comes first."""
    large_bytes: int = 1 << 30

    @staticmethod
    def quick() -> Plan:
        return Plan(1, 1, 1, 4_000, 2, 256 << 20)


@dataclass(frozen=True)
class Measure:
    """One run that fills one or more rows."""

    rows: tuple[Row, ...]
    run: Callable[[Peer, Plan], Sample]

    def is_for(self, peer: str) -> bool:
        return all(row.only in (None, peer) for row in self.rows)


def keep_alive(connections: int, rate_row: str, cpu_row: str | None) -> Callable[[Peer, Plan], Sample]:
    """Requests a second, and the processor time that each took in the peer's processes."""

    def run(peer: Peer, plan: Plan) -> Sample:
        load = lambda: loads.wrk(peer.web, connections, plan.keep_alive)  # noqa: E731
        return small_requests(peer.processes, load, rate_row, cpu_row)

    return run


def small_requests(
    processes: list[Process], load: Callable[[], loads.Requests], rate_row: str, cpu_row: str | None
) -> Sample:
    """A load of small requests, with the processor time that each took in the processes."""
    before = [process.cpu() for process in processes]
    result = load()
    used = [process.cpu() - start for process, start in zip(processes, before)]
    user, kernel = (sum(getattr(cpu, part) for cpu in used) for part in ("user", "kernel"))
    user_us, kernel_us = user / result.count * 1e6, kernel / result.count * 1e6
    values = {rate_row: result.per_second}
    if cpu_row:
        values[cpu_row] = user_us + kernel_us
    detail = {"requests": result.count, "p50_us": result.p50, "p99_us": result.p99}
    detail |= {"user_us": user_us, "kernel_us": kernel_us}
    detail["cpu_s"] = {
        process.name: {"user": cpu.user, "kernel": cpu.kernel} for process, cpu in zip(processes, used)
    }
    return Sample(values, detail, result.note)


def many_agents(workers: int) -> Callable[[Peer, Plan], Sample]:
    """Requests to many agents of a server with so many workers, all of them started for this run."""

    def run(peer: Peer, plan: Plan) -> Sample:
        with crowd.Crowd(peer.lab, workers) as site:
            site.load(1)
            processes, load = [site.server, *site.agents], lambda: site.load(plan.keep_alive)
            sample = small_requests(processes, load, f"many{workers}", f"cpumany{workers}")
        server = sample.detail["cpu_s"][site.server.name]
        sample.detail["server_us"] = sum(server.values()) / sample.detail["requests"] * 1e6
        return sample

    return run


def one_connection(peer: Peer, plan: Plan) -> Sample:
    result = loads.wrk(peer.web, 1, plan.single, threads=1)
    return Sample({"p50": result.p50}, {"p99_us": result.p99, "requests": result.count}, result.note)


def new_connections(peer: Peer, plan: Plan) -> Sample:
    result = loads.ab(peer.web, plan.new_connections, plan.new_seconds)
    return Sample({"new": result.per_second}, {"requests": result.count}, result.note)


def download(peer: Peer, plan: Plan) -> Sample:
    return Sample({"down": loads.transfer(Download(peer.web, LARGE_PATH, plan.large_bytes)) / 1e6})


def upload(peer: Peer, plan: Plan) -> Sample:
    return Sample({"up": loads.transfer(Upload(peer.upload, peer.lab.large_file, plan.large_bytes)) / 1e6})


TRANSFERS = 8


def downloads(peer: Peer, plan: Plan) -> Sample:
    return together("down8", [Download(peer.web, SHARE_PATH, peer.lab.share_bytes)] * TRANSFERS)


def uploads(peer: Peer, plan: Plan) -> Sample:
    return together("up8", [Upload(peer.upload, peer.lab.share_file, peer.lab.share_bytes)] * TRANSFERS)


def both_ways(peer: Peer, plan: Plan) -> Sample:
    """Both through the sink's door, which in a tunnel means one and the same agent."""
    down = Download(peer.upload, LARGE_PATH, plan.large_bytes)
    up = Upload(peer.upload, peer.lab.large_file, plan.large_bytes)
    return together("both", [down, up])


def together(row: str, transfers: list[Download | Upload]) -> Sample:
    total, speeds = loads.transfer_at_once(transfers)
    return Sample({row: total / 1e6}, {"mb_s": [speed / 1e6 for speed in speeds]})


BULK_DOWNLOADS, BULK_MB = 4, 60
BESIDE_CONNECTIONS = 4


def beside_bulk(peer: Peer, plan: Plan) -> Sample:
    """p99 of small requests over a few connections, beside downloads at a limited speed.

    The downloads' own speed is kept, for a peer that starves them would look good otherwise.
    """
    warm_up = 0.5
    # At 60 MB/s the large file lasts longer than the run; the bound in seconds ends the downloads.
    with loads.SlowDownloads(
        peer.web, LARGE_PATH, BULK_DOWNLOADS, BULK_MB, plan.single + 2 * warm_up
    ) as bulk:
        time.sleep(warm_up)
        result = loads.wrk(peer.web, BESIDE_CONNECTIONS, plan.single, threads=1)
        speed = bulk.finish() / 1e6
    note = result.note
    if speed < 0.9 * BULK_DOWNLOADS * BULK_MB:
        note = f"the downloads got {speed:.0f} of {BULK_DOWNLOADS * BULK_MB} MB/s"
    return Sample({"beside": result.p99}, {"bulk_mb_s": speed, "requests_s": result.per_second}, note)


def stalled_reader(peer: Peer, plan: Plan) -> Sample:
    """Others' throughput beside a visitor who stops reading, and what the peer's processes grow by.

    The peer is started afresh and warmed by small requests only, so that buffers which earlier downloads
    left behind don't hide the growth. Throughput is compared with the mean of before and after.
    """
    peer.restart()
    peer.ready()
    loads.wrk(peer.web, 64, 1)
    before = loads.wrk(peer.web, 64, plan.stall)
    small = [process.memory() for process in peer.processes]
    with loads.StalledReader(peer.web, LARGE_PATH):
        beside = loads.wrk(peer.web, 64, plan.stall)
        large = [process.memory() for process in peer.processes]
    after = loads.wrk(peer.web, 64, plan.stall)
    growth = {
        process.name: max((end[pid] - start[pid] for pid in start if pid in end), default=0) / 2**20
        for process, start, end in zip(peer.processes, small, large)
    }
    quiet = (before.per_second + after.per_second) / 2
    values = {"stall": beside.per_second / quiet, "growth": max(growth.values())}
    rates = [run.per_second for run in (before, beside, after)]
    notes = [run.note for run in (before, beside, after) if run.note]
    return Sample(values, {"growth_mib": growth, "requests_s": rates}, notes[0] if notes else None)


def ratio(word: str, at_least: bool, factor: float, peer: str) -> Goal:
    return Goal(word, at_least, factor, peer)


def transfer_goals() -> tuple[Goal, ...]:
    return (ratio("", True, 1.5, "rathole"), ratio("", True, 0.9, "nginx"))


def many_agents_measure(workers: int) -> Measure:
    what = f"{crowd.AGENTS} agents, {crowd.CONNECTIONS} connections, server.workers {workers}"
    rate = Row(f"many{workers}", f"requests/s, {what}", "rate", only="silo-proxy")
    cpu = Row(f"cpumany{workers}", "CPU time of each, all processes of the tunnel", "us", only="silo-proxy")
    return Measure((rate, cpu), many_agents(workers))


MEASURES: list[Measure] = [
    Measure(
        (
            Row(
                "rps64",
                "requests/s, keep-alive, 64 connections",
                "rate",
                (ratio("must", True, 1.1, "rathole"), ratio("goal", True, 1.3, "rathole")),
            ),
            Row(
                "cpu64",
                "CPU time a request, all processes of the tunnel, 64 connections",
                "us",
                (ratio("must", False, 0.8, "rathole"), ratio("goal", False, 0.7, "rathole")),
            ),
        ),
        keep_alive(64, "rps64", "cpu64"),
    ),
    Measure(
        (
            Row(
                "rps512",
                "requests/s, keep-alive, 512 connections",
                "rate",
                (ratio("must", True, 1.1, "rathole"), ratio("goal", True, 1.2, "rathole")),
            ),
        ),
        keep_alive(512, "rps512", None),
    ),
    Measure(
        (Row("p50", "p50 at 1 connection", "us", (ratio("", False, 1.25, "rathole"),)),),
        one_connection,
    ),
    Measure(
        (
            Row(
                "new",
                "requests/s, a new connection each, 64 at once",
                "rate",
                (ratio("", True, 3.0, "rathole"), ratio("", True, 1.0, "nginx")),
            ),
        ),
        new_connections,
    ),
    Measure((Row("down", "{size} download, one connection", "MB/s", transfer_goals()),), download),
    Measure((Row("up", "{size} upload, one connection", "MB/s", transfer_goals()),), upload),
    Measure((Row("down8", f"{TRANSFERS} downloads of {{share}} at once, together", "MB/s"),), downloads),
    Measure((Row("up8", f"{TRANSFERS} uploads of {{share}} at once, together", "MB/s"),), uploads),
    Measure((Row("both", "{size} down and {size} up at once, one agent, together", "MB/s"),), both_ways),
    Measure(
        (
            Row(
                "beside",
                f"p99 of small requests ({BESIDE_CONNECTIONS} connections) beside {BULK_DOWNLOADS} downloads"
                f" at {BULK_MB} MB/s each",
                "us",
                (ratio("", False, 1.0, "rathole"),),
            ),
        ),
        beside_bulk,
    ),
    Measure(
        (
            Row(
                "stall",
                "one visitor stops reading a {size} answer: others' throughput, against before and after",
                "ratio",
                (Goal("", True, 0.95, None),),
            ),
            Row(
                "growth",
                "largest growth of a process beside a visitor who stops reading, MiB",
                "MiB",
                (Goal("", False, 1.0, None),),
            ),
        ),
        stalled_reader,
    ),
    *(many_agents_measure(workers) for workers in (1, 2)),
]

ROWS: list[Row] = [row for measure in MEASURES for row in measure.rows]
