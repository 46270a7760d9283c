"""What the benchmarks share: the record of the environment, quartiles, and the results on disk."""

import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"


def environment(threads: int) -> dict[str, Any]:
    """Records what a figure depends on: commit, versions, hardware."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "src_differs_from_commit": bool(_git("status", "--porcelain", "--", "../src")),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("lightning-moe", "torch", "transformers")},
        },
        "device": "cpu",
        "hardware": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
    }


def write_result(benchmark: str, record: dict[str, Any]) -> Path:
    """Writes one run to a new file; earlier runs are never touched."""
    folder = RESULTS / benchmark
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc)
    record = {"benchmark": benchmark, "date": now.isoformat(timespec="seconds"), **record}
    number = 1
    while True:
        path = folder / f"{now:%Y-%m-%d}_{record['commit'][:8]}_{number}.json"
        try:
            with path.open("x") as file:
                json.dump(record, file, indent=1)
                file.write("\n")
            return path
        except FileExistsError:
            number += 1


def quartiles(values: Sequence[float]) -> dict[str, float | int]:
    """Returns the median and the quartiles; of a single value, that value three times."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(median, 4), "q1": round(low, 4), "q3": round(high, 4), "rounds": len(values)}


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(_field(line) for line in lines)
    name = fields.get("model name") or platform.processor() or platform.machine()
    # virtual machines hide the product's name; family and model tell the microarchitecture
    return f"{name} (family {fields['cpu family']} model {fields['model']})" if "model" in fields else name


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()
