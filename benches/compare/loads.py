"""The loads: wrk, ab and curl with their answers read, and a reader that stops reading.

Every load is bounded, in time and where it can be in count. One that meets errors in more than one
request of a hundred has failed; fewer are kept as a note.
"""

from __future__ import annotations

import array
import fcntl
import re
import socket
import termios
import time
from dataclasses import dataclass
from pathlib import Path

from process import Failed, finish_load, run_bounded, start_load

TOLERATED = 0.01
"""Share of requests that may fail before the whole figure does."""

CURL_FORMAT = "%{http_code} %{size_download} %{size_upload} %{speed_download} %{speed_upload}"


@dataclass(frozen=True)
class Requests:
    """What a run of small requests gave; times in microseconds."""

    count: int
    per_second: float
    p50: float | None = None
    p99: float | None = None
    note: str | None = None


def wrk(port: int, connections: int, seconds: int, threads: int = 2) -> Requests:
    """Small requests over connections kept alive, as fast as they are answered."""
    return parse_wrk(run_bounded(wrk_command(port, connections, seconds, min(threads, connections)), seconds + 15))


def wrk_spread(ports: list[int], connections: int, seconds: int, script: Path) -> Requests:
    """The same, with the connections spread evenly over many ports; `script` is written for it."""
    # A thread of wrk's has one address, so each port gets a thread. They have little to do but wait.
    script.write_text(f"""local ports, number = {{ {", ".join(map(str, ports))} }}, 0
function setup(thread)
  number = number + 1
  thread.addr = wrk.lookup("127.0.0.1", ports[number])[1]
end
""")
    argv = [*wrk_command(ports[0], connections, seconds, len(ports)), "-s", script]
    return parse_wrk(run_bounded(argv, seconds + 15))


def wrk_command(port: int, connections: int, seconds: int, threads: int) -> list[object]:
    argv = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "5s"]
    return [*argv, f"http://127.0.0.1:{port}/"]


def parse_wrk(output: str) -> Requests:
    total = re.search(r"(\d+) requests in", output)
    rate = re.search(r"Requests/sec:\s*([\d.]+)", output)
    if not total or not rate or int(total.group(1)) == 0:
        raise Failed(f"wrk: {last_line(output)}")
    errors = [int(count) for count in re.findall(r"(?:connect|read|write|timeout) (\d+)", output)]
    if bad := re.search(r"Non-2xx or 3xx responses: (\d+)", output):
        errors.append(int(bad.group(1)))
    count = int(total.group(1))
    note = check_errors("wrk", sum(errors), count)
    quantiles = dict(re.findall(r"^\s+(50|99)%\s+(\S+)", output, re.MULTILINE))
    p50, p99 = (microseconds(quantiles[key]) if key in quantiles else None for key in ("50", "99"))
    return Requests(count, float(rate.group(1)), p50, p99, note)


def microseconds(text: str) -> float:
    """wrk's times: 85.00us, 1.20ms, 2.01s, 1.00m."""
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7}[unit]


def ab(port: int, requests: int, seconds: int) -> Requests:
    """Small requests, each over a new connection, 64 at once."""
    # ab's -t sets a count of its own, so -n has to follow it. -r: a reset counts, and doesn't end the run.
    argv = ["ab", "-q", "-r", "-s", 5, "-c", 64, "-t", seconds, "-n", requests, f"http://127.0.0.1:{port}/"]
    return parse_ab(run_bounded(argv, seconds + 20))


def parse_ab(output: str) -> Requests:
    fields = dict(re.findall(r"^([A-Z][A-Za-z0-9 -]+):\s+([\d.]+)", output, re.MULTILINE))
    count = int(fields.get("Complete requests", "0"))
    if count == 0 or "Requests per second" not in fields:
        raise Failed(f"ab: {last_line(output)}")
    failed = int(fields.get("Failed requests", "0")) + int(fields.get("Non-2xx responses", "0"))
    return Requests(count, float(fields["Requests per second"]), note=check_errors("ab", failed, count))


def check_errors(tool: str, failed: int, count: int) -> str | None:
    if failed > TOLERATED * count:
        raise Failed(f"{tool}: {failed} of {count} requests failed")
    return f"{failed} of {count} requests failed" if failed else None


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


@dataclass(frozen=True)
class Download:
    """One whole download of `size` bytes."""

    port: int
    path: str
    size: int

    def command(self) -> list[object]:
        argv = ["curl", "-sS", "-o", "/dev/null", "-w", CURL_FORMAT, "--max-time", 60]
        return [*argv, f"http://127.0.0.1:{self.port}{self.path}"]

    def speed(self, output: str) -> float:
        """Bytes a second, as curl says; Failed unless all came."""
        code, down, _, speed, _ = parse_curl(output)
        if code != 200 or down != self.size:
            raise Failed(f"curl: {down:.0f} of {self.size} bytes came, status {code:.0f}, {last_line(output)}")
        return speed


@dataclass(frozen=True)
class Upload:
    """One whole upload of a file of `size` bytes; the sink's answer has to name the size."""

    port: int
    file: Path
    size: int

    def command(self) -> list[object]:
        argv = ["curl", "-sS", "-H", "Expect:", "-T", self.file, "-w", " " + CURL_FORMAT, "--max-time", 60]
        return [*argv, f"http://127.0.0.1:{self.port}/"]

    def speed(self, output: str) -> float:
        """Bytes a second, as curl says; Failed unless all were sent and read."""
        code, _, up, _, speed = parse_curl(output)
        if code != 200 or up != self.size or output.split()[0] != str(self.size):
            raise Failed(f"curl: {up:.0f} of {self.size} bytes sent, status {code:.0f}, {last_line(output)}")
        return speed


def transfer(one: Download | Upload) -> float:
    """Bytes a second of one transfer."""
    return one.speed(run_bounded(one.command(), 70))


def transfer_at_once(transfers: list[Download | Upload]) -> tuple[float, list[float]]:
    """Bytes a second of all together, from the first's start to the last's end; and each one's own."""
    begun = time.monotonic()
    started = [start_load(one.command()) for one in transfers]
    try:
        outputs = [finish_load(load, 70) for load in started]
    finally:
        for load in started:
            if load.poll() is None:
                load.kill()
                load.communicate()
    taken = time.monotonic() - begun
    speeds = [one.speed(output) for one, output in zip(transfers, outputs)]
    return sum(one.size for one in transfers) / taken, speeds


def parse_curl(output: str) -> list[float]:
    """The last five words: CURL_FORMAT."""
    try:
        return [float(word) for word in output.split()[-5:]]
    except ValueError:
        raise Failed(f"curl: {last_line(output)}") from None


class SlowDownloads:
    """Several large downloads at a limited speed, beside which something else is measured."""

    def __init__(self, port: int, path: str, count: int, limit_mb: int, seconds: float):
        self.limit = limit_mb * 1_000_000
        self.bound = seconds
        argv = ["curl", "-s", "-o", "/dev/null", "-w", CURL_FORMAT, "--limit-rate", self.limit]
        argv += ["--max-time", f"{seconds:.1f}", f"http://127.0.0.1:{port}{path}"]
        self.loads = [start_load(argv) for _ in range(count)]

    def __enter__(self) -> SlowDownloads:
        return self

    def __exit__(self, *_: object) -> None:
        for load in self.loads:
            if load.poll() is None:
                load.kill()
                load.communicate()

    def finish(self) -> float:
        """Waits until their time is up; the bytes a second that all of them had together."""
        speeds = []
        for load in self.loads:
            output = finish_load(load, self.bound + 10)
            code, down, _, speed, _ = parse_curl(output)
            if code != 200 or down == 0:
                raise Failed(f"curl: {down:.0f} bytes came beside the load, status {code:.0f}")
            speeds.append(speed)
        return sum(speeds)


class StalledReader:
    """A visitor who asks for the large file, reads the answer's head and then nothing more."""

    def __init__(self, port: int, path: str):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        try:
            self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            start = self.socket.recv(64)
            if not re.match(rb"HTTP/1\.[01] 200", start):
                raise Failed(f"the stalled reader was answered {start[:40]!r}")
            self.settle()
        except (OSError, Failed) as error:
            self.socket.close()
            raise error if isinstance(error, Failed) else Failed(f"stalled reader: {error}") from error

    def settle(self) -> None:
        """Waits until no more bytes arrive in its socket: every buffer on the way is full."""
        waiting, since, deadline = -1, time.monotonic(), time.monotonic() + 5
        while time.monotonic() < deadline and time.monotonic() - since < 0.3:
            count = array.array("i", [0])
            fcntl.ioctl(self.socket, termios.FIONREAD, count)
            if count[0] != waiting:
                waiting, since = count[0], time.monotonic()
            time.sleep(0.02)

    def __enter__(self) -> StalledReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
