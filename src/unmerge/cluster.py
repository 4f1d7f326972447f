"""Sends the units of work to a cluster: threads of this machine by default, Dask or Ray by naming them.

The statistics are sums over blocks of rows, so a unit of work travels as the names and places of a few tensors, and
its sums come back; the weights are read where the work is done. Both clusters give a unit that was lost with its worker
to another one, some times; nothing that was finished is lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from unmerge.errors import ClusterError, MissingExtraError

BACKENDS = ("threads", "dask", "ray")
PATIENCE = 20
"""Seconds to wait for a cluster to answer."""
LOSSES = 3
"""How often one unit may be lost with its worker before the run gives up."""


@contextmanager
def on_cluster(backend: str = "threads", address: str | None = None, *, workers: int | None = None) -> Iterator[None]:
    """Send the passes over the files to a cluster, for as long as the context lasts.

    All files must be found under the same paths by every worker (a shared file system), and unmerge be installed there.
    Results are equal to those of one machine; to the bit, if the workers' processors and packages are the same.

    Parameters
    ----------
    backend : str
        ``"threads"`` of this machine, ``"dask"`` (needs the extra `dask`) or ``"ray"`` (needs the extra `ray`).
    address : str, optional
        Where the cluster listens: ``tcp://scheduler:8786`` for Dask, ``head:6379`` or ``auto`` for Ray. Without one, a
        cluster of this machine's processes is started, and stopped at the end.
    workers : int, optional
        Processes of such a local cluster; all cores by default.

    Raises
    ------
    ClusterError
        If there is no such backend, or the cluster does not answer; and from what runs inside, if it is lost.
    MissingExtraError
        If the backend's packages are not installed.
    """
    if backend not in BACKENDS:
        raise ClusterError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "threads":
        if address is not None:
            raise ClusterError(f"address {address}: threads have none; name the cluster with --backend dask or ray")
        yield
        return
    connect = _dask if backend == "dask" else _ray
    with connect(address, workers or os.cpu_count() or 1) as (submit, cores, retrieve):
        from joblib import parallel_config

        if not cores:
            raise ClusterError(f"{backend} at {address}: the cluster has no workers; start some")
        with parallel_config(backend=_backend(submit, cores, retrieve), n_jobs=cores):
            yield


Submit = Callable[[Callable[[], Any]], Any]
"""Takes a function to a worker and returns a future of what it returns."""
Connection = tuple[Submit, int, Callable[[Any], Any]]
"""How to submit, how many units run at once, and how to get the result of a future that is done."""


def _backend(submit: Submit, cores: int, retrieve: Callable[[Any], Any]) -> Any:
    """Return what joblib sends work through.

    Its own backend for Dask scatters arguments, which are lost with the worker that holds them; Ray's keeps a pool of
    workers, which is not filled up again. Here every unit is a task of its own, that the cluster itself runs again.
    """
    from joblib.parallel import ParallelBackendBase

    class Cluster(ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
        supports_retrieve_callback = True

        def effective_n_jobs(self, n_jobs: int) -> int:
            del n_jobs  # the cluster's own size counts; with 1, joblib would not use the cluster
            return max(2, cores)

        def submit(self, func: Callable[[], Any], callback: Callable[[Any], None] | None = None) -> Any:
            future = submit(func)
            if callback is not None:
                future.add_done_callback(callback)
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            try:
                return retrieve(out)
            except ImportError as error:
                message = f"a worker cannot import what it needs ({error}); install the same unmerge there"
                raise ClusterError(message) from error

    return Cluster()


def _missing(backend: str) -> MissingExtraError:
    return MissingExtraError(f"--backend {backend} needs more packages: pip install 'unmerge[{backend}]'")


@contextmanager
def _dask(address: str | None, workers: int) -> Iterator[Connection]:
    try:
        import dask
        from distributed import Client, LocalCluster
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise _missing("dask") from error

    def retrieve(future: Any) -> Any:
        try:
            return future.result()
        except KilledWorker as error:
            raise _lost("dask") from error
        except (FutureCancelledError, OSError) as error:
            raise ClusterError(f"dask: the cluster was lost ({type(error).__name__}); run again") from error

    settings = {"distributed.scheduler.allowed-failures": LOSSES, "distributed.comm.timeouts.connect": f"{PATIENCE}s"}
    with dask.config.set(settings):
        local = None
        try:
            if address is None:
                local = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
            client = Client(address or local, timeout=PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise _no_answer("dask", address, error) from error
        with local or _nothing(), client:
            yield lambda func: client.submit(func, pure=False), sum(client.ncores().values()), retrieve


@contextmanager
def _ray(address: str | None, workers: int) -> Iterator[Connection]:
    # Ray would tell its makers that it was started.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise _missing("ray") from error

    def retrieve(future: Any) -> Any:
        try:
            return future.result()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.WorkerCrashedError as error:
            raise _lost("ray") from error
        except ray.exceptions.RayError as error:
            raise ClusterError(f"ray: the cluster was lost ({type(error).__name__}); run again") from error

    started = not ray.is_initialized()
    if started:
        _knock(address)
        local = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
        try:
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise _no_answer("ray", address, error) from error
    try:
        run = ray.remote(_call).options(num_cpus=1, max_retries=LOSSES)
        yield lambda func: run.remote(func).future(), int(ray.cluster_resources().get("CPU", 0)), retrieve
    finally:
        if started:
            ray.shutdown()


def _knock(address: str | None) -> None:
    """Refuse an address where nothing listens: Ray would go on trying for minutes."""
    import socket

    host, sign, port = (address or "").removeprefix("ray://").rpartition(":")
    if sign and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except OSError as error:
            raise _no_answer("ray", address, error) from error


def _call(func: Callable[[], Any]) -> Any:
    return func()


def _nothing() -> AbstractContextManager[None]:
    from contextlib import nullcontext

    return nullcontext()


def _lost(backend: str) -> ClusterError:
    return ClusterError(f"{backend}: a unit of work was lost with its worker {LOSSES + 1} times; look at their memory")


def _no_answer(backend: str, address: str | None, error: Exception) -> ClusterError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ClusterError(f"{backend} at {address or 'this machine'}: the cluster does not answer ({reason})")
