"""Every figure carries where it is from: device, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import kto_kernels
from kto_kernels.backends import cpu

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def describe(device: str) -> dict:
    where = {"device": _device(device), "driver": _driver(device), "threads": torch.get_num_threads()}
    return where | versions_and_commit()


def versions_and_commit() -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "kto_kernels": kto_kernels.__version__}
    for package in ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "commit": commit("kto_kernels", "csrc", "benchmarks/*.py", "setup.py"),
        "date": datetime.date.today().isoformat(),
    }


def provenance(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    where = "compiled, not run"
    if "device" in result:
        driver = f", driver {result['driver']}" if result.get("driver") else ""
        where = f"{result['device']}{driver}, {result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return f"{where}; {versions}; commit {result['commit']}; {result['date']}"


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    isa = f", {cpu.instruction_set()}" if cpu.instruction_sets() else ""
    return f"{model}, {os.cpu_count()} logical processors{isa}"


def _driver(device: str) -> str | None:
    """The version of the GPU's driver, and the CUDA that torch was built with."""
    if device != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        found = "unknown"
    return f"{found}, CUDA {torch.version.cuda}"


def commit(*paths: str) -> str:
    """The commit the figures belong to, marked where a file of these paths differs from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", *paths],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")
