"""Runs that are killed, starved of disk or split over nodes against undisturbed ones: ``-m benchmarks.kill_resume``.

Every run is a process of its own, forked from this one after the imports, so that hundreds take minutes. A run counts
as killed only if the system says that SIGKILL ended it between its first step and its last. Two runs are equal if the
weights, the optimiser's state, the exported model and the table of metrics have the same hash.
"""

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import data.cache
import train
import vit.guard
from benchmarks.record import record
from vit.checkpoint import load_checkpoint
from vit.classifier import ViTClassifier
from vit.saving import CheckpointFile

ROOT = Path(__file__).parent.parent
MODEL = ["--model.embed_dim=32", "--model.depth=2", "--model.num_heads=2", "--model.drop_path_rate=0.1"]
SMALL = [f"--config={ROOT / 'configs/digits.yaml'}", *MODEL, "--data.batch_size=128"]  # ten steps an epoch
EMA = "{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.99}}"
KINDS = {
    "in memory, no workers": ([], 1),
    "files, 2 workers": (["--data.dataset={images}", "--data.num_workers=2", "--data.batch_size=32"], 1),
    "compiled": (["--model.compile=true"], 1),
    "2 processes": ([], 2),
    "accumulation 2": (["--trainer.accumulate_grad_batches=2"], 1),
    "averaged weights": ([f"--trainer.callbacks=[{EMA}]"], 1),
    "2 processes, weights shared out": ([f"--config={ROOT / 'configs/fsdp.yaml'}", "--model.optimizer=adamw"], 2),
}


@dataclass
class Run:
    """Processes of one training run, and what is known about them from outside.

    Args:
        root: Folder of the run.
        args: Arguments of train.py.
        pids: Its processes, rank by rank.
        shared: Steps done, as each process counts them: int64.
    """

    root: Path
    args: list[str]
    pids: list[int]
    shared: mmap.mmap
    status: list[int | None] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return min(struct.unpack(f"{len(self.pids)}q", self.shared[: 8 * len(self.pids)]))

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.root.parent.glob(f"{self.root.name}.*.log")))

    def poll(self) -> bool:
        """Whether all processes have ended; their exit codes are in ``status``, negative for a signal."""
        for rank, pid in enumerate(self.pids):
            if self.status[rank] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                self.status[rank] = os.waitstatus_to_exitcode(status) if found else None
        return None not in self.status

    def wait(self, seconds: float = 900) -> list[int | None]:
        """Exit codes; whoever runs on after that time is killed and has none."""
        end = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < end:
            time.sleep(0.005)
        for pid, status in zip(self.pids, self.status, strict=True):
            if status is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return self.status

    def wait_for_step(self, step: int) -> None:
        while self.steps < step and not self.poll():
            time.sleep(0.0005)

    def kill(self) -> None:
        for pid, status in zip(self.pids, self.status, strict=True):
            if status is None:
                os.kill(pid, signal.SIGKILL)


def start(
    root: Path,
    args: list[str],
    *,
    ranks: int = 1,
    nodes: int = 1,
    prepare: Callable[[int], None] = lambda rank: None,
    base: Sequence[str] = SMALL,
) -> Run:
    """Fork the processes of one run of ``train.py fit``.

    Args:
        root: Folder of the run.
        args: Arguments added to those of all runs here.
        ranks: Number of processes.
        nodes: Number of nodes they pretend to be on.
        prepare: Called in each process with its rank, before training.
        base: Model and data.
    """
    args = [
        "fit",
        *base,
        "--trainer.max_epochs=3",
        "--trainer.accelerator=cpu",
        f"--trainer.devices={ranks // nodes}",
        f"--trainer.num_nodes={nodes}",
        f"--trainer.default_root_dir={root}",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
        "--guard.minutes=0",
        *args,
    ]
    shared = mmap.mmap(-1, 8 * ranks)
    port = free_port()
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            torch.set_num_threads(1)  # renews torch's thread pool: after a fork it aborts if two threads do so at once
            log = os.open(f"{root}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:  # as torchrun does
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank % (ranks // nodes)),
                    "GROUP_RANK": str(rank // (ranks // nodes)),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks // nodes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "kill_resume",
                }

            def count(module: ViTClassifier, *_: Any, rank: int = rank) -> None:
                struct.pack_into("q", shared, 8 * rank, module.global_step)

            ViTClassifier.on_train_batch_end = count  # type: ignore[method-assign]
            vit.guard.SAVING = 1.0  # save as often as possible
            prepare(rank)
            code = train.main(args)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return Run(root, args, pids, shared, [None] * ranks)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def leaves(value: Any) -> Iterator[torch.Tensor | str]:
    """Tensors and texts of nested containers, in order."""
    if isinstance(value, dict):
        for key in value:
            yield str(key)
            yield from leaves(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value if isinstance(value, torch.Tensor) else repr(value)


def digest(root: Path) -> str:
    """Hash of what a run leaves: weights, optimiser and schedule at its end, the exported model, what was measured."""
    last = torch.load(root / "last.ckpt", weights_only=True, map_location="cpu")
    model, about = load_checkpoint(root / "model.safetensors")
    kept = [last[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")]
    kept += [last.get("current_model_state"), model.state_dict(), about.temperature, about.metrics]
    kept.append((root / "metrics.csv").read_text())
    total = hashlib.sha256()
    for leaf in leaves(kept):
        total.update(leaf.contiguous().numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf.encode())
    return total.hexdigest()


def finish(run: Run) -> str:
    """Hash of a run once it has ended well."""
    if any(run.wait()):
        raise RuntimeError(f"{run.root}: exit {run.status}\n{run.output[-2000:]}")
    return digest(run.root)


def images(folder: Path) -> Path:
    """A folder of small images, two classes, from the digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:400], digits.target[:400], strict=True)):
        path = folder / "train" / ("even" if label % 2 == 0 else "odd") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(path)
    return folder


def decode_always(rank: int) -> None:
    data.cache.LIMIT = 0  # a set too large for memory


def kills(folder: Path, kind: str, times: int) -> dict[str, Any]:
    """Kill a run at random moments, each time a new one, and start it again; compare with one left alone."""
    args, ranks = KINDS[kind]
    args = [arg.replace("{images}", str(folder / "images")) for arg in args]
    prepare = decode_always if "workers=2" in "".join(args) else lambda rank: None
    chance = random.Random(0)
    undisturbed = start(folder / "undisturbed", args, ranks=ranks, prepare=prepare)
    wanted, total = finish(undisturbed), undisturbed.steps
    equal = killed = resumed = 0
    while killed < times:
        root = folder / f"killed{killed}"
        shutil.rmtree(root, ignore_errors=True)
        run = start(root, args, ranks=ranks, prepare=prepare)
        run.wait_for_step(chance.randrange(2, total))
        time.sleep(chance.uniform(0, 0.02))
        run.kill()
        if set(run.wait()) != {-signal.SIGKILL} or not 0 < run.steps < total:
            continue  # it was over before: no kill in mid-run
        killed += 1
        resumed += (root / "last.ckpt").exists()
        equal += finish(start(root, [*args, "--ckpt_path=last"], ranks=ranks, prepare=prepare)) == wanted
        shutil.rmtree(root)
    shutil.rmtree(folder / "undisturbed")
    return {"case": f"kill -9, {kind}", "times": times, "from a checkpoint": resumed, "as wanted": equal}


def kills_while_saving(folder: Path, times: int) -> dict[str, Any]:
    """Kill a process within a save, again and again into the same file; it must load, with all of one moment."""
    path, chance, loads = folder / "last.ckpt", random.Random(0), 0
    shared = mmap.mmap(-1, 16)  # whether it is saving now, and how often it has

    def save_for_ever() -> None:
        number = 0
        while True:
            checkpoint = {"state_dict": {f"{i}": torch.full((250_000,), float(number)) for i in range(8)}}
            struct.pack_into("2q", shared, 0, 1, number)
            CheckpointFile().save_checkpoint(checkpoint, path)
            struct.pack_into("q", shared, 0, 0)
            number += 1

    CheckpointFile().save_checkpoint({"state_dict": {"0": torch.zeros(1)}}, path)
    done = 0
    while done < times:
        struct.pack_into("2q", shared, 0, 0, 0)
        pid = os.fork()
        if not pid:
            save_for_ever()
        while struct.unpack("2q", shared[:])[1] < 2:
            time.sleep(0.0005)
        began = time.monotonic()
        while struct.unpack("2q", shared[:])[1] < 3:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, time.monotonic() - began))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if not struct.unpack("2q", shared[:])[0]:
            continue  # between two saves
        done += 1
        values = {float(v) for t in torch.load(path, weights_only=True)["state_dict"].values() for v in t[[0, -1]]}
        loads += len(values) == 1
    leftover = [p.name for p in folder.iterdir() if p.name not in ("last.ckpt", ".last.ckpt.partial")]
    return {"case": "kill -9 during a save", "times": times, "as wanted": loads if not leftover else 0}


def full_disk(folder: Path, times: int) -> dict[str, Any]:
    """No file may grow beyond a limit (as a full disk), or the save is refused: loud, and the file before it loads."""
    good = 0
    for i in range(times):
        root = folder / f"full{i}"
        before = start(root, ["--trainer.max_epochs=1"])
        finish(before)
        size = (root / "last.ckpt").stat().st_size

        def limit(rank: int, size: int = size, root: Path = root, refuse: bool = bool(i % 2)) -> None:
            if refuse:
                (root / ".last.ckpt.partial").mkdir()
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

        run = start(root, ["--ckpt_path=last"], prepare=limit)
        named = any(f"{root / name}.ckpt" in run.output for name in ("last", "best") if run.wait() == [2])
        loads = torch.load(root / "last.ckpt", weights_only=True)["global_step"] == before.steps
        good += named and loads
    return {"case": "disk full, save refused", "times": times, "as wanted": good}


def not_finite(folder: Path, times: int) -> dict[str, Any]:
    """A loss that is no number on the second of two processes ends both, in that very step."""
    chance, good = random.Random(0), 0
    for i in range(times):
        step = chance.randrange(3, 12)

        def poison(rank: int, step: int = step) -> None:
            original = ViTClassifier.training_step

            def training_step(self: ViTClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
                loss = original(self, batch, batch_idx)
                return loss * float("nan") if rank == 1 and self.global_step == step else loss

            ViTClassifier.training_step = training_step  # type: ignore[method-assign]

        run = start(folder / f"nan{i}", [], ranks=2, prepare=poison)
        named = f"loss is not finite at step {step + 1} on process 1 of 2"
        stopped = run.wait() == [5, 5] and run.steps == step and run.output.count(named) == 2
        exported = (run.root / "model.safetensors").exists()
        weights = torch.load(run.root / "last.ckpt", weights_only=True)["state_dict"]
        good += stopped and not exported and all(bool(w.isfinite().all()) for w in weights.values())
    return {"case": "not a number on 1 of 2 processes", "times": times, "as wanted": good}


def alive(group: int) -> list[str]:
    """Processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] * (int(of_group) == group and state != "Z")
    return found


def lost_rank(folder: Path, times: int) -> dict[str, Any]:
    """One of two processes is killed, or raises: the other must end by itself, with an error and all workers."""
    args = [f"--data.dataset={folder / 'images'}", "--data.num_workers=2", "--data.batch_size=16"]
    good, longest = 0, 0.0
    for i in range(times):

        def lose(rank: int, raises: bool = bool(i % 2)) -> None:
            os.setpgrp()  # so that its workers can be told from others
            decode_always(rank)
            original = ViTClassifier.training_step

            def training_step(self: ViTClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
                if raises and rank == 1 and self.global_step == 6:
                    raise RuntimeError("lost")
                return original(self, batch, batch_idx)

            ViTClassifier.training_step = training_step  # type: ignore[method-assign]

        run = start(folder / f"lost{i}", args, ranks=2, prepare=lose)
        run.wait_for_step(5)
        began, workers = time.monotonic(), sum(len(alive(pid)) for pid in run.pids)
        if i % 2 == 0:
            os.kill(run.pids[1], signal.SIGKILL)
        status = run.wait(60)
        while any(alive(pid) for pid in run.pids) and time.monotonic() < began + 60:
            time.sleep(0.05)
        seconds = time.monotonic() - began
        longest = max(longest, seconds)
        good += workers >= 4 and None not in status and 0 not in status and seconds < 30
    return {"case": "1 of 2 processes lost", "times": times, "as wanted": good, "seconds": round(longest, 1)}


def stopped(folder: Path, times: int) -> dict[str, Any]:
    """SIGTERM and SIGINT: state saved, exit 143 and 130, and the same weights once it is started again."""
    wanted, good = {ranks: finish(start(folder / f"kept{ranks}", [], ranks=ranks)) for ranks in (1, 2)}, 0
    for i in range(times):
        signum, ranks = (signal.SIGTERM, signal.SIGINT)[i % 2], 1 + i // 2 % 2
        run = start(folder / f"stopped{i}", ["--guard.minutes=60"], ranks=ranks)
        run.wait_for_step(3 + i)
        os.kill(run.pids[0], signum)  # the other process hears of it from this one
        codes = run.wait()
        if codes == [128 + signum] * ranks:
            good += finish(start(run.root, ["--ckpt_path=last"], ranks=ranks)) == wanted[ranks]
    return {"case": "SIGTERM, SIGINT", "times": times, "as wanted": good}


def two_nodes(folder: Path) -> dict[str, Any]:
    """Two processes on two nodes (loopback) against two on one."""
    one, two = (finish(start(folder / f"nodes{n}", [], ranks=2, nodes=n)) for n in (1, 2))
    return {"case": "2 nodes x 1 process against 1 x 2", "times": 1, "as wanted": int(one == two)}


def torchrun(folder: Path) -> Iterator[dict[str, Any]]:
    """The same with torchrun itself: two agents for two nodes, and one that restarts a killed worker."""
    port = free_port()
    # Without it a restarted group finds the keys of the lost one in the agent's store and waits for ever (torch 2.14).
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def agent(root: Path, *options: str, args: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", *options, "train.py", "fit"]
        command += ["--config=configs/digits.yaml", *MODEL, "--data.batch_size=128", "--trainer.max_epochs=3"]
        command += [f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", "--guard.minutes=0"]
        command += ["--trainer.log_every_n_steps=1"]
        with open(f"{root}.log", "a") as log:
            return subprocess.Popen(
                [*command, "--ckpt_path=last", *args], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    wanted = finish(start(folder / "wanted", [], ranks=2))
    two = ("--trainer.devices=1", "--trainer.num_nodes=2")
    options = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}")
    agents = [agent(folder / "agents", *options, f"--node-rank={rank}", args=two) for rank in (0, 1)]
    good = [a.wait(900) for a in agents] == [0, 0] and digest(folder / "agents") == wanted
    yield {"case": "2 torchrun agents x 1 process against 1 x 2", "times": 1, "as wanted": int(good)}

    root = folder / "restarted"
    one = agent(root, "--standalone", "--nproc-per-node=2", "--max-restarts=2", args=("--trainer.devices=2",))
    while not (root / "last.ckpt").exists() and one.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    good = one.wait(900) == 0 and digest(root) == wanted
    orphans = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    yield {"case": "torchrun --max-restarts, worker killed", "times": 1, "as wanted": int(good and not orphans)}


def malicious() -> dict[str, Any]:
    """Checkpoints with code in them, each given to four commands: refused, and no code has run (a test of ours)."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_trust.py", "-k", "test_refused_in_one_line"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    passed = re.search(r"(\d+) passed", said)
    case = "5 malicious pickles x predict, validate, test, resume"
    return {"case": case, "times": 20, "as wanted": int(passed[1]) if passed else 0}


def cost(folder: Path, images_an_epoch: int = 45_000, batch: int = 1024, small: int = 16) -> dict[str, Any]:
    """What checks and saves add to an epoch of configs/cifar10.yaml, here on the CPU.

    Steps are measured on small batches and scaled to the config's, uncompiled and in float32, as not every processor
    has bfloat16; checks and saves depend on the model alone. An epoch counts one save of last.ckpt and one of
    best.ckpt, more than a run does: the guard spaces the first.
    """
    seconds: dict[str, list[float]] = {"step": [], "check": [], "save": []}

    def clock(kind: str, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[kind].append(time.perf_counter() - began)
            return result

        setattr(owner, name, timed)

    def measure(rank: int) -> None:
        clock("step", ViTClassifier, "optimizer_step")  # forward and backward within
        clock("check", vit.guard.Guard, "on_before_backward")
        clock("check", vit.guard.Guard, "on_before_optimizer_step")
        clock("save", CheckpointFile, "save_checkpoint")

        def on_fit_end(self: ViTClassifier) -> None:
            (folder / "seconds").write_text(json.dumps(seconds))

        ViTClassifier.on_fit_end = on_fit_end  # type: ignore[method-assign]

    args = ["--model.resolution=[]", "--model.compile=false", f"--data.batch_size={small}"]
    args += [f"--data.dataset={folder / 'images'}", "--data.image_size=32", "--trainer.precision=32-true"]
    args += ["--trainer.max_epochs=2", "--trainer.limit_train_batches=5"]
    run = start(folder / "cost", args, prepare=measure, base=[f"--config={ROOT / 'configs/cifar10.yaml'}"])
    if any(run.wait()):
        raise RuntimeError(run.output)
    seconds = json.loads((folder / "seconds").read_text())
    steps = len(seconds["step"])
    check, save = sum(seconds["check"]) / steps, statistics.median(seconds["save"])
    step = (statistics.median(seconds["step"]) - check) * batch / small
    epoch = images_an_epoch // batch * step
    share = (images_an_epoch // batch * check + 2 * save) / epoch
    return {
        "case": "checks and saves of an epoch of configs/cifar10.yaml",
        "check, ms a step": round(1000 * check, 1),
        "save, s": round(save, 2),
        "epoch, s": round(epoch),
        "share of the epoch": round(share, 5),
        "times": 1,
        "as wanted": int(share <= 0.02),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each of the first two kinds")
    parser.add_argument("--other-kills", type=int, default=10, help="kills of each other kind")
    parser.add_argument("--saves", type=int, default=50, help="kills during a save")
    parser.add_argument("--times", type=int, default=4, help="repetitions of the other cases")
    parser.add_argument("--short", action="store_true", help="what tests repeat, as JSON lines and not in a file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # or Lightning shares the cores out by node, and other threads round otherwise
    torch.set_num_threads(1)

    def rows(folder: Path) -> Iterator[dict[str, Any]]:
        images(folder / "images")
        for i, kind in enumerate(KINDS):
            if times := options.kills if i < 2 else options.other_kills:
                yield kills(folder, kind, times)
        (folder / "saves").mkdir()
        yield kills_while_saving(folder / "saves", options.saves)
        for case in (full_disk, not_finite, lost_rank, stopped):
            yield case(folder, options.times)
        yield two_nodes(folder)
        if not options.short:
            yield from torchrun(folder)
            yield malicious()
            yield cost(folder)

    done = []
    with tempfile.TemporaryDirectory() as folder:
        # Where a library stages a file elsewhere, elsewhere is another file system.
        os.environ["TMPDIR"] = tempfile.tempdir = "/dev/shm" if Path("/dev/shm").is_dir() else folder
        for row in rows(Path(folder)):
            done.append(row)
            text = json.dumps(row) if options.short else "  ".join(f"{key}: {value}" for key, value in row.items())
            print(text, flush=True)
    if not options.short:
        record("kill_resume", done)
    return int(any(row["times"] != row["as wanted"] for row in done))


if __name__ == "__main__":
    sys.exit(main())
