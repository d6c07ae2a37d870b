"""The processes of a soak: a server, its agents and their services; what they hold; what befalls them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

READY = 20.0
"""Seconds that a process has to start, or an agent to connect."""

STOP = 15.0
"""Seconds a process has to end after SIGTERM; its own drain takes up to 5."""

SETTLE = 1.0
"""Seconds after a fault's end that still explain an error: connections that broke are found out."""

PR_SET_PDEATHSIG = 1
PRCTL = ctypes.CDLL(None).prctl


class Failed(Exception):
    """The soak can't go on."""


def end_with_parent() -> None:
    PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """One process, and its log."""

    def __init__(self, name: str, argv: list[str], log: Path, environment: dict[str, str] | None = None):
        self.name = name
        self.log = log
        with open(log, "wb") as out:
            self.popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                preexec_fn=end_with_parent,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    async def wait_for(self, text: str) -> str:
        """Waits for a line of its log."""
        deadline = time.monotonic() + READY
        while True:
            for line in self.text().splitlines():
                if text in line:
                    return line
            if self.popen.poll() is not None:
                raise Failed(f"{self.name} has ended with {self.popen.returncode}; see {self.log}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} doesn't say {text!r}; see {self.log}")
            await asyncio.sleep(0.02)

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    async def stop(self) -> int | None:
        """SIGTERM; the exit code, or none if it had to be killed."""
        if self.popen.poll() is None:
            self.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP
        while self.popen.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                return None
            await asyncio.sleep(0.02)
        return self.popen.returncode

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def memory(self) -> int:
        """Bytes of resident memory."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))


@dataclass
class Agent:
    """An agent, through all of its processes."""

    id: str
    port: int
    service: str
    service_port: int
    steady: bool
    """No fault befalls it."""
    process: Process | None = None
    starts: int = 0
    busy: bool = False
    """A fault is befalling it."""
    disturbed: list[tuple[float, float]] = field(default_factory=list)
    """When: from, until."""

    def explains(self, begun: float, ended: float) -> bool:
        """Whether a fault explains that a request failed."""
        return any(begun <= until + SETTLE and ended >= since for since, until in self.disturbed)


@dataclass
class Fault:
    """Something that was done to a process."""

    at: float
    kind: str
    name: str


def free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to clients, nobody listens on any of them."""
    while True:
        start = random.randrange(10_000, 30_000)
        try:
            for port in range(start, start + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            return list(range(start, start + count))
        except OSError:
            continue


class House:
    """All processes. The first agent is steady."""

    def __init__(self, binary: Path, folder: Path, agents: int, dice: random.Random):
        self.binary = binary
        self.folder = folder
        self.dice = dice
        self.begun = time.monotonic()
        self.faults: list[Fault] = []
        self.past: list[Process] = []
        self.codes: list[str] = []
        self.reloads = 0
        self.admin, self.tunnel, *ports = free_ports(2 + 2 * agents)
        self.agents = [
            Agent(f"agent-{n}", ports[n], f"s{n}", ports[agents + n], steady=n == 0) for n in range(agents)
        ]

    async def start(self) -> None:
        script = Path(__file__).with_name("service.py")
        ports = [str(agent.service_port) for agent in self.agents]
        argv = [sys.executable, "-B", str(script), *ports]
        self.services = Process("services", argv, self.folder / "services.log")
        await self.services.wait_for("ready")
        self.write_settings()
        argv = [str(self.binary), "server", "--config", str(self.settings)]
        self.server = Process("server", argv, self.folder / "server.log")
        await self.server.wait_for("server started")
        await asyncio.gather(*(self.start_agent(agent) for agent in self.agents))

    @property
    def settings(self) -> Path:
        return self.folder / "server.yaml"

    def write_settings(self) -> None:
        """The server's settings; a little different each time, so that a reload has something to do."""
        ports = [agent.port for agent in self.agents]
        pins = "".join(f"\n    {agent.id}: {agent.port}" for agent in self.agents)
        self.settings.write_text(
            f"""http:
  port: {self.admin}
  agent_host: 127.0.0.1
  agent_port_range:
    start: {min(ports)}
    end: {max(ports)}
  static_ports:{pins}
  idle_timeout: {70 + self.reloads % 2}s
grpc:
  host: 127.0.0.1
  port: {self.tunnel}
"""
        )

    async def start_agent(self, agent: Agent) -> None:
        agent.starts += 1
        environment = {
            "SILO_GRPC_SERVER_ADDRESS": f"127.0.0.1:{self.tunnel}",
            "SILO_GRPC_AGENT_ID": agent.id,
            "SILO_LOCAL_SERVICE_URL": f"http://127.0.0.1:{agent.service_port}",
            # So that a quiet agent holds no connection, and can be compared with itself.
            "SILO_LOCAL_IDLE_TIMEOUT": "2s",
        }
        log = self.folder / f"{agent.id}-{agent.starts}.log"
        agent.process = Process(agent.id, [str(self.binary), "agent"], log, environment)
        await agent.process.wait_for(" connected ")

    # --- Faults ---------------------------------------------------------------------------------

    async def disturb(self, every: float) -> None:
        """One fault after the other, until cancelled."""
        under_way: set[asyncio.Task[None]] = set()
        try:
            while True:
                await asyncio.sleep(self.dice.uniform(0.5, 1.5) * every)
                for task in [task for task in under_way if task.done()]:
                    under_way.discard(task)
                    task.result()
                idle = [agent for agent in self.agents if not agent.steady and not agent.busy]
                kind = self.dice.choice(["kill", "kill", "restart", "pause", "reload"])
                if kind == "reload":
                    self.reload()
                elif idle:
                    agent = self.dice.choice(idle)
                    under_way.add(asyncio.create_task(self.befall(agent, kind)))
        except asyncio.CancelledError:
            await asyncio.gather(*under_way)
            raise

    def reload(self) -> None:
        self.note("SIGHUP", "server")
        self.reloads += 1
        self.write_settings()
        self.server.signal(signal.SIGHUP)
        for agent in self.agents:
            if not agent.busy:
                agent.process.signal(signal.SIGHUP)

    async def befall(self, agent: Agent, kind: str) -> None:
        agent.busy = True
        since = time.monotonic()
        # Open until it is over, so that whoever asks meanwhile finds it.
        agent.disturbed.append((since, float("inf")))
        self.note(kind, agent.id)
        if kind == "pause":
            agent.process.signal(signal.SIGSTOP)
            await asyncio.sleep(self.dice.uniform(0.5, 3))
            agent.process.signal(signal.SIGCONT)
        else:
            self.past.append(agent.process)
            if kind == "kill":
                agent.process.kill()
            elif (code := await agent.process.stop()) != 0:
                self.codes.append(f"{agent.id} ended with {code} after SIGTERM")
            await asyncio.sleep(self.dice.uniform(0, 2))
            await self.start_agent(agent)
        agent.disturbed[-1] = (since, time.monotonic())
        agent.busy = False

    def note(self, kind: str, name: str) -> None:
        self.faults.append(Fault(time.monotonic() - self.begun, kind, name))

    # --- Looks ----------------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        """Those that are compared with themselves."""
        return [self.server, *(agent.process for agent in self.agents)]

    def metrics(self) -> dict[str, float]:
        """The figures of GET /metrics, summed over their labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        figures: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                figures[name] = figures.get(name, 0.0) + float(value)
        return figures

    async def stop(self) -> None:
        """Ends all in good order, and notes who doesn't."""
        for agent in self.agents:
            if agent.process:
                self.past.append(agent.process)
                if (code := await agent.process.stop()) != 0:
                    self.codes.append(f"{agent.id} ended with {code} after SIGTERM")
        self.past.append(self.server)
        if (code := await self.server.stop()) != 0:
            self.codes.append(f"the server ended with {code} after SIGTERM")
        self.services.kill()
