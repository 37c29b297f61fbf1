"""Times the ops and holds them against what this machine can do: python bench/run.py [pytest arguments]

Measures the floors (bench/floors.py) and the ops in one process, keeps the JSON and a plot in bench/results/, and
prints the medians.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from floors import floor_us, sentence
from plot_ops import PLOT, draw
from rich.console import Console
from rich.table import Table

from speckv.training_plot import INSTALL, can_draw

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ops.json"
# bf16 only where there is a product with bf16 weights, unfiltered only for draft_sample with filters.
BASELINES = ("reference", "torch.compile", "transformers", "sklearn", "bf16", "unfiltered")


def run(arguments):
    RESULTS.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "bench_ops.py", "-q", "--no-header", "-p", "no:cacheprovider",
               "--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={RESULTS}", "-r", "fE", *arguments]
    return subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def groups(results):
    """{group: {"floor": microseconds or None, "bound": which floor, "info": of speckv, implementation: median µs}}"""
    grouped = {}
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        row = grouped.setdefault(benchmark["group"], {"floor": None, "bound": "", "info": {}})
        row[info["implementation"]] = benchmark["stats"]["median"] * 1e6
        if info["implementation"] == "speckv" and info["bytes"]:
            row["floor"], row["bound"] = floor_us({**results["floors"], "exp": info["exp"]}, info["bytes"],
                                                 info["exps"])
            row["info"] = info
    return grouped


def table(results):
    machine = results["machine_info"]["cpu"].get("brand_raw", "CPU")
    drawn = Table(title=f"Median microseconds a call, one thread ({machine}); x: times as long as speckv",
                  caption=sentence(results["floors"]))
    drawn.add_column("op")
    for heading in ("floor", "of", "speckv", "/ floor", *BASELINES):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for group, row in groups(results).items():
        ours = row.get("speckv")
        floor = (f"{row['floor']:.1f}", row["bound"]) if row["floor"] else ("", "")
        over = f"{ours / row['floor']:.2f}" if ours and row["floor"] else ""
        others = [f"{row[name]:,.0f}" + (f" {row[name] / ours:.1f}x" if ours else "") if name in row else ""
                  for name in BASELINES]
        drawn.add_row(group, *floor, f"{ours:.1f}" if ours else "", over, *others)
    return drawn


def stamp():
    """Tells one writing of the results from another."""
    return RESULTS.stat().st_mtime_ns if RESULTS.exists() else None


if __name__ == "__main__":
    before = stamp()
    status = run(sys.argv[1:])
    if stamp() != before and RESULTS.stat().st_size:  # else they are those of an earlier run
        results = json.loads(RESULTS.read_text())
        console = Console()
        console.width = max(console.width, 180)  # a table folded to 80 columns, as in a log, cannot be read
        console.print(table(results))
        if can_draw():
            draw(groups(results), RESULTS.parent / PLOT)
        else:
            console.print(f"no plot without matplotlib: {INSTALL}")
    sys.exit(status)
