"""Where the work is done changes no bit, and a cluster that is not there is one line."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from joblib import parallel_config

from tests.conftest import Shelf
from unmerge import attribute, cluster, on_cluster
from unmerge.accumulate import Plan
from unmerge.checkpoint.header import read_header
from unmerge.errors import ClusterError, MissingExtraError, TargetError
from unmerge.testing import write_checkpoint


@pytest.mark.filterwarnings("default")  # those of Dask are its own
def test_a_dask_cluster_gives_the_same_bytes_and_errors(shelf: Shelf) -> None:
    from distributed import LocalCluster

    atoms = shelf.paths("add", "sub", "full")
    here = attribute(shelf.path("merge"), atoms, base=shelf.base).to_json()
    broken = {name: value.copy() for name, value in shelf.model.items()}
    broken["model.layers.1.self_attn.q_proj.weight"][3, 2] = np.nan
    write_checkpoint(shelf.folder / "broken", broken)
    cluster_here = LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None)
    with cluster_here as workers, on_cluster("dask", workers.scheduler_address):
        there = attribute(shelf.path("merge"), atoms, base=shelf.base).to_json()
        with pytest.raises(TargetError, match="has NaN at row 3, column 2"):
            attribute(shelf.path("broken"), atoms, base=shelf.base)
    assert there == here


def test_only_units_travel_each_with_its_own_tensor_alone(shelf: Shelf) -> None:
    atoms = shelf.paths("add", "sub", "full")
    here = attribute(shelf.path("merge"), atoms, base=shelf.base).to_json()
    plans: list[Plan] = []
    sent: list[bytes] = []

    def start(plan: Plan) -> Callable[[int], None]:
        plans.append(plan)
        return [].append

    with ThreadPoolExecutor(2) as elsewhere:

        def submit(func: Callable[[], object]) -> Future[object]:
            sent.append(cloudpickle.dumps(func))
            return elsewhere.submit(pickle.loads(sent[-1]))  # noqa: S301 - made here

        backend = cluster._backend(submit, 2, lambda future: future.result())
        with parallel_config(backend=backend, n_jobs=2):
            there = attribute(shelf.path("merge"), atoms, base=shelf.base, start=start).to_json()
    assert there == here
    assert len(sent) == sum(len(plan.units) for plan in plans)
    assert all(message.count(b"self_attn.q_proj.weight") < 8 for message in sent)
    assert max(map(len, sent)) < 20_000


def test_the_place_of_a_tensor_travels_without_the_folder_it_was_named_from(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shelf.folder)
    tensors, _ = read_header(Path("base") / "model.safetensors")
    tensor = next(iter(tensors.values()))
    expected = tensor.read(0, 2)
    sent = pickle.dumps(tensor)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(pickle.loads(sent).read(0, 2), expected)  # noqa: S301 - made here


def test_what_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    with pytest.raises(ClusterError, match="unknown backend 'slurm'; expected one of threads, dask, ray"):
        on_cluster("slurm").__enter__()
    with pytest.raises(ClusterError, match="threads have none"):
        on_cluster("threads", "tcp://here:1").__enter__()
    with pytest.raises(ClusterError, match=r"dask at tcp://127.0.0.1:9: the cluster does not answer \("):
        on_cluster("dask", "tcp://127.0.0.1:9").__enter__()


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, backend: str, package: str) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'unmerge\[{backend}\]'"):
        on_cluster(backend).__enter__()
