"""Many agents of one server, each a process of its own in front of the same service."""

from __future__ import annotations

from pathlib import Path

import loads
from peers import Lab, agent_ports, silo_agent_config, silo_server_config
from process import Process, get, wait_http, wait_until

AGENTS = 32
CONNECTIONS = 256


class Crowd:
    """silo-proxy's server with a given number of workers, and its agents; leaving the `with` block ends them."""

    server: Process

    def __init__(self, lab: Lab, workers: int):
        self.lab = lab
        self.workers = workers
        self.agents: list[Process] = []
        self.ports: list[int] = []
        self.started: list[Process] = []
        # Those of the agents, then the admin port and the tunnel port.
        self.first_port = lab.ports.take(AGENTS + 2)

    def __enter__(self) -> Crowd:
        try:
            self.launch()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # All are told before any is waited for.
        for process in reversed(self.started):
            process.terminate()
        for process in reversed(self.started):
            self.lab.processes.stop(process)
        self.lab.ports.give_back(self.first_port, AGENTS + 2)

    def launch(self) -> None:
        """Starts the processes, and waits until each agent answers."""
        binary, service = self.lab.binary("silo-proxy"), self.lab.service
        first = self.first_port
        admin, tunnel = first + AGENTS, first + AGENTS + 1
        config = silo_server_config(admin, tunnel, first, first + AGENTS - 1, workers=self.workers)
        self.server = self.spawn("server", [binary, "server", "--config", self.write("server", config)])
        wait_until("admin port", lambda: get(admin, "/health")[0] == 200 or None, [self.server])
        for number in range(AGENTS):
            name = f"agent-{number}"
            config = silo_agent_config(tunnel, name, service.web)
            self.agents.append(self.spawn(name, [binary, "agent", "--config", self.write(name, config)]))

        def listed() -> list[int] | None:
            here = agent_ports(admin)
            return sorted(here.values()) if len(here) == AGENTS else None

        self.ports = wait_until(f"{AGENTS} agents in GET /agents", listed, self.started)
        for port in self.ports:
            wait_http(port, self.started)

    def load(self, seconds: int) -> loads.Requests:
        """Small requests to all of them, over connections spread evenly."""
        script = self.lab.directory / "crowd.lua"
        return loads.wrk_spread(self.ports, CONNECTIONS, seconds, script)

    def spawn(self, part: str, argv: list[object]) -> Process:
        process = self.lab.processes.start(f"crowd-{part}", argv)
        self.started.append(process)
        return process

    def write(self, name: str, text: str) -> Path:
        path = self.lab.directory / f"crowd-{name}.yaml"
        path.write_text(text)
        return path
