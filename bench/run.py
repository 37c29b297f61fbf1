"""Times the ops, keeps the JSON in bench/results/ and prints the medians: python bench/run.py [pytest arguments]."""

import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ops.json"
# bf16 only where there is a product with bf16 weights, the last two only for draft_sample with filters.
BASELINES = ("reference", "torch.compile", "bf16", "transformers", "unfiltered")


def run(arguments):
    RESULTS.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "bench_ops.py", "-q", "--no-header",
               "--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={RESULTS}", *arguments]
    return subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def medians(results):
    """{group: {implementation: median in microseconds}}"""
    groups = {}
    for benchmark in results["benchmarks"]:
        microseconds = benchmark["stats"]["median"] * 1e6
        groups.setdefault(benchmark["group"], {})[benchmark["extra_info"]["implementation"]] = microseconds
    return groups


def table(results):
    machine = results["machine_info"]["cpu"].get("brand_raw", "CPU")
    drawn = Table(title=f"Median microseconds a call, bf16, one row, one thread ({machine})")
    drawn.add_column("op")
    for heading in ("speckv", *BASELINES):
        drawn.add_column(heading, justify="right")
    for baseline in BASELINES:
        drawn.add_column(f"x {baseline}", justify="right")
    for group, by_name in medians(results).items():
        ours = by_name.get("speckv")
        times = [f"{by_name[name]:.1f}" if name in by_name else "" for name in ("speckv", *BASELINES)]
        ratios = [f"{by_name[name] / ours:.1f}" if ours and name in by_name else "" for name in BASELINES]
        drawn.add_row(group, *times, *ratios)
    return drawn


if __name__ == "__main__":
    status = run(sys.argv[1:])
    if RESULTS.exists() and RESULTS.stat().st_size:
        console = Console()
        console.width = max(console.width, 112)  # a table folded to 80 columns, as in a log, cannot be read
        console.print(table(json.loads(RESULTS.read_text())))
    sys.exit(status)
