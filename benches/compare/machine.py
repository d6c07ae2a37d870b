"""The machine: what it is, which versions run on it, and how much of it others took meanwhile."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from datetime import datetime
from pathlib import Path

from install import RATHOLE_VERSION
from process import TICK, Processes


def cores() -> int:
    """The cores this program may use."""
    return len(os.sched_getaffinity(0))


def describe(repository: Path, binaries: dict[str, Path]) -> dict[str, str]:
    """Date, processor, kernel and versions; `binaries` are those that aren't on the path."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    facts = {
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu.group(1).strip() if cpu else platform.machine(),
        "cores": str(cores()),
        "memory": f"{int(memory.group(1)) / 2**20:.0f} GiB" if memory else "?",
        "kernel": platform.release(),
    }
    commands = {
        "silo-proxy": [binaries.get("silo-proxy"), "--version"],
        "nginx": ["nginx", "-v"],
        "HAProxy": ["haproxy", "-v"],
        "wrk": ["wrk", "-v"],
        "ab": ["ab", "-V"],
        "curl": ["curl", "--version"],
        "rustc": ["rustc", "--version"],
    }
    for name, command in commands.items():
        if command[0] is not None and (version := first_version(command)):
            facts[name] = version
    if "rathole" in binaries:
        # Its own --version speaks of the build first; the version is the one that was installed.
        facts["rathole"] = RATHOLE_VERSION
    if revision := git_revision(repository):
        facts["revision"] = revision
    return facts


def first_version(command: list[object]) -> str | None:
    """The first thing in a program's words that looks like a version."""
    try:
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = result.stdout + result.stderr
    found = re.search(r"\d+\.\d+(\.\d+)?", words) if words else None
    return found.group(0) if found else None


def git_revision(repository: Path) -> str | None:
    """The commit, with a mark if the tree holds more than that."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


class Others:
    """The share of the processor that programs outside the comparison took between two looks.

    A figure taken while something else compiled says little: each sample carries this share.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.start = (time.monotonic(), busy_seconds(), processes.cpu())

    def share(self) -> float:
        """0 to 1, of all cores; time stolen by the hypervisor counts as others'."""
        at, busy, ours = self.start
        elapsed = max(time.monotonic() - at, 1e-3)
        foreign = (busy_seconds() - busy) - (self.processes.cpu() - ours)
        return min(max(foreign / (elapsed * cores()), 0.0), 1.0)


def wait_quiet(processes: Processes, allowed: float, seconds: float) -> None:
    """Waits until others take less than `allowed` of the processor for half a second, at most `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        others = Others(processes)
        time.sleep(0.5)
        if others.share() <= allowed:
            return


def busy_seconds() -> float:
    """Processor time of the whole machine that wasn't idle."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) * TICK
