"""Train, validate or test a vision transformer: ``python train.py fit --config configs/digits.yaml``."""

import csv
import fcntl
import logging
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from difflib import get_close_matches
from inspect import signature
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from data.datamodule import ImageDataModule
from vit.checkpoint import load_checkpoint
from vit.classifier import MOST_TABLED, ViTClassifier
from vit.config import check_config
from vit.guard import Diverged, Guard
from vit.history import History
from vit.memory import keep_freed_memory
from vit.model import VisionTransformer
from vit.predictor import has_bfloat16
from vit.progress import TrainingProgress, class_table
from vit.saving import Best, CheckpointFile, keeper_of

DESCRIPTION = (
    "Train a vision transformer on images. The project's own settings are --model.* and --data.*; --trainer.* are "
    "Lightning's. predict.py classifies."
)
COMMANDS = {
    "fit": "train, or go on where a run was stopped (--ckpt_path last)",
    "validate": "measure a checkpoint on the validation images",
    "test": "measure a checkpoint on the test images, class by class",
}
MEASURED = {  # what can be monitored, and which way it is better
    **dict.fromkeys(("train/loss", "val/loss", "val/ece"), "min"),
    **dict.fromkeys(("val/acc", "val/balanced_acc", "val/acc5"), "max"),
}
REFUSED = {  # callbacks of Lightning, and why
    "StochasticWeightAveraging": "averages behind the last save; EMAWeightAveraging is kept in checkpoints",
    "LearningRateFinder": "trains by a schedule of its own, which ours does not leave room for; try values of model.lr",
}
RESULTS = ("last.ckpt", "best.ckpt", "model.safetensors")  # of a run, in its folder
MEASUREMENTS = ("test", "validate")  # folders in it for what these commands find
KEEPER = {"save_top_k": 1, "filename": "best"} | dict.fromkeys(  # what else would not keep the best alone
    ("every_n_train_steps", "train_time_interval", "save_on_train_epoch_end", "save_on_exception", "save_last")
)
UNUSABLE = (ValueError, OSError, MisconfigurationException)  # a setting or a file
ARCHITECTURE = set(signature(VisionTransformer).parameters)
FACTS = ("class_names", "mean", "std", "image_size", "white")  # flow from the data to the model


class Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line, with the option that was perhaps meant; the usual way is to print all options first."""
        message = re.sub(r"(?<=required: )(fit|validate|test)\.", "--config FILE or --", message)
        union = r'Parser key "([\w.]+)":\s+Does not validate against any of the Union subtypes(.*)Given value: (.*)'
        if mistaken := re.search(union, message, re.S):  # whose text names types of Python, not what to write
            name, types, value = mistaken.groups()
            choices = sorted(set(re.findall(r"'([\w-]+)'", "".join(re.findall(r"Literal\[(.*?)\]", types)))))
            forms = {"data.image_size": "224, or [224, 320] for height and width"}.get(name, ", ".join(choices))
            message = f"{name} cannot be {value.strip()}" + (f"; give {forms}" if forms else "")
        if wrong := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message):
            parser = getattr(ex, "subcommand_parser", self)
            known = [name.lstrip("-") for action in parser._actions for name in action.option_strings]
            dashes = "--" if "arguments: --" in wrong[0] else ""
            message += "".join(f"; did you mean {dashes}{name}?" for name in get_close_matches(wrong[1], known, n=1))
        raise ValueError(message) from ex


def several(value: Any) -> list[Any]:
    """What Lightning takes as none, one or a list, as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


class TrainCLI(LightningCLI):
    """LightningCLI with what every run of this project has: facts linked, files in one folder, our progress bar."""

    going_on: str | Path | None = None  # the checkpoint of a fit that goes on
    aside: Path | None = None  # where the run is that was in the folder before this one
    first_step = 0  # optimiser steps that were done before this process

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without ``predict``: that is what predict.py is for."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for action in cast(Any, parser)._subcommands_action._choices_actions:
            action.help = COMMANDS[action.dest]  # Lightning's end in the middle of a sentence

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for fact in FACTS:
            parser.link_arguments(f"data.{fact}", f"model.{fact}", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.compile", "data.compile")
        parser.add_lightning_class_args(Best, "checkpoint")  # the best; before the guard saves its state
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")
        parser.add_lightning_class_args(Guard, "guard")
        # --help is for people: one line instead of every option's name, and model and data before Lightning's trainer.
        parser.usage = "%(prog)s --config FILE [--model.NAME VALUE] [--data.NAME VALUE] [--trainer.NAME VALUE] ..."
        groups, names = cast(Any, parser._action_groups), cast(Any, parser.groups)
        groups.sort(key=lambda group: group in (names["trainer"], names["checkpoint"]))
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "trainer.use_distributed_sampler": False,  # the data module shards: without padding, and resumable
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,  # TrainingProgress says it in two lines
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/acc",
                "checkpoint.mode": "max",
                "checkpoint.enable_version_counter": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Of a pretrained model's architecture keep what was asked for, and no default that it may contradict."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")  # none where the parts alone are wanted: run=False
        settings = self.config[subcommand] if subcommand else self.config
        config, trainer = settings["model"], settings["trainer"]
        trainer["default_root_dir"] = os.path.expanduser(trainer["default_root_dir"] or ".")
        if config["pretrained"]:
            leave_out(ARCHITECTURE - mentioned(sys.argv[1:] if args is None else args), config)

    def instantiate_classes(self) -> None:
        """Build everything; a run that goes on needs what it once started from no more: all is in its checkpoint."""
        model = self.config.get(str(self.subcommand), self.config)["model"]
        start = model["pretrained"]
        if start and self.going_on:
            model["pretrained"] = str(self.going_on)
        super().instantiate_classes()
        if self.subcommand == "fit":
            model["pretrained"] = self.model.pretrained = self.model.hparams["pretrained"] = start

    def _parse_ckpt_path(self) -> None:
        """Refuse an unusable checkpoint before anything is built; ``best`` is the run's, also in a later process.

        For a measurement Lightning then takes the model's arguments from the file.
        """
        config = self.config[subcommand := self.config["subcommand"]]
        root, path = Path(config["trainer"]["default_root_dir"]), config.get("ckpt_path")
        if path == "best" or (path == "last" and subcommand != "fit"):
            path = config["ckpt_path"] = str(root / f"{path}.ckpt")
        elif path == "last" and (root / "last.ckpt").exists():
            path = root / "last.ckpt"
        if path is None and subcommand != "fit" and config["model"]["pretrained"] is None:
            raise ValueError(f"{subcommand} needs trained weights: --ckpt_path best (or last, or FILE.ckpt)")
        if path not in (None, "last"):
            if Path(path).suffix != ".ckpt":
                raise ValueError(f"{path}: ckpt_path takes a .ckpt file of a run, best or last")
            load_checkpoint(path)
            self.going_on = path if subcommand == "fit" else None
        if subcommand != "fit":  # which has today's settings: those of the command
            if path is not None:
                leave_out(ARCHITECTURE, config["model"])  # older files lack some, whose defaults then hold
            super()._parse_ckpt_path()
            config = self.config[subcommand]
            if path is not None and config["model"]["pretrained"]:  # that may be gone; all is in the checkpoint
                config["model"]["pretrained"] = str(path)
                leave_out(ARCHITECTURE, config["model"])

    def _run_subcommand(self, subcommand: str) -> None:
        root = Path(self.trainer.default_root_dir)
        if self._writes(subcommand):
            refuse_foreign(root)
        with locked(root) if self._writes(subcommand) else nullcontext():
            try:
                super()._run_subcommand(subcommand)
            except UNUSABLE:
                if self.aside and self.trainer.global_step <= self.first_step:  # what was refused has not begun
                    put_back(root, self.aside)
                raise

    def _writes(self, subcommand: str) -> bool:
        """Whether this process is the one that puts a new state into the run's folder."""
        return subcommand == "fit" and self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False)

    def before_validate(self) -> None:
        """Refuse to measure what chance has made; measure pretrained weights as predict.py would use them."""
        if self._get(self.config, "ckpt_path") is not None:
            return
        if any(note.startswith("head replaced") for note in self.model.adapted):
            raise ValueError(f"{self.subcommand} needs trained weights: {self.model.pretrained} knows other classes")
        self.datamodule.preprocess = self.model.measure_pretrained()

    before_test = before_validate

    def before_fit(self) -> None:
        """One run in a folder: an earlier one is put aside, one that has ended is not started again by a loop."""
        root, path = Path(self.trainer.default_root_dir), self._get(self.config, "ckpt_path")
        last, exported = root / "last.ckpt", root / "model.safetensors"
        data, keeper = self.datamodule, keeper_of(self.trainer)
        averaged = any(isinstance(callback, WeightAveraging) for callback in cast(Any, self.trainer).callbacks)
        if averaged and keeper and keeper.save_weights_only:
            raise ValueError("checkpoint.save_weights_only would keep the weights that are not averaged; leave it out")
        validated = self.trainer.limit_val_batches != 0 and (data.source.val is not None or data.val_fraction)
        for callback in cast(Any, self.trainer).callbacks:
            name, monitor = type(callback).__name__, getattr(callback, "monitor", None) or ""
            if monitor == "val/acc5" and (classes := len(self.model.class_names)) <= 5:
                raise ValueError(f"{name}: monitor val/acc5 is not measured of {classes} classes; give val/acc")
            if monitor.startswith("val/") and not validated and callback is not keeper:
                raise ValueError(f"{name}: monitor {monitor} is not measured: there is no validation")
        if path is None or (path == "last" and not last.exists()):
            start, results = self.model.pretrained, [(root / name).resolve() for name in RESULTS]
            if start and Path(start).resolve() in results:
                raise ValueError(
                    f"{start}: a new run in {root} moves it to {root / 'previous'}, and could not be gone on with; "
                    "take another --trainer.default_root_dir"
                )
            if self._writes("fit"):
                self.datamodule.setup("fit")  # refuses what cannot be trained on while the earlier run is in its place
                self.aside = put_aside(root)
            return
        file = last if path == "last" else Path(path)
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        if "optimizer_states" not in state:
            raise ValueError(f"{file}: holds weights alone; start a new run from them with --model.pretrained {file}")
        self.first_step = state["global_step"]
        anew = f"a new run from its weights: --model.pretrained {file}"
        try:
            self.model.refuse_other(state["vit"])  # before this run's config.yaml takes the place of the other's
        except ValueError as error:
            raise ValueError(f"{file}: {error}; {anew}") from None
        for name in ("optimizer", "layer_decay", "freeze"):
            before, now = state["hyper_parameters"].get(name), self.model.hparams[name]
            if before != now:
                raise ValueError(f"{file}: trained with model.{name} {before}, which cannot become {now}; {anew}")
        chosen = [
            m[1]
            for key in state["callbacks"]
            if (m := re.match(r"(?:Best|ModelCheckpoint){'monitor': '?([\w/]+)", key))
        ]
        if keeper and chosen and str(keeper.monitor) not in chosen:  # Lightning would forget the best
            words = f"checkpoint.monitor {chosen[-1]}, which cannot become {keeper.monitor}"
            raise ValueError(f"{file}: trained with {words}; {anew}")
        limits = [self.trainer.max_epochs, self.trainer.max_steps]
        epochs = state["epoch"] + state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
        finished = path == "last" and state["callbacks"]["Guard"]["done"] == limits
        if finished and exported.exists() and exported.stat().st_mtime >= last.stat().st_mtime:
            words = f"this run is finished, {state['global_step']:,} steps; nothing was changed"
            print(f"{root}: {words}. Longer: --trainer.max_epochs", file=sys.stderr)
            sys.exit(0)
        for what, limit, done in (("epochs", limits[0], epochs), ("steps", limits[1], self.first_step)):
            if limit not in (None, -1) and limit <= done and not finished:
                raise ValueError(
                    f"{file}: nothing is left to train, {done} of {limit} {what} are done. Longer: "
                    f"--trainer.max_{what}; {anew}"
                )
        if file.parent.resolve() != root.resolve() and self._writes("fit"):  # another folder's run goes on here
            self.aside = put_aside(root)
            if (best := file.parent / "best.ckpt").is_file():
                shutil.copyfile(best, root / "best.ckpt")

    def after_test(self) -> None:
        """How well each class is told: a table, and the whole matrix in a file."""
        confusion, names = self.model.confusion, self.model.class_names
        if not self.trainer.is_global_zero:
            return
        if confusion is None:
            print(
                f"no table of the classes, and no confusion.csv: {len(names):,} classes are more than {MOST_TABLED:,}"
            )
            return
        Console().print(class_table(confusion, names))
        path = Path(self.trainer.default_root_dir, "test", "confusion.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(["of the class", *(f"named {name}" for name in names)])
            rows.writerows([name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True))
        print(f"all of them, what was taken for what: {path}")

    def before_instantiate_classes(self) -> None:
        """Refuse what Lightning takes and our runs cannot do."""
        config = self._get(self.config, "trainer")
        for name in ("check_val_every_n_epoch", "val_check_interval", "accumulate_grad_batches", "limit_train_batches"):
            if config[name] == 0:
                raise ValueError(f"trainer.{name} must be above 0")
        for part, of in {"model": (ViTClassifier, VisionTransformer), "data": (ImageDataModule,)}.items():
            given = self._get(self.config, part)
            for name, setting in chain.from_iterable(signature(each).parameters.items() for each in of):
                if name not in FACTS and setting.default is not None and given.get(name, setting) is None:
                    raise ValueError(f"{part}.{name} cannot be null; leave it out for its default")
        if config["max_steps"] is None:
            raise ValueError("trainer.max_steps cannot be null; -1 is no limit")
        if config["max_epochs"] == 0 or config["max_steps"] == 0:
            raise ValueError("trainer.max_epochs and max_steps must be above 0; `validate` and `test` measure")
        if config["overfit_batches"]:
            raise ValueError("trainer.overfit_batches is not supported; try --trainer.limit_train_batches")
        if str(precision := config["precision"]) in ("16-true", "bf16-true", "64", "64-true"):
            raise ValueError(
                f"trainer.precision {precision}: the weights stay in float32; bf16-mixed or 16-mixed computes in less"
            )
        balance, monitor = self._get(self.config, "data.balance"), self._get(self.config, "checkpoint.monitor")
        if balance and monitor == "val/acc":  # which the small classes hardly move
            self.config[str(self.subcommand)]["checkpoint"]["monitor"] = "val/balanced_acc"
        if self.subcommand == "fit":
            for name, value in KEEPER.items():
                if (given := self._get(self.config, f"checkpoint.{name}") or None) != value:
                    raise ValueError(
                        f"checkpoint.{name} {given}: leave it out, there is one best.ckpt, of the best validation "
                        "(a ModelCheckpoint in trainer.callbacks keeps others beside it)"
                    )
            check_monitor("checkpoint", self._get(self.config, "checkpoint"))
            for callback in several(config["callbacks"]):
                name = callback["class_path"].rpartition(".")[2]
                if name in REFUSED:
                    raise ValueError(f"{name} {REFUSED[name]}")
                check_monitor(name, callback.get("init_args") or {})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._get(self.config, "trainer")
        given = self._get(self.config_init, "trainer")
        device = torch.device("cuda" if torch.cuda.is_available() and config["accelerator"] != "cpu" else "cpu")
        if config["accelerator"] == "auto":
            kwargs["accelerator"] = device.type  # not a Mac's mps, which was never tried here and lacks float64
        if config["precision"] == "bf16-mixed" and not has_bfloat16(device):
            kwargs["precision"] = "32-true"
            if rank_zero_only.rank == 0:
                print(f"training in float32: this {device.type} has no fast bfloat16", file=sys.stderr)
        kwargs["plugins"] = [*several(given["plugins"]), CheckpointFile()]
        if config["logger"] is None:
            root, part = config["default_root_dir"], "" if self.subcommand == "fit" else str(self.subcommand)
            kwargs["logger"] = [History(Path(root, part)), TensorBoardLogger(root, name="", version=part)]
        if config["enable_progress_bar"] is not False:
            kwargs["callbacks"] = [*several(given["callbacks"]), TrainingProgress()]
        return super().instantiate_trainer(**kwargs)


def mentioned(args: Any) -> set[str]:
    """Names of the model's settings that the command or its files mention; parsing makes them one with the defaults."""
    words = [str(word) for word in args] if isinstance(args, list | tuple) else []
    files = (yaml.safe_load(Path(path).read_text()) for path in configs(args))
    return {word[8:].partition("=")[0] for word in words if word.startswith("--model.")}.union(
        *(file.get("model") or () for file in files if file)
    )


def leave_out(names: Iterable[str], config: Any) -> None:
    """Take keys out of a configuration."""
    for name in names:
        config.pop(name, None)


def check_monitor(name: str, options: Any) -> None:
    """Refuse to wait for a number that never comes, or to take the worst for the best.

    Args:
        name: Of the callback, for the message.
        options: Its arguments.
    """
    monitor, mode = options.get("monitor"), options.get("mode")
    if monitor is None:
        return
    if monitor not in MEASURED:
        raise ValueError(f"{name}: monitor {monitor} is not measured; give one of {', '.join(MEASURED)}")
    if mode not in (None, MEASURED[monitor]):
        raise ValueError(f"{name}: mode {mode} takes the worst {monitor} for the best; give mode {MEASURED[monitor]}")


def refuse_foreign(root: Path) -> None:
    """Refuse a folder with a ``config.yaml`` that no run has left there: ours would take its place."""
    file, signs = root / "config.yaml", (".lock", *RESULTS, "metrics.csv", "hparams.yaml")
    if file.exists() and not any((root / name).exists() for name in signs):
        raise ValueError(f"{file}: of no run, and would be overwritten; take another --trainer.default_root_dir")


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the run folder; this process alone does, not its workers, so a run that was killed leaves it free.

    Raises:
        ValueError: If another run trains there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"trainer.default_root_dir {root}: cannot be made ({error.strerror})") from None
    with open(root / ".lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{root}: another run trains here; take another --trainer.default_root_dir") from None
        except OSError:
            pass  # a file system without locks
        yield


def put_aside(root: Path) -> Path | None:
    """Move the run that is in this folder to ``previous``, so that nothing of it can be taken for the new one's.

    If there is such a folder already, to ``previous-2`` and so on: no run is lost.

    Returns:
        Where it is now; none if there was none.
    """
    if not any((root / name).exists() for name in RESULTS):
        return None
    places = (root / name for name in chain(["previous"], (f"previous-{number}" for number in count(2))))
    aside = next(place for place in places if not place.exists())
    aside.mkdir()
    move_run(root, aside)
    words = f"the run that was here is in {aside}; --ckpt_path last would have gone on with it"
    print(f"{root}: {words}", file=sys.stderr)
    return aside


def put_back(root: Path, aside: Path) -> None:
    """Undo ``put_aside``, for a run that has not begun."""
    for path in parts_of_run(root):
        path.unlink()
    move_run(aside, root)
    aside.rmdir()
    print(f"{root}: the run that was here is back", file=sys.stderr)


def move_run(root: Path, place: Path) -> None:
    """Move what a run leaves in its folder, and nothing else that may be there."""
    for path in parts_of_run(root):
        to = place / path.relative_to(root)
        to.parent.mkdir(exist_ok=True)
        path.rename(to)
    for name in MEASUREMENTS:
        with suppress(OSError):  # not there, or not empty
            (root / name).rmdir()


def parts_of_run(root: Path) -> list[Path]:
    """The files that a run leaves in its folder."""
    found = [root / name for name in RESULTS]
    for folder in (root, *(root / name for name in MEASUREMENTS)):
        found += [folder / name for name in ("config.yaml", "metrics.csv", "hparams.yaml", "confusion.csv")]
        found += folder.glob("events.out.tfevents.*")
    return [path for path in found if path.is_file()]


def configs(args: Any) -> list[str]:
    """The files that follow ``--config``."""
    words = [str(word) for word in args] if isinstance(args, list | tuple) else []
    apart = [path for option, path in pairwise(words) if option in ("--config", "-c")]
    return apart + [word.partition("=")[2] for word in words if word.startswith("--config=")]


def main(args: ArgsType = None) -> int:
    """Run the command line.

    Args:
        args: The arguments; none takes the program's own.

    Returns:
        0 if all went well, 2 if the arguments, the data or the disk are not usable, 5 if training diverged; a signal
        that ended the run leaves as SystemExit with 128 + its number.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # a checkpoint is data: it must not run code
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    set_parsing_settings(  # and so is a config, and the arguments in a checkpoint
        instantiate_subclass_spec_in_any=False, import_path_denylist=["*"], import_path_allowlist=["lightning", "vit"]
    )
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hints and advertisements
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what --trainer.profiler asks for
    for text in (
        ".*args parameter is intended to run from within Python.*",  # which is how our tests run it
        ".*does not have many workers.*",  # small sets are in memory and need none
        ".*Experiment logs directory.*exists and is not empty.*",  # a run may be started again
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*number of training batches.*is smaller than the logging interval.*",
        ".*LeafSpec.*is deprecated.*",  # Lightning's own affair
        ".*resuming from a checkpoint that ended before the epoch ended.*",  # TrainOrder goes on where it stopped
        ".*The dirpath has changed.*",  # a checkpoint of another folder
        ".*need to be provided during .Trainer.*(Best|ModelCheckpoint|Timer).*",  # other settings now
        ".*Total length of `list` across ranks is zero.*",  # data.val_fraction 0: nothing to validate on
        ".*could not find the monitored key.*",  # nothing was validated; the end of the run says so
        ".*WeightAveraging callback with a model that overrides the configure_model.*",  # which shards only for FSDP
        ".*ckpt_path=.last..* is set, but there is no last checkpoint.*",  # a first run
    ):
        warnings.filterwarnings("ignore", text)
    try:
        for path in configs(sys.argv[1:] if args is None else args):
            check_config(path)
        TrainCLI(
            ViTClassifier,
            ImageDataModule,
            args=args,
            parser_class=Parser,
            parser_kwargs={"description": DESCRIPTION, "allow_abbrev": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
        )
    except UNUSABLE as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"train.py: {' '.join(str(error).split())}; try half the --data.batch_size", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"train.py: diverged: {error}; try a lower learning rate", file=sys.stderr)
        return 5
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning makes the one the other
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            return 128 + signal.SIGINT  # before training began; after that the guard sees to it
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
