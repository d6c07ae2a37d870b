"""The service, and everything that can stand between it and a visitor.

All peers get the same service, loopback addresses, as many workers as there are cores, connections kept
alive to both sides, no access log, nothing stored on disk, and nothing else tuned. Each has two doors: one
to the service (small answer, large file) and one to the sink that takes uploads.
"""

from __future__ import annotations

import json
import os
import pwd
import sys
from pathlib import Path
from typing import Callable

import machine
from process import Failed, Ports, Process, Processes, get, wait_http, wait_until

SMALL_ANSWER = "a small answer of thirty-four byte"
"""What the service says to GET /: 34 bytes."""

LARGE_PATH = "/large"

SHARE_PATH = "/share"
"""A quarter of the large file, for several transfers at once."""

MOST_FAILED_STARTS = 2

AGENT_PORTS = 8
"""Size of silo-proxy's port range here: two agents, and some to choose from."""


class Peer:
    """Something a visitor can send requests to."""

    key: str
    label: str

    def __init__(self, lab: Lab):
        self.lab = lab
        self.web = 0
        """Port of the door to the service."""
        self.upload = 0
        """Port of the door to the sink."""
        self.processes: list[Process] = []
        """Those whose processor time and memory count."""
        self.failure: str | None = None
        """Why it doesn't run, if it doesn't."""
        self.failed_starts = 0

    def launch(self) -> None:
        """Starts the processes and fills in ports; raises Failed."""
        raise NotImplementedError

    def start(self) -> None:
        """Starts it, waits until both doors answer, and remembers the reason if they don't."""
        self.failure = None
        try:
            self.launch()
            wait_http(self.web, self.processes)
            wait_http(self.upload, self.processes)
        except Failed as failure:
            self.failure = str(failure)
            self.failed_starts += 1
            self.stop()

    def stop(self) -> None:
        for process in reversed(self.processes):
            self.lab.processes.stop(process)
        self.processes = []

    def restart(self) -> None:
        """A fresh start, for figures of memory."""
        self.stop()
        self.start()

    def ready(self) -> None:
        """Sees to it that it runs: a new start if it died, two if it never came up; raises Failed."""
        if self.failure is not None and self.failed_starts > MOST_FAILED_STARTS:
            raise Failed(self.failure)
        if self.failure is not None or not all(process.alive for process in self.processes):
            words = self.failure or "; ".join(p.last_words() for p in self.processes if not p.alive)
            self.restart()
            if self.failure is not None:
                raise Failed(self.failure)
            print(f"  {self.label} was started again after: {words}", flush=True, file=self.lab.out)

    def spawn(self, part: str, argv: list[object]) -> Process:
        """Starts one process that counts."""
        process = self.lab.processes.start(f"{self.key}-{part}", argv)
        self.processes.append(process)
        return process

    def write(self, name: str, text: str) -> Path:
        path = self.lab.directory / f"{self.key}-{name}"
        path.write_text(text)
        return path


class Service(Peer):
    """The service itself: nginx with a small answer and a large sparse file, and the sink beside it."""

    key, label = "service", "the service itself"

    def launch(self) -> None:
        self.web = self.web or self.lab.ports.take()
        self.upload = self.upload or self.lab.ports.take()
        config = nginx_config(
            self.lab.directory,
            self.key,
            f"""
    sendfile on;
    tcp_nopush on;
    server {{
        listen 127.0.0.1:{self.web};
        default_type application/octet-stream;
        location = / {{ default_type text/plain; return 200 "{SMALL_ANSWER}"; }}
        location = {LARGE_PATH} {{ alias "{self.lab.large_file}"; }}
        location = {SHARE_PATH} {{ alias "{self.lab.share_file}"; }}
    }}
""",
        )
        self.spawn("nginx", nginx_command(self.lab.directory, self.write("nginx.conf", config)))
        sink = Path(__file__).with_name("sink.py")
        self.spawn("sink", [sys.executable, sink, self.upload, self.lab.large_file])

    def restart(self) -> None:
        """The service stays: everyone else's connections end there."""
        if self.failure is not None or not all(process.alive for process in self.processes):
            super().restart()


class NginxHop(Peer):
    """nginx as one reverse-proxy hop with keep-alive to the service: what no tunnel is expected to beat."""

    key, label = "nginx", "nginx"

    def launch(self) -> None:
        self.web = self.web or self.lab.ports.take()
        self.upload = self.upload or self.lab.ports.take()

        def hop(name: str, listen: int, target: int) -> str:
            return f"""
    upstream {name} {{
        server 127.0.0.1:{target};
        keepalive 512;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{listen};
        client_max_body_size 0;
        location / {{
            proxy_pass http://{name};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            # Stream like everyone else: no temporary files in either direction.
            proxy_max_temp_file_size 0;
            proxy_request_buffering off;
        }}
    }}
"""

        service = self.lab.service
        hops = hop("web", self.web, service.web) + hop("sink", self.upload, service.upload)
        config = self.write("nginx.conf", nginx_config(self.lab.directory, self.key, hops))
        self.spawn("nginx", nginx_command(self.lab.directory, config))


class HaProxy(Peer):
    """HAProxy in HTTP mode, one thread a core, connections to the service always shared."""

    key, label = "haproxy", "HAProxy"

    def launch(self) -> None:
        self.web = self.web or self.lab.ports.take()
        self.upload = self.upload or self.lab.ports.take()
        service = self.lab.service
        config = f"""global
    nbthread {machine.cores()}
    maxconn 4096
defaults
    mode http
    http-reuse always
    option forwardfor
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend web
    bind 127.0.0.1:{self.web}
    default_backend web
frontend sink
    bind 127.0.0.1:{self.upload}
    default_backend sink
backend web
    server service 127.0.0.1:{service.web}
backend sink
    server service 127.0.0.1:{service.upload}
"""
        self.spawn("haproxy", ["haproxy", "-db", "-f", self.write("haproxy.cfg", config)])


class Rathole(Peer):
    """rathole, server and client, plain TCP with its own defaults (no delay, no encryption)."""

    key, label = "rathole", "rathole"

    def launch(self) -> None:
        self.web = self.web or self.lab.ports.take()
        self.upload = self.upload or self.lab.ports.take()
        control = self.lab.ports.take()
        service = self.lab.service
        binary = self.lab.binary(self.key)
        server = f"""[server]
bind_addr = "127.0.0.1:{control}"
default_token = "compare"
[server.services.web]
bind_addr = "127.0.0.1:{self.web}"
[server.services.sink]
bind_addr = "127.0.0.1:{self.upload}"
"""
        client = f"""[client]
remote_addr = "127.0.0.1:{control}"
default_token = "compare"
[client.services.web]
local_addr = "127.0.0.1:{service.web}"
[client.services.sink]
local_addr = "127.0.0.1:{service.upload}"
"""
        self.spawn("server", [binary, "--server", self.write("server.toml", server)])
        self.spawn("client", [binary, "--client", self.write("client.toml", client)])


class SiloProxy(Peer):
    """silo-proxy: a server, an agent for the service, and a second agent whose service is the sink."""

    key, label = "silo-proxy", "silo-proxy"

    def launch(self) -> None:
        binary = self.lab.binary(self.key)
        admin, tunnel = self.lab.ports.take(), self.lab.ports.take()
        first = self.lab.ports.take(AGENT_PORTS)
        config = silo_server_config(admin, tunnel, first, first + AGENT_PORTS - 1)
        self.spawn("server", [binary, "server", "--config", self.write("server.yaml", config)])
        wait_until("admin port", lambda: get(admin, "/health")[0] == 200 or None, self.processes)
        service = self.lab.service
        for name, port in (("web", service.web), ("sink", service.upload)):
            config = silo_agent_config(tunnel, name, port)
            self.spawn(f"agent-{name}", [binary, "agent", "--config", self.write(f"{name}.yaml", config)])

        def listed() -> dict[str, int] | None:
            ports = agent_ports(admin)
            return ports if {"web", "sink"} <= ports.keys() else None

        ports = wait_until("agents in GET /agents", listed, self.processes)
        self.web, self.upload = ports["web"], ports["sink"]


class Lab:
    """What the peers share: the service, ports, processes, binaries, a directory."""

    def __init__(self, directory: Path, processes: Processes, large_bytes: int, out):
        self.directory = directory
        self.processes = processes
        self.ports = Ports()
        self.out = out
        self.binaries: dict[str, Path] = {}
        self.build_failures: dict[str, str] = {}
        self.large_bytes = large_bytes
        self.large_file = directory / "large.bin"
        self.share_bytes = large_bytes // 4
        self.share_file = directory / "share.bin"
        directory.mkdir(parents=True, exist_ok=True)
        # Sparse: reading them costs what reading a cached file costs, and no disk.
        for name, size in ((self.large_file, self.large_bytes), (self.share_file, self.share_bytes)):
            with open(name, "wb") as file:
                file.truncate(size)
        self.service = Service(self)

    def provide(self, key: str, build: Callable[[], Path]) -> None:
        """Builds a binary, or keeps the reason why there is none."""
        try:
            self.binaries[key] = build()
        except Failed as failure:
            self.build_failures[key] = str(failure)

    def binary(self, key: str) -> Path:
        if key not in self.binaries:
            raise Failed(self.build_failures.get(key, f"no {key} binary"))
        return self.binaries[key]


PEERS: list[type[Peer]] = [SiloProxy, Rathole, NginxHop, HaProxy]
"""In the order in which they take their turns; the service itself comes last."""


def nginx_config(directory: Path, name: str, http: str) -> str:
    """An nginx of one worker a core; connections stay open for any number of requests."""
    return f"""
user {pwd.getpwuid(os.geteuid()).pw_name};
worker_processes {machine.cores()};
pid "{directory}/{name}.pid";
error_log stderr error;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 75s;
    client_body_temp_path "{directory}/nginx-body";
    proxy_temp_path "{directory}/nginx-proxy";
    fastcgi_temp_path "{directory}/nginx-fastcgi";
    uwsgi_temp_path "{directory}/nginx-uwsgi";
    scgi_temp_path "{directory}/nginx-scgi";
{http}}}
"""


def nginx_command(directory: Path, config: Path) -> list[object]:
    return ["nginx", "-e", "stderr", "-p", directory, "-c", config, "-g", "daemon off;"]


def silo_server_config(
    admin: int, tunnel: int, first: int, last: int, *, workers: int = 0, lease: str = "0s", tls: Path | None = None
) -> str:
    """`tls` is a directory that `silo-proxy certs init` has filled."""
    certificate = ""
    if tls is not None:
        certificate = f"""  tls:
    enabled: true
    cert_file: {tls / "server.pem"}
    key_file: {tls / "server.key"}
"""
    return f"""log:
  level: warn
http:
  port: {admin}
  agent_port_range:
    start: {first}
    end: {last}
  port_lease: {lease}
grpc:
  port: {tunnel}
{certificate}server:
  workers: {workers}
"""


def silo_agent_config(tunnel: int, name: str, service: int) -> str:
    return f"""log:
  level: warn
grpc:
  server_address: 127.0.0.1:{tunnel}
  agent_id: {name}
local:
  service_url: http://127.0.0.1:{service}
"""


def agent_ports(admin: int) -> dict[str, int]:
    """Agent id to port, as the admin port lists them."""
    _, body = get(admin, "/agents")
    return {agent["agent_id"]: agent["port"] for agent in json.loads(body)["agents"]}
