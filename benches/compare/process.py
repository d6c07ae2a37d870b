"""Processes this program starts: their ports, their logs, what the kernel says they cost, their end."""

from __future__ import annotations

import ctypes
import http.client
import os
import random
import resource
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

TICK = 1.0 / os.sysconf("SC_CLK_TCK")
"""Seconds in one unit of the times in /proc/PID/stat."""

STOP_GRACE = 8.0
"""Seconds a process has to end after SIGTERM; silo-proxy's own drain takes up to 5."""

PR_SET_PDEATHSIG = 1
PRCTL = ctypes.CDLL(None).prctl
"""Looked up before any fork: a child must not load libraries."""


class Failed(Exception):
    """A peer or a load didn't do what was asked; the text goes into the table."""


@dataclass(frozen=True)
class Cpu:
    """Processor time in seconds."""

    user: float
    kernel: float

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.user + other.user, self.kernel + other.kernel)

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.user - other.user, self.kernel - other.kernel)

    @property
    def total(self) -> float:
        return self.user + self.kernel


class Process:
    """One started program with all its descendants (nginx's workers, for one)."""

    def __init__(self, name: str, popen: subprocess.Popen, log: Path):
        self.name = name
        self.popen = popen
        self.log = log

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def pids(self) -> list[int]:
        """The program and everything under it that lives now."""
        found, queue = [], [self.popen.pid]
        while queue:
            pid = queue.pop()
            found.append(pid)
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    children = Path(f"/proc/{pid}/task/{task}/children").read_text()
                    queue.extend(int(child) for child in children.split())
            except OSError:
                continue
        return found

    def cpu(self, *, reaped: bool = False) -> Cpu:
        """User and kernel time so far; `reaped` adds that of children already gone."""
        total = Cpu(0.0, 0.0)
        for pid in self.pids():
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
            except OSError:
                continue
            # The second field is the name in parentheses and may hold blanks: count after it.
            fields = stat.rpartition(")")[2].split()
            user, kernel, child_user, child_kernel = (int(field) * TICK for field in fields[11:15])
            total += Cpu(user, kernel)
            if reaped:
                total += Cpu(child_user, child_kernel)
        return total

    def thread_cpu(self, name: str) -> float:
        """Seconds that the program's threads of this name have used so far."""
        total = 0.0
        for stat in Path(f"/proc/{self.popen.pid}/task").glob("*/stat"):
            head, _, rest = stat.read_text().rpartition(")")
            if head.partition("(")[2] == name:
                total += sum(int(field) * TICK for field in rest.split()[11:13])
        return total

    def memory(self) -> dict[int, int]:
        """Bytes of memory by process id: the proportional set (PSS), or the resident set."""
        return {pid: size for pid in self.pids() if (size := memory_of(pid)) is not None}

    def descriptors(self) -> int:
        """Open file descriptors of the program itself."""
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))

    def last_words(self) -> str:
        """The last line it wrote, for the reason of a failure."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line]
        return lines[-1][:200] if lines else "it wrote nothing"

    def terminate(self) -> None:
        """SIGTERM to the program alone."""
        if self.alive:
            self.popen.terminate()

    def interrupt(self) -> None:
        """SIGINT, as by Ctrl-C, to the program alone."""
        if self.alive:
            self.popen.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Ends the program and its descendants: SIGTERM, then SIGKILL to its group."""
        self.terminate()
        try:
            self.popen.wait(STOP_GRACE)
        except subprocess.TimeoutExpired:
            pass
        signal_group(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


class Processes:
    """Everything started; leaving the `with` block ends it, whatever the reason."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.started: list[Process] = []
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave anything behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.stop()
        self.started.clear()

    def start(self, name: str, argv: list[object]) -> Process:
        """Starts a program with its output in a log of its own."""
        log = self.logs / f"{name}.log"
        with open(log, "wb") as out:
            try:
                popen = subprocess.Popen(
                    [str(arg) for arg in argv],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            except OSError as error:
                raise Failed(f"{name}: {error}") from error
        process = Process(name, popen, log)
        self.started.append(process)
        return process

    def stop(self, process: Process) -> None:
        """Ends one of them."""
        process.stop()
        if process in self.started:
            self.started.remove(process)

    def cpu(self) -> float:
        """Seconds of processor time used by this program and all it ever started."""
        mine = resource.getrusage(resource.RUSAGE_SELF)
        gone = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = mine.ru_utime + mine.ru_stime + gone.ru_utime + gone.ru_stime
        return total + sum(process.cpu(reaped=True).total for process in self.started)


def end_with_parent() -> None:
    """Asks the kernel to end the child should this program be killed without a chance to clean up."""
    PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def memory_of(pid: int) -> int | None:
    """Bytes of memory a process holds; PSS needs the right to read smaps_rollup."""
    for path, key in ((f"/proc/{pid}/smaps_rollup", "Pss:"), (f"/proc/{pid}/status", "VmRSS:")):
        try:
            for line in Path(path).read_text().splitlines():
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
        except OSError:
            continue
    return None


def run_bounded(argv: list[object], seconds: float) -> str:
    """Runs a load to its end and returns what it printed; a load that overruns is killed."""
    load = start_load(argv)
    return finish_load(load, seconds)


def start_load(argv: list[object]) -> subprocess.Popen:
    return subprocess.Popen(
        [str(arg) for arg in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


def finish_load(load: subprocess.Popen, seconds: float) -> str:
    """Waits for a started load, at most `seconds`, and kills it on any way out."""
    try:
        output, _ = load.communicate(timeout=seconds)
        return output
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{load.args[0]} didn't end within {seconds:.0f} s") from error
    finally:
        signal_group(load.pid, signal.SIGKILL)
        load.wait()


class Ports:
    """Hands out free ports below the ephemeral range, so that no outgoing connection takes one meanwhile."""

    LOWEST = 10_000
    TOP = 2_000
    """Small requests are served from so many ports at the upper end, so that large blocks stay whole below."""

    def __init__(self) -> None:
        self.given: set[int] = set()
        lowest_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        self.highest = lowest_ephemeral - 1 if lowest_ephemeral > self.LOWEST + 1000 else 65_535

    def take(self, count: int = 1) -> int:
        """The first of `count` adjacent free ports."""
        border = self.highest - self.TOP
        lowest, highest = (border, self.highest) if count < self.TOP // 20 else (self.LOWEST, border - 1)
        if highest - count < lowest:
            raise Failed(f"no {count} adjacent ports between {lowest} and {highest}")
        for _ in range(200):
            first = random.randint(lowest, highest - count + 1)
            block = range(first, first + count)
            if self.given.isdisjoint(block) and all(is_free(port) for port in block):
                self.given.update(block)
                return first
        raise Failed(f"found no {count} adjacent free ports")

    def give_back(self, first: int, count: int) -> None:
        """For those who take ports again and again."""
        self.given.difference_update(range(first, first + count))


def is_free(port: int) -> bool:
    """Whether the port can be bound on every address."""
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError:
            return False
    return True


def get(port: int, path: str = "/", seconds: float = 5.0) -> tuple[int, bytes]:
    """One GET on loopback: status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def wait_until(what: str, probe, processes: list[Process], seconds: float = 15.0, pause: float = 0.02):
    """Asks `probe` until it returns something other than None; fails early if a process ends."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            result = probe()
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            result = None
        if result is not None:
            return result
        for process in processes:
            if not process.alive:
                code = process.popen.returncode
                raise Failed(f"{process.name} ended with {code}: {process.last_words()}")
        if time.monotonic() > deadline:
            words = "; ".join(f"{process.name}: {process.last_words()}" for process in processes)
            raise Failed(f"no {what} within {seconds:.0f} s ({words})")
        time.sleep(pause)


def wait_http(port: int, processes: list[Process], seconds: float = 15.0) -> None:
    """Waits until a GET of / answers 200 with the small answer's length."""

    def probe() -> bool | None:
        return True if get(port, seconds=1.0)[0] == 200 else None

    wait_until(f"answer on port {port}", probe, processes, seconds)
