"""Local Dask and Ray clusters of two nodes give what one machine gives, also when a node is killed in the middle.

A model with the attention shapes of Qwen2.5-7B and eight adapters in a dictionary, attributed on threads, then on each
cluster, then with one of its two nodes killed by SIGKILL when a third of the parameters are read. Inner products are
compared over the norms that bound them. Needs the extras `dask` and `ray`; not among what runs by default.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks import seven_b
from benchmarks.table import print_heading, print_ratio, print_rows
from unmerge.accumulate import Plan
from unmerge.attribution import Question, open_question
from unmerge.cluster import on_cluster
from unmerge.regression import Regression
from unmerge.result import Attribution

LIMIT = 1e-12
NODES = 2
_PATIENCE = 60.0
Found = tuple[Attribution, Regression]
Cluster = tuple[str, Callable[[], None]]
"""The address, and what kills one node."""


def run(arguments: list[str] | None = None) -> bool:
    """Print how far results of clusters are from one machine's, over the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cluster", description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of 28")
    parser.add_argument("--backend", choices=["dask", "ray"], help="one of the two; both by default")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; a temporary folder by default")
    options = parser.parse_args(arguments or [])
    chosen = [options.backend] if options.backend else list(CLUSTERS)
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        seven_b.write_models(folder, options.layers, whole=False)
        atoms = [folder / f"atom{number}" for number in range(seven_b.ATOMS)]
        question = open_question(atoms, base=folder / "base")
        here, seconds = _explain(question, folder)
        for backend in chosen:
            for killed in (False, True):
                found, taken = _on(backend, question, folder, killed=killed)
                apart = _apart(here, found)
                same = found[0].to_json() == here[0].to_json()
                worst = max(worst, *apart)
                label = f"{backend}, a node killed" if killed else backend
                numbers = [f"{taken / seconds:.2f}", *(f"{value:.1e}" for value in apart), "yes" if same else "no"]
                rows.append([label, *numbers])
    print_heading(f"Clusters of {NODES} local nodes, {options.layers} layers of Qwen2.5-7B's attention")
    header = ["backend", "time over threads'", "inner products apart", "coefficients apart", "same document"]
    print_rows(header, rows)
    return print_ratio("largest difference from one machine", worst, LIMIT, "")


def _explain(question: Question, folder: Path, kill: Callable[[], None] | None = None) -> tuple[Found, float]:
    """Return the answer and its seconds; kills when a third is read."""
    left = [kill] if kill else []

    def start(plan: Plan) -> Callable[[int], None]:
        read = 0

        def advance(count: int) -> None:
            nonlocal read
            read += count
            if left and 3 * read >= plan.count:
                left.pop()()

        return advance

    began = time.perf_counter()
    result, _, regression = question.explain(question.open_target(str(folder / "merge")), start=start)
    assert regression is not None
    assert not left, "nothing was killed"
    return (result, regression), time.perf_counter() - began


def _on(backend: str, question: Question, folder: Path, *, killed: bool) -> tuple[Found, float]:
    with CLUSTERS[backend]() as (address, kill), on_cluster(backend, address):
        return _explain(question, folder, kill if killed else None)


def _apart(here: Found, there: Found) -> tuple[float, float]:
    """Return how far inner products are apart over their bounds, and coefficients and weights over the largest."""
    products = [0.0]
    for one, other in zip(here[1].tensors, there[1].tensors, strict=True):
        first, second = one.statistics, other.statistics
        norms = np.sqrt(np.append(np.diag(first.gram), first.energy))
        bounds = np.maximum(np.outer(norms, norms), 1e-300)
        products.append(float(np.max(np.abs(first.gram - second.gram) / bounds[:-1, :-1])))
        products.append(float(np.max(np.abs(first.correlation - second.correlation) / bounds[:-1, -1])))
        products.append(abs(first.energy - second.energy) / bounds[-1, -1])
    numbers = [
        np.array([[item.coefficient, item.weight or 0.0] for item in sorted(found[0].components, key=lambda c: c.name)])
        for found in (here, there)
    ]
    return max(products), float(np.max(np.abs(numbers[0] - numbers[1])) / np.max(np.abs(numbers[0])))


@contextmanager
def _dask() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "scheduler.json"
        dask = [sys.executable, "-m", "dask"]
        here = ["--scheduler-file", str(file), "--no-dashboard"]
        worker = ["worker", *here, "--nthreads", "1", "--no-nanny", "--local-directory", name]
        processes = [_spawn([*dask, "scheduler", *here, "--host", "127.0.0.1", "--port", "0"])]
        try:
            processes += [_spawn([*dask, *worker]) for _ in range(NODES)]
            address = _scheduler(file)
            _wait_for_workers(address)
            yield address, lambda: os.kill(processes[-1].pid, signal.SIGKILL)
        finally:
            for process in reversed(processes):
                process.kill()
                process.wait()


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _scheduler(file: Path) -> str:
    began = time.monotonic()
    while time.monotonic() - began < _PATIENCE:
        try:
            address: str = json.loads(file.read_text(encoding="utf-8"))["address"]
        except (FileNotFoundError, json.JSONDecodeError):  # not there, or not whole yet
            time.sleep(0.1)
        else:
            return address
    raise SystemExit("the Dask scheduler did not start")


def _wait_for_workers(address: str) -> None:
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(NODES, timeout=_PATIENCE)


@contextmanager
def _ray() -> Iterator[Cluster]:
    import ray
    from ray.cluster_utils import Cluster as Nodes

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    store = 128 * 2**20
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": store})
    try:
        other = nodes.add_node(num_cpus=1, object_store_memory=store)
        nodes.wait_for_nodes(_PATIENCE)
        yield nodes.address, lambda: nodes.remove_node(other, allow_graceful=False)
    finally:
        ray.shutdown()
        nodes.shutdown()


CLUSTERS = {"dask": _dask, "ray": _ray}
