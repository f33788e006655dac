"""Where the trials of a comparison run: in this process, in processes beside it, or on a Ray cluster.

All three are `concurrent.futures` executors, so that one scheduler (`run.py`) serves them::

    --jobs 1   Here                  submit(trial) has trained when it returns
    --jobs N   Beside                N at a time, each with its share of the cores
    --ray A    RayPool               as many at a time as the cluster has room for

A trial keeps all that it knows in its run folder. So it does not matter which of them began it, or on which node.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

import torch

from afds.compare.plan import CompareConfig, Trial
from afds.errors import AfdsError, ConfigError, TrainingError
from afds.hardware import resolve_device, usable_cores

PATIENCE = 20.0  # seconds that a cancelled trial is given to end its step
OBJECT_STORE = 2**27  # bytes of shared memory for a local Ray; a trial's line is some kB


class Here(Executor):
    """One trial after another, in this process; what one raises is raised by `submit`."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Beside(ProcessPoolExecutor):
    """Processes beside this one. They import for seconds before they can answer a Ctrl-C: until then it waits."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        usual = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes that are started now inherit it
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, usual)


class RayPool(Executor):
    """Trials as tasks of a Ray cluster, each with a share of a node's cores (and a GPU, where those are used).

    A trial whose node is lost is started again by Ray, on another one, and goes on from its last checkpoint.

    Raises:
        ConfigError: Ray is not installed, there is no cluster at the address, or it has no room for a trial.
    """

    def __init__(self, c: CompareConfig) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "--ray needs the package ray: pip install 'ray>=2.40'. Without it, --jobs N runs N trials at a time "
                "on this machine."
            ) from error
        assert c.ray is not None
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            self._connect(c.ray, c.jobs)
        try:
            self._start(c)
        except BaseException:
            self.shutdown()
            raise

    def _start(self, c: CompareConfig) -> None:
        self._device: Any = resolve_device(c.hardware)
        gpus = 1 if self._device == "cuda" else 0
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
        if not cores:
            raise ConfigError(f"--ray {c.ray}: no node of the cluster offers a core{' and a GPU' if gpus else ''}. "
                              "Start one with `ray start`, or use --ray local.")  # fmt: skip
        self.threads = max(1, min(cores) // c.jobs)
        self._remote = self._ray.remote(num_cpus=self.threads, num_gpus=gpus)(_on_node)
        self._place = (os.getcwd(), c.out.absolute())
        self._refs: dict[Future[Any], Any] = {}

    def _connect(self, address: str, jobs: int) -> None:
        local = address == "local"
        if local:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that photos are compared here
        options: dict[str, Any] = {"address": address}
        if local:
            options |= {"num_cpus": max(jobs, usable_cores()), "include_dashboard": False,
                        "object_store_memory": OBJECT_STORE}  # fmt: skip
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if host and port.isdigit():  # Ray itself tries a silent address for minutes
                socket.create_connection((host, int(port)), timeout=5).close()
            self._ray.init(**options, logging_level=logging.WARNING)
        except Exception as error:  # ConnectionError, ValueError, gRPC's own: whatever Ray makes of an address
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(
                f"--ray {address}: no Ray cluster answers there ({reason}). Give the address of one (HOST:PORT, or "
                "auto on one of its nodes), or --ray local."
            ) from error

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """fn: takes a trial and returns its line. Returns at once: Ray lets it wait until there is room."""
        ref = self._remote.remote(fn, self.threads, self._device, self._place, *args, **kwargs)
        outer: Future[Any] = Future()
        ref.future().add_done_callback(lambda inner: _hand_on(inner, outer))
        self._refs[outer] = ref
        return outer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End what still runs, as Ctrl-C would, and leave the cluster; a local one ends."""
        running = [future for future in getattr(self, "_refs", {}) if not future.done()]
        for future in running:
            self._ray.cancel(self._refs[future])
        wait_for(running, timeout=PATIENCE)
        if self._own:
            self._ray.shutdown()

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def make_pool(c: CompareConfig) -> tuple[Executor, int | None]:
    """The executor asked for, and how many trials it is given at a time; None: all that are ready.

    Raises:
        ConfigError: as `RayPool`.
    """
    if c.ray is not None:
        return RayPool(c), None
    if c.jobs == 1:
        return Here(), 1
    threads = max(1, usable_cores() // c.jobs)
    context = multiprocessing.get_context("spawn")
    return Beside(c.jobs, context, initializer=_begin, initargs=(threads,)), c.jobs


def _begin(threads: int) -> None:
    """Of a process beside this one: its share of the cores, and it ends with this one, however that ends.

    Left behind by a kill it would train on, in the very folder in which the comparison that is started again goes on.
    """
    import afds.compare.run  # noqa: F401, all that a trial needs, before a Ctrl-C is answered

    if signal.SIGINT in signal.sigpending():
        os._exit(130)  # nothing is begun yet
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for_end([sentinel])
    os._exit(1)  # checkpoints are written atomically: of the trial no more than an epoch is lost


def _on_node(fn: Callable[[Trial], Any], threads: int, device: Any, place: tuple[str, Path], trial: Trial) -> Any:
    """Runs on a node of the cluster: the same folder, threads and device as anywhere else, then the trial."""
    here, out = place
    if not (Path(here).is_dir() and (out / "compare.json").is_file()):
        raise ConfigError(f"{os.uname().nodename}: {out} and {here} are not there. With --ray, the folder in which the "
                          "command is started, the photos, weights and --out must be on a file system that "
                          "all nodes share.")  # fmt: skip
    os.chdir(here)  # relative paths in the options mean what they mean there
    torch.set_num_threads(threads)
    hardware = dataclasses.replace(trial.config.hardware, device=device)  # `auto` is decided once, not per node
    return fn(dataclasses.replace(trial, config=dataclasses.replace(trial.config, hardware=hardware)))


def _hand_on(inner: Future[Any], outer: Future[Any]) -> None:
    """A future with the error that the trial raised, not with Ray's account of it."""
    error = inner.exception()
    if error is None:
        outer.set_result(inner.result())
        return
    cause = getattr(error, "cause", None)
    if isinstance(cause, AfdsError):
        outer.set_exception(cause)
    elif type(error).__module__.startswith("ray.") and cause is None:  # a node or a process was lost, several times
        lost = TrainingError(f"A trial was lost on the Ray cluster: {error}. Started again, the same command goes on.")
        outer.set_exception(lost)
    else:
        outer.set_exception(error)
