"""A Predictor in many processes, on one machine or many: actors of Ray Data's ``map_batches``.

A row of Ray's data set is one batch of a plain run, so the records are those of a plain run. Ray hands out the rows; it
replaces a worker that died and repeats what that one had in hand. Needs the optional extra ``ray``, imported when used.
"""

import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any

import torch

from vit.inputs import Unreadable
from vit.memory import keep_freed_memory
from vit.predictor import BATCH_SIZE, Batch, Precision, Predictor

PIECE = 8  # batches that a worker is given at once: it decodes the next one while it computes


class ClusterError(RuntimeError):
    """No cluster, or one that cannot do the work; the message is one line."""


class Worker:
    """A Predictor in a process of its own: pickled sources in, pickled Batches out.

    Args:
        options: Arguments of Predictor.
        call: Arguments of its ``classify``.
        compile: Size of the batches if the model is to be compiled for them.
        folder: What relative paths are relative to.
    """

    def __init__(self, options: dict[str, Any], call: dict[str, Any], compile: int | None, folder: str):
        os.chdir(folder)
        keep_freed_memory()  # and the next, as where predict.py computes by itself
        torch.backends.cudnn.allow_tf32 = False
        self.predictor, self.call = Predictor(**options), call
        if compile:
            self.predictor.compile(compile)

    def __call__(self, rows: dict[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        for batch in self.predictor.classify(map(pickle.loads, rows["batch"]), **self.call):
            yield {"batch": [pickle.dumps(batch)]}


class Cluster:
    """Computes a Predictor's batches elsewhere; a context manager that joins or starts Ray and leaves or ends it.

    ``RAY_ADDRESS`` names the cluster; without it one that runs on this machine is joined, or one is started for as long
    as this lasts. Its machines need this code, the images, and the present folder, under the same names.

    Args:
        predictor: On the CPU; its model is copied to the workers.
        device: Of the workers, as for Predictor; where the cluster has GPUs, ``auto`` and ``cuda`` give each its own.
        precision: Of the workers, as for Predictor.
        compile: Whether those with a GPU compile the model.
    """

    def __init__(
        self, predictor: Predictor, *, device: str = "auto", precision: Precision = "float32", compile: bool = False
    ):
        self.predictor, self.device, self.precision, self.compile = predictor, device, precision, compile
        self.batch_size = predictor.batch_size
        self.gpus = 0
        self.stack = ExitStack()

    def __enter__(self) -> "Cluster":
        """Join or start Ray.

        Raises:
            ClusterError: If there is no cluster at that address.
        """
        import ray

        with ExitStack() as stack:
            # Ray tells of its life on standard output and in logs; ours is for records.
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.ERROR)
            self._join()
            stack.callback(ray.shutdown)
            self.stack = stack.pop_all()
        if self.device.startswith(("auto", "cuda")):
            self.gpus = int(ray.cluster_resources().get("GPU", 0))
        if self.gpus:
            self.device, self.batch_size = "cuda", BATCH_SIZE["cuda"]
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @staticmethod
    def _join() -> None:
        import ray

        address = os.environ.get("RAY_ADDRESS", "")
        host, _, port = address.rpartition("/")[2].rpartition(":")
        if port.isdecimal():
            try:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            except OSError as error:
                raise ClusterError(f"no Ray cluster at RAY_ADDRESS={address}: {error.strerror or error}") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(include_dashboard=False, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            at = f" at RAY_ADDRESS={address}" if address else ""
            raise ClusterError(f"no Ray cluster{at}: {_line(error.__cause__ or error)}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray has put its own there

    def classify(
        self,
        batches: Iterable[Sequence[str | Unreadable]],
        *,
        workers: int | None = None,
        **asked: Any,
    ) -> Iterator[Batch]:
        """As the Predictor's, but all paths are listed before the first batch is computed.

        Args:
            batches: Paths, batch by batch.
            workers: Processes; none for one a GPU, or else one a core.
            asked: What else the Predictor's takes: which maps to make, and whether to measure them.

        Raises:
            ClusterError: If no worker can be started, or the cluster is lost.
        """
        import ray.data
        from ray.exceptions import RayError

        rows = [{"batch": pickle.dumps(batch)} for batch in batches]
        if not rows:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        model, about = self.predictor.model, self.predictor.about
        options = {"model": model, "about": about, "device": self.device, "precision": self.precision}
        call = {**asked, "workers": None if self.gpus else 1}  # a worker on the CPU has one core
        size = len(pickle.loads(rows[0]["batch"]))
        pieces = -(-len(rows) // PIECE)
        most = workers or self.gpus or int(ray.cluster_resources()["CPU"])
        results = ray.data.from_items(rows, override_num_blocks=pieces).map_batches(
            Worker,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(options, call, size if self.compile and self.gpus else None, os.getcwd()),
            batch_size=None,
            num_gpus=1 if self.gpus else None,
            compute=ray.data.ActorPoolStrategy(size=min(pieces, most)),
        )
        try:
            for row in results.iter_rows():
                yield pickle.loads(row["batch"])
        except RayError as error:
            raise ClusterError(f"Ray: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """The last line of an error, which with Ray's is the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
