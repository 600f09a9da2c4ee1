"""The command line of training: LightningCLI with what every run of this project has."""

import csv
import os
import re
import shutil
import sys
from argparse import SUPPRESS
from collections.abc import Iterable
from contextlib import nullcontext
from enum import Enum
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar, WeightAveraging
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from vit.checkpoint import load_checkpoint
from vit.classifier import MOST_TABLED
from vit.config import configs_first, mentioned, refuse_derived
from vit.device import has_bfloat16
from vit.folder import RESULTS, check_writable, locked, of_another, put_aside, put_back, refuse_foreign
from vit.guard import Guard
from vit.history import History
from vit.model import VisionTransformer
from vit.pretrained import load_pretrained
from vit.progress import TrainingProgress, class_table, measured
from vit.saving import Best, CheckpointFile, keeper_of

COMMANDS = {
    "fit": "train, or go on where a run was stopped (--ckpt_path last)",
    "validate": "measure a checkpoint on the validation images, class by class",
    "test": "measure a checkpoint on the test images, class by class",
}
MEASURED = {  # what can be monitored, and which way it is better
    **dict.fromkeys(("val/loss", "val/ece"), "min"),
    **dict.fromkeys(("val/acc", "val/balanced_acc", "val/acc5"), "max"),
}
TITLES = {  # of --help
    "vit": "Its architecture; with --model.pretrained that of those weights, where nothing else is asked for",
    "trainer": "Lightning's trainer",
}
HELP = {  # where a library's own words do not fit
    "config": "YAML file of settings; a later one is laid over those before it, options over all.",
    "seed_everything": "What all that is drawn depends on: with the same number a run is the same.",
    "ckpt_path": (
        "``last`` or ``best`` of the folder --trainer.default_root_dir, or a .ckpt file: what is measured, or with "
        "``fit`` gone on with; ``last`` begins where there is none."
    ),
    "checkpoint.monitor": f"What chooses the best: {', '.join(MEASURED)}; null keeps the last.",
    "checkpoint.mode": "Which way it is better: min for a loss and for ece.",
}
HIDDEN = re.compile(
    r"checkpoint\.(?!monitor|mode)\w+|weights_only|"
    r"trainer\.(overfit_batches|limit_predict_batches|model_registry|use_distributed_sampler)"
)
REFUSED = {  # callbacks of Lightning, and why
    "StochasticWeightAveraging": "averages behind the last save; EMAWeightAveraging is kept in checkpoints",
    "OnExceptionCheckpoint": "leaves a file that Lightning would start the next run from; last.ckpt is kept anyway",
    "GradientAccumulationScheduler": "changes the steps of an epoch, which order and learning rate go by",
    "BatchSizeFinder": "changes the steps of an epoch behind the learning rate; try values of data.batch_size",
    "BackboneFinetuning": "wants a model of two parts; model.layer_decay trains what is near the head faster",
    "LearningRateFinder": "trains by a schedule of its own, which ours does not leave room for; try values of model.lr",
}
KEEPER = {"save_top_k": 1, "filename": "best"} | dict.fromkeys(  # what else would not keep the best alone
    ("every_n_train_steps", "train_time_interval", "save_on_train_epoch_end", "save_on_exception", "save_last")
)
UNUSABLE = (ValueError, OSError, MisconfigurationException)  # a setting or a file
ARCHITECTURE = set(signature(VisionTransformer).parameters)
FACTS = ("class_names", "mean", "std", "image_size", "white")  # flow from the data to the model


def several(value: Any) -> list[Any]:
    """What Lightning takes as none, one or a list, as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def place(root: str | None) -> str:
    """The folder of a run; as Lightning has it, the present one if none is named."""
    return os.path.expanduser(root or ".")


class TrainCLI(LightningCLI):
    """LightningCLI with what every run of this project has: facts linked, files in one folder, our progress bar."""

    at_its_size = False  # whether images are brought to the size of the pretrained model, and not to their own
    going_on: str | Path | None = None  # the checkpoint of a fit that goes on
    aside: Path | None = None  # where the run is that was in the folder before this one
    first_step = 0  # optimiser steps that were done before this process

    def __init__(self, *args: Any, **kwargs: Any):
        words = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        self.command = words[0] if isinstance(words, list) and words and words[0] in COMMANDS else None
        kwargs["args"] = configs_first(words) if self.command else words
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Those of COMMANDS; where one is asked for, that one alone: the options of each take a while to be made.

        Not Lightning's ``predict``: that is what predict.py is for.
        """
        names = [self.command] if self.command else COMMANDS
        ours = {"verbose"}  # Lightning's table has sixteen digits: see ``after_test``
        theirs = LightningCLI.subcommands().items()
        return {name: skip if name == "fit" else skip | ours for name, skip in theirs if name in names}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for action in cast(Any, parser)._subcommands_action._choices_actions:
            action.help = COMMANDS[action.dest]  # Lightning's end in the middle of a sentence
        for name, part in cast(Any, self._subcommand_parsers).items():  # and its --help is that of a library
            part.description = COMMANDS[name][0].upper() + COMMANDS[name][1:] + "."
            for title, group in part.groups.items():
                group.title = TITLES.get("vit" if title.startswith("vit.") else title, group.title)
            part.groups[name].title = "Weights"
            part._action_groups = [group for group in part._action_groups if group.title != "Linked arguments"]
            for action in part._actions:
                hidden = HIDDEN.fullmatch(action.dest)  # refused, or of no use here
                action.help = SUPPRESS if hidden else HELP.get(action.dest, action.help)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for fact in FACTS:
            parser.link_arguments(f"data.{fact}", f"model.{fact}", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.compile", "data.compile")
        parser.add_lightning_class_args(Best, "checkpoint")  # the best; before the guard saves its state
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=place)
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
        refuse_derived(args)
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")  # none where the parts alone are wanted: run=False
        settings = self.config[subcommand] if subcommand else self.config
        config, trainer = settings["model"], settings["trainer"]
        if isinstance(settings["seed_everything"], bool):
            raise ValueError("seed_everything takes a number: all that is drawn depends on it")
        trainer["default_root_dir"] = place(trainer["default_root_dir"])
        if config["pretrained"]:
            leave_out(ARCHITECTURE - mentioned(args, "model"), config)
            alone = subcommand in ("validate", "test") and settings.get("ckpt_path") is None
            cut = settings["data"]["dataset"] not in ("digits", "cifar10", "cifar100")  # which have one size
            self.at_its_size = alone and cut and "image_size" not in mentioned(args, "data")
        if settings["data"]["balance"] and "monitor" not in mentioned(args, "checkpoint"):
            settings["checkpoint"]["monitor"] = "val/balanced_acc"  # val/acc is hardly moved by small classes

    def instantiate_classes(self) -> None:
        """Build everything; a run that goes on needs what it once started from no more: all is in its checkpoint."""
        model = self.config.get(str(self.subcommand), self.config)["model"]
        start = model["pretrained"]
        if start and self.going_on:
            model["pretrained"] = str(self.going_on)
        try:
            super().instantiate_classes()
        except ValueError as error:  # of a page
            if lacks := re.search(r"class_path '[\w.]*?(\w+)':\s+Requirement '(.*?)' not met", str(error)):
                raise ValueError(f"{lacks[1]} needs what is not installed: pip install '{lacks[2]}'") from error
            raise
        if self.subcommand == "fit":
            model["pretrained"] = self.model.pretrained = self.model.hparams["pretrained"] = start

    def _parse_ckpt_path(self) -> None:
        """Refuse an unusable checkpoint before anything is built; ``best`` is the run's, also in a later process.

        For a measurement Lightning then takes the model's arguments from the file.
        """
        if (subcommand := self.config.get("subcommand")) is None:
            return  # the parts alone are wanted: run=False
        config = self.config[subcommand]
        root, path = Path(config["trainer"]["default_root_dir"]), config.get("ckpt_path")
        if path == "best" or (path == "last" and subcommand != "fit"):
            path = config["ckpt_path"] = str(root / f"{path}.ckpt")
        elif path == "last" and (root / "last.ckpt").exists():
            path = root / "last.ckpt"
        if path is None and subcommand != "fit" and config["model"]["pretrained"] is None:
            ways = "--ckpt_path best (or last, or FILE.ckpt), or --model.pretrained FILE"
            raise ValueError(f"{subcommand} needs trained weights: {ways}")
        if path not in (None, "last"):
            if Path(path).suffix != ".ckpt":
                way = f"; weights alone go to --model.pretrained {path}" if str(path).endswith(".safetensors") else ""
                raise ValueError(f"{path}: ckpt_path takes a .ckpt file of a run, best or last{way}")
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
        if subcommand != "fit" and self._get(self.config, "trainer.logger") is not False:
            check_writable(root / subcommand)  # TensorBoard's thread would say so in forty lines
        if self._writes(subcommand):
            refuse_foreign(root)
        with locked(root) if self._writes(subcommand) else nullcontext():
            try:
                super()._run_subcommand(subcommand)
            except UNUSABLE:
                if self.aside and self.trainer.global_step <= self.first_step:  # what was refused has not begun
                    put_back(root, self.aside)
                raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """What goes on is our choice: Lightning would take ``last`` for the latest file of any ModelCheckpoint."""
        given = super()._prepare_subcommand_kwargs(subcommand)
        return {**given, "ckpt_path": self.going_on} if subcommand == "fit" else {**given, "verbose": False}

    def _writes(self, subcommand: str) -> bool:
        """Whether this process is the one that puts a new state into the run's folder."""
        return subcommand == "fit" and self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False)

    def before_validate(self) -> None:
        """Refuse to measure what chance has made; measure pretrained weights as predict.py would use them."""
        if self._get(self.config, "ckpt_path") is not None:
            return
        if any(note.startswith("head replaced") for note in self.model.adapted):
            theirs, ours = load_pretrained(self.model.pretrained)[1].class_names, self.model.class_names
            odd = min(set(theirs) ^ set(ours), default="the order")
            raise ValueError(
                f"{self.model.pretrained} knows {len(theirs):,} classes, here are {len(ours):,}; {odd} differs, and "
                "they have to be the same"
            )
        self.datamodule.preprocess = self.model.measure_pretrained()

    before_test = before_validate

    def before_fit(self) -> None:
        """One run in a folder: an earlier one is put aside, one that has ended is not started again by a loop."""
        self._check_callbacks()
        root = Path(self.trainer.default_root_dir)
        if self.going_on is None:
            self._begin(root)
        else:
            self._go_on(root, Path(self.going_on))

    def _check_callbacks(self) -> None:
        """Refuse what waits for a number that this data set does not give, or keeps other weights than it should."""
        callbacks, keeper = cast(Any, self.trainer).callbacks, keeper_of(self.trainer)
        averaged = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if averaged and keeper and keeper.save_weights_only:
            raise ValueError("checkpoint.save_weights_only would keep the weights that are not averaged; leave it out")
        data = self.datamodule
        validated = self.trainer.limit_val_batches != 0 and (data.source.val is not None or data.val_fraction)
        for callback in callbacks:
            name, monitor = type(callback).__name__, getattr(callback, "monitor", None) or ""
            if monitor == "val/acc5" and (classes := len(self.model.class_names)) <= 5:
                raise ValueError(f"{name}: monitor val/acc5 is not measured of {classes} classes; give val/acc")
            if monitor.startswith("val/") and not validated and callback is not keeper:
                raise ValueError(f"{name}: monitor {monitor} is not measured: there is no validation")
            every, at_end = self.trainer.check_val_every_n_epoch, getattr(callback, "_check_on_train_epoch_end", None)
            if monitor.startswith("val/") and at_end and every != 1:
                raise ValueError(
                    f"{name}: check_on_train_epoch_end looks for {monitor} after each epoch, and with "
                    f"trainer.check_val_every_n_epoch {every} not each is validated; leave it out"
                )

    def _begin(self, root: Path) -> None:
        """Put an earlier run aside, unless the new one starts from its weights."""
        start, results = self.model.pretrained, [(root / name).resolve() for name in RESULTS]
        if start and Path(start).resolve() in results:
            raise ValueError(
                f"{start}: a new run in {root} moves it to {root / 'previous'}, and could not be gone on with; "
                "take another --trainer.default_root_dir"
            )
        if self._writes("fit"):
            self.datamodule.setup("fit")  # refuses what cannot be trained on while the earlier run is in its place
            self.aside = put_aside(root)

    def _go_on(self, root: Path, file: Path) -> None:
        """Refuse a checkpoint that these settings cannot go on from; end at once where nothing is left to do."""
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        if "optimizer_states" not in state:
            raise ValueError(f"{file}: holds weights alone; start a new run from them with --model.pretrained {file}")
        self.first_step = state["global_step"]
        anew = f"a new run from its weights: --model.pretrained {file} --trainer.default_root_dir OTHER"
        try:
            self.model.refuse_other(state["vit"])  # before this run's config.yaml takes the place of the other's
        except ValueError as error:
            of_model = "checkpoint's model has" in str(error)  # which weights do not change
            raise ValueError(f"{file}: {error}; {'train anew without --ckpt_path' if of_model else anew}") from None
        for name in ("optimizer", "layer_decay", "freeze"):
            before, now = state["hyper_parameters"].get(name), self.model.hparams[name]
            if before != now:
                raise ValueError(f"{file}: trained with model.{name} {before}, which cannot become {now}; {anew}")
        monitors = [re.match(r"(?:Best|ModelCheckpoint){'monitor': '?([\w/]+)", key) for key in state["callbacks"]]
        found, keeper = [match for match in monitors if match], keeper_of(self.trainer)
        chosen = [match[1] for match in found if match[0].startswith("Best")] or [match[1] for match in found]
        if keeper and chosen and str(keeper.monitor) not in chosen:  # Lightning would forget the best
            words = f"checkpoint.monitor {chosen[-1]}, which cannot become {keeper.monitor}"
            raise ValueError(f"{file}: trained with {words}; {anew}")
        self._refuse_finished(root, file, state)
        if of_another(file.resolve(), root.resolve()) and self._writes("fit"):
            self.aside = put_aside(root)
            if (best := file.parent / "best.ckpt").is_file():
                shutil.copyfile(best, root / "best.ckpt")

    def _refuse_finished(self, root: Path, file: Path, state: dict[str, Any]) -> None:
        """Leave in peace where ``last`` has reached its end and is exported; refuse where no step would be left."""
        limits, exported = [self.trainer.max_epochs, self.trainer.max_steps], root / "model.safetensors"
        finished = self._get(self.config, "ckpt_path") == "last" and state["callbacks"]["Guard"]["done"] == limits
        epochs = state["epoch"] + state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
        reached = [
            (what, limit, done)
            for what, limit, done in (("epochs", limits[0], epochs), ("steps", limits[1], self.first_step))
            if limit not in (None, -1) and limit <= done
        ]
        if finished and exported.exists() and exported.stat().st_mtime >= file.stat().st_mtime:
            words = f"this run is finished, {self.first_step:,} steps{'' if reached else ', as a callback stopped it'}"
            longer = "Longer: --trainer.max_epochs" if reached else f"To go on all the same: --ckpt_path {file}"
            print(f"{root}: {words}; nothing was changed. {longer}", file=sys.stderr)
            sys.exit(0)
        for what, limit, done in reached:
            if not finished:
                raise ValueError(
                    f"{file}: nothing is left to train, {done} of {limit} {what} are done. Longer: "
                    f"--trainer.max_{what}; a new run from its weights: --model.pretrained {file}"
                )

    def after_test(self) -> None:
        """How well each class is told: a table, and the whole matrix in a file; and what was measured, in a line."""
        confusion, names = self.model.confusion, self.model.class_names
        if not self.trainer.is_global_zero:
            return
        path = Path(self.trainer.default_root_dir, str(self.subcommand), "confusion.csv")
        if confusion is None:
            path.unlink(missing_ok=True)  # of an earlier measurement
            print(
                f"no table of the classes, and no confusion.csv: {len(names):,} classes are more than {MOST_TABLED:,}"
            )
        else:
            Console().print(class_table(confusion, names))
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="", errors="surrogateescape") as file:
                rows = csv.writer(file)
                rows.writerow(["of the class", *(f"named {name}" for name in names)])
                rows.writerows([name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True))
            print(f"all of them, what was taken for what: {path}")
        print(measured(self.trainer.callback_metrics))

    after_validate = after_test

    def before_instantiate_classes(self) -> None:
        """Refuse what Lightning takes and our runs cannot do, and settle what follows from other settings."""
        config = self._get(self.config, "trainer")
        check_trainer(config)
        if self.at_its_size:
            _, about = load_pretrained(self._get(self.config, "model")["pretrained"])
            self._get(self.config, "data")["image_size"] = list(about.preprocess.image_size)
        ends = config["max_epochs"] is not None or config["max_steps"] != -1 or config["max_time"]
        if self.subcommand == "fit" and not ends and not config["fast_dev_run"]:  # Lightning would do 1,000 epochs
            limits = "--trainer.max_epochs, max_steps or max_time"
            raise ValueError(f"how long? Give a --config (such as configs/folder.yaml), or {limits}")
        for part, of in {"model": (self.model_class, VisionTransformer), "data": (self.datamodule_class,)}.items():
            given = self._get(self.config, part)
            for name, setting in chain.from_iterable(signature(each).parameters.items() for each in of):
                if name not in FACTS and setting.default is not None and given.get(name, setting) is None:
                    raise ValueError(f"{part}.{name} cannot be null; leave it out for its default")
        for callback in several(config["callbacks"]):
            for name, value in callback.get("init_args", {}).items():
                if isinstance(value, Enum):  # Timer's default, which config.yaml could not hold
                    callback["init_args"][name] = value.value
        if self.subcommand != "fit" and config["logger"] is False:
            self.save_config_callback = None  # it would put this command's config.yaml in the place of the run's
        if self.subcommand == "fit":
            self._check_what_is_kept(several(config["callbacks"]))

    def _check_what_is_kept(self, callbacks: list[Any]) -> None:
        """Refuse another best.ckpt than the best, and callbacks that break a run or wait for what never comes."""
        for name, value in KEEPER.items():
            if (given := self._get(self.config, f"checkpoint.{name}") or None) != value:
                raise ValueError(
                    f"checkpoint.{name} {given}: leave it out, there is one best.ckpt, of the best validation "
                    "(a ModelCheckpoint in trainer.callbacks keeps others beside it)"
                )
        check_monitor("checkpoint", self._get(self.config, "checkpoint"))
        for callback in callbacks:
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
        if config["logger"] is not False:
            root, part = config["default_root_dir"], "" if self.subcommand == "fit" else str(self.subcommand)
            named = [logger for logger in several(given["logger"]) if logger is not True]
            others = named or [TensorBoardLogger(root, name="", version=part)]
            kwargs["logger"] = [History(Path(root, part)), *others]  # the first one's folder gets config.yaml
        callbacks = several(given["callbacks"])
        if config["enable_progress_bar"] is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            kwargs["callbacks"] = [*callbacks, TrainingProgress()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, RuntimeError) as error:  # devices that an accelerator has not; tasks that SLURM shares out
            raise ValueError(f"trainer: {error}") from error


def leave_out(names: Iterable[str], config: Any) -> None:
    """Take keys out of a configuration."""
    for name in names:
        config.pop(name, None)


def check_trainer(config: Any) -> None:
    """Refuse settings of Lightning's trainer that our runs cannot do."""
    for name in ("check_val_every_n_epoch", "val_check_interval", "accumulate_grad_batches", "limit_train_batches"):
        if isinstance(config[name], int | float) and config[name] <= 0:
            raise ValueError(f"trainer.{name} must be above 0")
    if (config["gradient_clip_val"] or 0) < 0:
        raise ValueError(f"trainer.gradient_clip_val must be at least 0, got {config['gradient_clip_val']}")
    if str(config["strategy"]).endswith("_spawn"):
        raise ValueError(f"trainer.strategy {config['strategy']} copies what cannot be copied; ddp does the same")
    if config["use_distributed_sampler"]:
        raise ValueError("trainer.use_distributed_sampler would share out what the processes have shared; leave it out")
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


def check_monitor(name: str, options: Any) -> None:
    """Refuse to wait for a number that never comes, or to take the worst for the best.

    Args:
        name: Of the callback, for the message.
        options: Its arguments.
    """
    monitor, mode = options.get("monitor"), options.get("mode")
    if monitor is None:
        return
    if monitor == "train/loss":
        raise ValueError(f"{name}: monitor train/loss is of the last batch alone, as it was augmented; give val/loss")
    if monitor not in MEASURED:
        raise ValueError(f"{name}: monitor {monitor} is not measured; give one of {', '.join(MEASURED)}")
    if mode not in (None, MEASURED[monitor]):
        raise ValueError(f"{name}: mode {mode} takes the worst {monitor} for the best; give mode {MEASURED[monitor]}")
