"""What the comparison needs on the machine: Debian's load makers and peers, rathole, silo-proxy itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from process import Failed

RATHOLE_VERSION = "0.5.0"

DEBIAN = {
    "nginx": "nginx",
    "haproxy": "haproxy",
    "wrk": "wrk",
    "ab": "apache2-utils",
    "curl": "curl",
    "perf": "linux-perf",
}
"""Program to Debian package."""


def add_sbin_to_path() -> None:
    """nginx and haproxy live in /usr/sbin, which isn't on every user's path."""
    paths = os.environ.get("PATH", "").split(":")
    os.environ["PATH"] = ":".join(paths + [path for path in ("/usr/sbin", "/sbin") if path not in paths])


def debian_packages(needed: set[str]) -> None:
    """Installs what is missing of the programs' Debian packages, or says how and ends."""
    missing = sorted({DEBIAN[program] for program in needed if shutil.which(program) is None})
    if not missing:
        return
    line = "apt-get install -y --no-install-recommends " + " ".join(missing)
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        sys.exit(f"missing: {', '.join(missing)}\ninstall them with: sudo {line}")
    # RUNLEVEL=1 keeps Debian from starting nginx and haproxy as services of the machine.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in ("apt-get update", line):
        if subprocess.run(command.split(), env=environment, stdout=sys.stderr).returncode != 0:
            sys.exit(f"failed: {command}")


def rathole(cache: Path) -> Path:
    """rathole's binary, compiled once into the cache."""
    root = cache / f"rathole-{RATHOLE_VERSION}"
    binary = root / "bin" / "rathole"
    if not binary.exists():
        # Not --locked: the lock file it was published with holds a `time` that no longer compiles.
        command = ["cargo", "install", "rathole", "--version", RATHOLE_VERSION, "--no-default-features"]
        command += ["--features", "server,client", "--root", str(root)]
        environment = {**os.environ, "CARGO_TARGET_DIR": str(cache / "build")}
        run_cargo(command, environment)
        shutil.rmtree(cache / "build", ignore_errors=True)
    return binary


def silo_proxy(repository: Path) -> Path:
    """silo-proxy's binary in release, built from the working tree."""
    command = ["cargo", "build", "--release", "--bin", "silo-proxy"]
    run_cargo([*command, "--manifest-path", str(repository / "Cargo.toml")], dict(os.environ))
    return target_directory(repository) / "release" / "silo-proxy"


def target_directory(repository: Path) -> Path:
    """Cargo's target directory, wherever the user's settings put it."""
    command = ["cargo", "metadata", "--no-deps", "--format-version", "1"]
    command += ["--manifest-path", str(repository / "Cargo.toml")]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
        return Path(json.loads(result.stdout)["target_directory"])
    except (OSError, ValueError, KeyError):
        return repository / "target"


def run_cargo(command: list[str], environment: dict[str, str]) -> None:
    print("$", " ".join(command), file=sys.stderr)
    try:
        result = subprocess.run(command, env=environment, stdout=sys.stderr)
    except OSError as error:
        raise Failed(f"cargo: {error}") from error
    if result.returncode != 0:
        raise Failed(f"`{' '.join(command[:3])}` ended with {result.returncode}")
