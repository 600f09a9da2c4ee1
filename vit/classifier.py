"""The system that is trained: model, loss, metrics, optimiser, and what is written down at the end."""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from vit.calibration import Temperature
from vit.checkpoint import Checkpoint, describe, load_checkpoint, save_checkpoint
from vit.device import device_name
from vit.model import VisionTransformer, pair
from vit.optim import build_optimizer, learning_rate
from vit.preprocess import Preprocess
from vit.pretrained import load_pretrained, start_from
from vit.saving import keeper_of


class Batch(Protocol):
    """Normalised images (B, C, H, W) and their labels, int64 (B,); in training also shares of classes (B, classes)."""

    images: Tensor
    labels: Tensor


MOST_TABLED = 1000  # classes for a table of what was taken for what: it would be larger than the model


class ViTClassifier(LightningModule):
    """A vision transformer in training.

    Args:
        image_size: Height and width of the images, in pixels, or one number for both; from the data.
        class_names: Name of each class, in the order of the labels; from the data.
        mean: Mean of each channel, of values in [0, 1]; from the data.
        std: Standard deviation of each channel, of values in [0, 1]; from the data.
        white: Value that is white in grey images of more than 8 bits; from the data.
        optimizer: ``adamw``, or ``muon`` for the blocks' matrices with NAdamW for the rest.
        lr: Peak learning rate of (N)AdamW.
        muon_lr: Peak learning rate of Muon.
        weight_decay: Decoupled weight decay; biases, norms and embeddings are exempt.
        warmup: Share of all steps in which the learning rate rises, in [0, 1).
        schedule: How it falls after that, to 0: ``cosine`` or ``linear``.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).
        resolution: Pairs (until, factor): up to this share of the steps images are scaled by this factor; after the
            last pair they have their full size. Fewer pixels are fewer tokens: cheap steps first, sharp ones last.
        pretrained: What to start from: ``cifar10``, the weights that come along; a model file of ours, a folder of timm
            or transformers with ``config.json``, a timm name, or ``hf-hub:OWNER/NAME``; none for random weights. The
            architecture is read from it.
        freeze: Train the head alone (a linear probe).
        layer_decay: Factor of the learning rate from one block to the one before it, in (0, 1]; 0.65 to 0.9 is usual
            for fine-tuning.
        compile: Compile the training step's network (torch.compile) and, on a GPU, the augmentation. Takes half a
            minute for each resolution, and a C++ compiler; without one the run goes on uncompiled.
        vit: Arguments of VisionTransformer.
    """

    temperature: Tensor

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] | list[int],
        class_names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        white: float | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        lr: float = 1e-3,
        muon_lr: float = 0.02,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        schedule: Literal["cosine", "linear"] = "cosine",
        label_smoothing: float = 0.0,
        resolution: Sequence[tuple[float, float]] = (),
        pretrained: str | None = None,
        freeze: bool = False,
        layer_decay: float = 1.0,
        compile: bool = False,
        **vit: Any,
    ):
        super().__init__()
        self.save_hyperparameters()
        if not 0 < layer_decay <= 1:
            raise ValueError(f"model.layer_decay must be in (0, 1], got {layer_decay}")
        self.pretrained, self.adapted = pretrained, []
        self.moved = False  # whether these are no more the weights of ``pretrained``
        self.exported: tuple[Path, Checkpoint] | None = None  # the file that a fit leaves behind
        self.resumed = False  # whether this training goes on from a checkpoint
        self.measured = False  # whether it holds the best of weights that were validated
        self.validated: int | None = None  # step of the weights that were validated last
        size = pair(image_size)
        if pretrained is None:
            self.vit = VisionTransformer(image_size=size, in_chans=len(mean), num_classes=len(class_names), **vit)
        else:
            facts = {"image_size": size, "class_names": class_names, "mean": mean, "std": std, "white": white}
            self.vit, self.adapted = start_from(pretrained, **facts, **vit)
        for name, value in (("label_smoothing", label_smoothing), ("warmup", warmup)):
            if not 0 <= value < 1:
                raise ValueError(f"model.{name} must be in [0, 1), got {value}")
        for name, value in (("lr", lr), ("muon_lr", muon_lr)):
            if not 0 < value < math.inf:
                raise ValueError(f"model.{name} must be above 0, got {value}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"model.weight_decay must be at least 0, got {weight_decay}")
        if freeze:
            self.vit.requires_grad_(False).head.requires_grad_(True)
        self.class_names = tuple(class_names)
        self.preprocess = Preprocess(image_size=self.vit.image_size, mean=tuple(mean), std=tuple(std), white=white)
        self.optimizer = {"name": optimizer, "lr": lr, "muon_lr": muon_lr, "weight_decay": weight_decay}
        self.layer_decay, self.compiles = layer_decay, compile
        self.warmup, self.label_smoothing = warmup, label_smoothing
        self.schedule: Literal["cosine", "linear"] = schedule
        self.resolution = sorted((float(until), float(factor)) for until, factor in resolution)
        for until, factor in self.resolution:
            if not 0 < until <= 1 or not 0 < factor <= 1:
                raise ValueError(f"model.resolution: both numbers must be in (0, 1], got ({until}, {factor})")
            try:
                self.vit.grid_of(*self.scaled(factor))
            except ValueError as error:
                (height, width), fault = self.preprocess.image_size, f"model.resolution: {factor} of {{}}x{{}}: {error}"
                raise ValueError(fault.format(height, width)) from None
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_metrics, self.test_metrics = self._metrics("val/"), self._metrics("test/")
        self.ece_calibrated = MulticlassCalibrationError(len(class_names), n_bins=15, validate_args=False)
        few = len(class_names) <= MOST_TABLED
        self.confusion_matrix = ConfusionMatrix(len(class_names)) if few else None
        self.confusion: Tensor | None = None  # of the last measurement: images of each class (row) given each class
        self.fit_temperature = Temperature()
        self.register_buffer("temperature", torch.tensor(1.0))
        self.total_steps, self.started, self.minutes = 1, time.monotonic(), 0.0
        self.steps_an_epoch: int | None = None  # of the run, known when it starts or goes on

    def _metrics(self, prefix: str) -> MetricCollection:
        classes = len(self.class_names)
        # Without their checks, each of which would wait for the GPU; the loss has seen the labels before.
        metrics: dict[str, Metric] = {
            "acc": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "balanced_acc": BalancedAccuracy(classes),
            "ece": MulticlassCalibrationError(classes, n_bins=15, validate_args=False),
        }
        if classes > 5:
            metrics["acc5"] = MulticlassAccuracy(classes, average="micro", top_k=5, validate_args=False)
        return MetricCollection(dict(metrics), prefix=prefix, compute_groups=False)

    def measure_pretrained(self) -> Preprocess:
        """Be the pretrained weights as they are, with their own mean, deviation and temperature, as in predict.py.

        Returns:
            What images have to go through.
        """
        assert self.pretrained is not None
        _, about = load_pretrained(self.pretrained)
        theirs = about.preprocess
        if theirs.white != self.preprocess.white:
            now = self.preprocess.white
            raise ValueError(f"{self.pretrained}: trained on images with data.white {theirs.white}, here it is {now}")
        if len(theirs.mean) == len(self.preprocess.mean):
            facts = {"image_size": self.vit.image_size, "class_names": self.class_names, "white": theirs.white}
            self.vit, self.adapted = start_from(self.pretrained, **facts, mean=theirs.mean, std=theirs.std)
            self.preprocess = replace(self.preprocess, mean=theirs.mean, std=theirs.std)
            self.temperature.fill_(about.temperature)
        names = ("crop", "squash", "interpolation")
        before, now = ({name: getattr(each, name) for name in names} for each in (theirs, self.preprocess))
        if before != now and rank_zero_only.rank == 0:  # the images are decoded already
            words = [", ".join(f"{name} {value}" for name, value in each.items()) for each in (before, now)]
            print(f"{self.pretrained}: predict.py cuts images by {words[0]}; here it is {words[1]}", file=sys.stderr)
        return self.preprocess

    def setup(self, stage: str) -> None:
        if stage == "fit":  # whose checkpoint, if there is one, is restored later
            self.resumed, self.minutes, self.validated = False, 0.0, None
        # Weights of ours from elsewhere, that may have seen what is held out here: a checkpoint's state says it itself.
        compare = getattr(getattr(self.trainer, "datamodule", None), "compare_training", None)
        theirs = os.path.isfile(self.pretrained or "") and not self.moved and self.trainer.ckpt_path is None
        if compare and theirs:
            compare(load_pretrained(str(self.pretrained))[1].training)

    def configure_model(self) -> None:
        """Share the weights out over the processes, block by block, where the strategy asks for it (FSDP)."""
        strategy = self._trainer and self._trainer.strategy  # load_from_checkpoint comes here without a trainer
        if isinstance(strategy, ModelParallelStrategy) and not isinstance(self.vit, FSDPModule):
            if any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError("trainer.callbacks: weights that are shared out (FSDP) cannot be averaged too")
            mesh = init_device_mesh(strategy.root_device.type, (strategy.world_size,))
            for part in (*self.vit.blocks, self.vit):
                fully_shard(part, mesh=mesh)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W)."""
        return self.vit(images)

    # Steps

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        trainer: Any = self.trainer
        ends = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches
        if ends and self.global_step + 1 == self.total_steps:  # the end is measured, wherever it comes
            trainer.check_val_every_n_epoch, trainer.val_check_batch = 1, batch_idx + 1
            if keeper := keeper_of(trainer):
                keeper._every_n_epochs = 1  # whichever epoch it is
            if trainer._val_check_time_interval is not None:
                trainer._val_check_time_interval, trainer.val_check_interval = None, batch_idx + 1
        # Stochastic depth draws at a step what it would draw in a run that was never interrupted.
        seed = hash((int(os.environ.get("PL_GLOBAL_SEED", 0)), self.global_step, batch_idx, self.global_rank))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would note who asked, for devices not there: 3 ms
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(self.network(self.rescale(batch.images)).float(), batch.labels)
        self.log("train/loss", loss.detach())
        return loss

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What training makes small: cross-entropy; to override for another.

        Args:
            logits: Of the batch (B, classes), in float32.
            labels: Class numbers (B,), or where images are mixed the share of each class (B, classes).
        """
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def rescale(self, images: Tensor) -> Tensor:
        """The images at the size that belongs to this step."""
        progress = self.global_step / self.total_steps
        factor = next((factor for until, factor in self.resolution if progress < until), 1.0)
        if factor == 1:
            return images
        return F.interpolate(images, self.scaled(factor), mode="bilinear", antialias=True)

    def scaled(self, factor: float) -> tuple[int, int]:
        """Height and width times the factor."""
        height, width = self.preprocess.image_size
        return round(height * factor), round(width * factor)

    def on_validation_start(self) -> None:
        for average in not_begun(self.trainer):  # or the weights that the run began with would be measured
            average.module.load_state_dict(self.state_dict())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self._evaluate("val", batch, self.val_loss, self.val_metrics)
        self.fit_temperature.update(logits, batch.labels)
        if self.trainer.state.fn == "validate":
            self._measure("val", logits, batch.labels)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self._evaluate("test", batch, self.test_loss, self.test_metrics)
        self._measure("test", logits, batch.labels)

    def _measure(self, stage: str, logits: Tensor, labels: Tensor) -> None:
        """What is of trained weights alone: the error of the scores that predict.py gives, and what was mistaken."""
        self.ece_calibrated.update((logits / self.temperature).softmax(-1), labels)
        self.log(f"{stage}/ece_calibrated", self.ece_calibrated, on_step=False, on_epoch=True)
        if self.confusion_matrix is not None:
            self.confusion_matrix.update(logits.argmax(-1), labels)

    def on_test_epoch_end(self) -> None:
        if self.confusion_matrix is not None:
            self.confusion = self.confusion_matrix.compute().cpu()
            self.confusion_matrix.reset()

    def _evaluate(self, stage: str, batch: Batch, loss: MeanMetric, metrics: MetricCollection) -> Tensor:
        logits = self.vit(batch.images).float()
        loss.update(F.cross_entropy(logits, batch.labels, reduction="none"))
        if len(batch.labels):  # none where there are fewer images than ranks
            metrics.update(logits.softmax(-1), batch.labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True)
        self.log_dict(metrics, on_step=False, on_epoch=True)  # torchmetrics sums over ranks by itself
        return logits

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.temperature.copy_(self.fit_temperature.compute())
            self.validated = self.global_step
        self.fit_temperature.reset()
        if self.trainer.state.fn == "validate":
            self.on_test_epoch_end()

    # Optimisation

    def configure_optimizers(self) -> dict[str, Any]:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the learning rate needs an end: give trainer.max_epochs or trainer.max_steps")
        self.total_steps = int(total)
        optimizer = build_optimizer(self.vit, **self.optimizer, layer_decay=self.layer_decay)
        warmup = int(self.warmup * self.total_steps)
        factor = learning_rate(total=self.total_steps, warmup=warmup, shape=self.schedule)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A run that goes on does so with today's settings: the optimiser's state brought back its checkpoint's."""
        trainer: Any = self.trainer
        steps = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)  # an epoch
        done = self.global_step - trainer.current_epoch * steps
        before = self.steps_an_epoch if self.resumed else None
        if not 0 <= done <= steps or before not in (None, steps):  # the learning rate would end too early, or never
            raise ValueError(
                f"step {self.global_step} of epoch {trainer.current_epoch} cannot go on with epochs of {steps} steps: "
                "keep data.batch_size x devices x trainer.accumulate_grad_batches, and the images, as they were (where "
                "batches do not come out even, by --trainer.limit_train_batches), or begin a new run from the weights "
                "(--model.pretrained)"
            )
        self.steps_an_epoch = steps
        if before and done < steps:  # Lightning counts batches, of which another number may make a step now
            progress = trainer.fit_loop.epoch_loop.batch_progress.current
            shift = done * trainer.accumulate_grad_batches - progress.processed
            for name in ("ready", "started", "processed", "completed"):
                setattr(progress, name, getattr(progress, name) + shift)
        optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        schedule.base_lrs = [group["initial_lr"] for group in self.settings]
        for group, settings, factor in zip(optimizer.param_groups, self.settings, schedule.lr_lambdas, strict=True):
            group.update(settings, lr=settings["initial_lr"] * factor(schedule.last_epoch))
        trainer.log_every_n_steps = min(trainer.log_every_n_steps, steps)  # small sets too have a loss in each epoch

    # What is kept

    @cached_property
    def network(self) -> Callable[[Tensor], Tensor]:
        """What a training step calls: the model, perhaps compiled, once for each resolution.

        Validation calls the model itself: its last batch has another size, and would be compiled anew.
        """
        return compiled(self.vit) if self.compiles else self.vit

    def on_fit_start(self) -> None:
        self.started, self.moved = time.monotonic(), True
        if self.compiles and (fault := compiler_fault(self.device)):
            self.compiles = False
            if data := getattr(self.trainer, "datamodule", None):
                data.compile = False
            if self.trainer.is_global_zero:
                print(f"going on without model.compile, which fails here: {fault}", file=sys.stderr)
        if self.pretrained and self.trainer.is_global_zero and not self.resumed:
            for note in self.adapted:
                print(f"{self.pretrained}: {note}", file=sys.stderr)

    def about(self) -> Checkpoint:
        """The description that goes with the present weights; figures are theirs, or there are none.

        The temperature is that of the last validation: it changes slowly, and an older one is better than none.
        """
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        found = trainer.callback_metrics if self.validated == self.global_step else {}
        metrics = {name: float(value) for name, value in found.items() if name.startswith("val/")}
        return Checkpoint(
            architecture=self.vit.architecture,
            class_names=self.class_names,
            preprocess=self.preprocess,
            temperature=float(self.temperature),
            metrics=metrics,
            training=({"pretrained": self.pretrained} if self.pretrained else {})
            | {
                "dataset": str(getattr(data, "dataset", "")),
                "validation": getattr(data, "held_out", None),  # which images, so that a later training knows
                "epochs": trainer.current_epoch + 1,
                "steps": self.global_step,
                "minutes": round(self.minutes + (time.monotonic() - self.started) / 60, 2),
                "device": device_name(self.device),
                "devices": trainer.world_size,
                "precision": str(trainer.precision),
                "torch": str(torch.__version__),
                "lightning": str(lightning.__version__),
            },
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["vit"] = describe(self.about())
        checkpoint["steps_an_epoch"] = self.steps_an_epoch
        if not_begun(self.trainer):
            checkpoint["state_dict"] = checkpoint.get("current_model_state", checkpoint["state_dict"])
        checkpoint["state_dict"]["temperature"] = self.temperature  # as fitted, also where weights are averages
        numbers = {parameter: number for number, parameter in enumerate(self.parameters())}
        for state, optimizer in zip(checkpoint.get("optimizer_states", ()), self.trainer.optimizers, strict=False):
            groups = [[numbers[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
            number(state, groups, done=isinstance(self.trainer.strategy, ModelParallelStrategy))

    def refuse_other(self, theirs: dict[str, Any]) -> None:
        """Refuse the description of a checkpoint whose weights are not for this model, its classes or its images."""
        ours = self.vit.architecture
        for number, (was, now) in enumerate(zip_longest(theirs["class_names"], self.class_names)):
            if was != now:  # there may be thousands, of which one says it
                counts = f"of {len(theirs['class_names'])} classes and of {len(self.class_names)}"
                raise ValueError(f"the checkpoint's class {number} is {was}, here it is {now}, {counts}")
        before = VisionTransformer.__init__.__kwdefaults__ or {}  # older files lack some
        for name, value in {**before, **theirs["architecture"]}.items():
            if name != "drop_path_rate" and ours[name] != value:  # which has no weights: a matter of this training
                raise ValueError(f"the checkpoint's model has {name} {value}, this one {ours[name]}")
        if (white := theirs["preprocess"].get("white")) != self.preprocess.white:
            raise ValueError(f"the checkpoint's images have data.white {white}, these {self.preprocess.white}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        theirs = checkpoint["vit"]
        self.refuse_other(theirs)
        # The weights belong to their preprocessing, whatever the mean and deviation of the images that come now.
        self.preprocess, self.moved = Preprocess(**theirs["preprocess"]), True
        trainer = self._trainer
        if trainer is None:  # load_from_checkpoint
            return
        if trainer.state.fn == "fit":  # and not a measurement, which a training of its own may follow
            self.minutes, self.resumed = theirs["training"]["minutes"], True
            self.steps_an_epoch = checkpoint.get("steps_an_epoch")  # older files lack it
        if data := getattr(trainer, "datamodule", None):
            data.preprocess = self.preprocess
        for state in checkpoint.get("callbacks", {}).values():
            if Path(state.get("best_model_path", "")).name == "best.ckpt":  # ours, and not another ModelCheckpoint's
                relocate(state, Path(trainer.default_root_dir))

    def on_fit_end(self) -> None:
        """Write ``model.safetensors`` from the best weights, or the last where none are chosen or were measured."""
        keeper, root = keeper_of(self.trainer), Path(self.trainer.default_root_dir)
        dry = getattr(self.trainer, "fast_dev_run", False)  # keeps nothing; what lies in the folder is another run's
        if dry or not self.trainer.is_global_zero or keeper is None:
            return
        self.measured = bool(keeper.monitor and keeper.best_model_path)
        best = Path(keeper.best_model_path) if self.measured else root / "last.ckpt"
        model, about = load_checkpoint(best)
        path = root / "model.safetensors"
        save_checkpoint(path, model.state_dict(), about)
        self.exported = path, about


def not_begun(trainer: Any) -> list[AveragedModel]:
    """Averages of the weights that hold none yet: what they begin with is kept until then."""
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [average for average in averages if isinstance(average, AveragedModel) and not average.n_averaged]


class BalancedAccuracy(Metric):
    """Mean over the classes that have images of the share that is recognised, as scikit-learn's balanced accuracy.

    torchmetrics counts a class without images as 0 as soon as an image is taken for it, and needs a table of all pairs
    of classes for each batch, or even for each image.

    Args:
        classes: Their number.
    """

    found: Tensor  # images of each class that are recognised
    of: Tensor  # images of each class

    def __init__(self, classes: int):
        super().__init__()
        for name in ("found", "of"):
            self.add_state(name, torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch: scores (B, classes), class numbers (B,)."""
        right = scores.argmax(-1) == labels
        self.found = self.found.index_add(0, labels, right.long())
        self.of = self.of.index_add(0, labels, torch.ones_like(labels))

    def compute(self) -> Tensor:
        return (self.found / self.of)[self.of > 0].mean()


class ConfusionMatrix(Metric):
    """Images of each class (row) that were taken for each class (classes, classes).

    torchmetrics' own makes a table for each batch, with deterministic algorithms one for each image.

    Args:
        classes: Their number.
    """

    counts: Tensor  # (classes * classes,)

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.add_state("counts", torch.zeros(classes * classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, named: Tensor, labels: Tensor) -> None:
        """Count a batch: the class that each image was taken for, and its own, numbers (B,)."""
        self.counts = self.counts.index_add(0, labels * self.classes + named, torch.ones_like(labels))

    def compute(self) -> Tensor:
        return self.counts.view(self.classes, self.classes)


def relocate(state: dict[str, Any], root: Path) -> None:
    """Let ModelCheckpoint's state name the best model in this folder, as a run may be moved; none if it is gone.

    Args:
        state: Of the callback; changed.
        root: Folder of the run.
    """
    named = Path(state["best_model_path"])
    here = root.resolve() / named.name
    if here.is_file() and here != named:
        state["best_model_path"] = state["kth_best_model_path"] = str(here)
        state["best_k_models"] = dict.fromkeys([str(here)], state["best_model_score"])
        state["dirpath"] = str(here.parent)
    elif state["best_model_path"] and not named.is_file():  # a better one than that may never come
        state.update(best_model_path="", kth_best_model_path="", best_model_score=None, best_k_models={})
        if rank_zero_only.rank == 0:
            print(f"{named}: is gone; the best weights are those of validations from here on", file=sys.stderr)


def compiled(vit: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """The model's forward pass, compiled; a function, as a module would have its weights saved a second time."""
    network = torch.compile(vit, dynamic=False)
    return lambda images: network(images)


def compiler_fault(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, in a line; none where it can. Tried on something small.

    A compiler for C++ and Python's headers are needed, which many machines lack. And what is compiled has to be right:
    with g++ 12 and torch 2.14 the AVX-512 code of a sum over two transposed tiles of bfloat16, as in the gradient of a
    norm's bias, gives numbers that nobody has written, on some processors. There AVX2 is compiled for.
    """
    try:
        if compiles_right(device):
            return None
        from torch._inductor import config

        config.cpp.simdlen = 256
        torch.compiler.reset()
        return None if compiles_right(device) else "what is compiled computes something else"
    except Exception as error:  # whatever a compiler, a driver or a library may raise
        return next(iter(str(error).splitlines()), type(error).__name__)


def compiles_right(device: torch.device) -> bool:
    """Whether a compiled function computes what it should."""

    def function(first: Tensor, second: Tensor, factors: Tensor) -> Tensor:
        return (first.transpose(1, 2).float() * factors + second.transpose(1, 2).float()).sum((0, 1))

    numbers = torch.linspace(-9, 9, 3 * 32 * 64, device=device).sin()
    first, second, factors = numbers.view(3, 1, 32, 64)
    given = first.bfloat16(), second.bfloat16(), factors.view(64, 32)
    return torch.allclose(torch.compile(function)(*given), function(*given), atol=1e-3)


def number(state: dict[str, Any], groups: Sequence[Sequence[int]], *, done: bool) -> None:
    """Give an optimiser's parameters the number they have in the model, in the groups' order, with FSDP or without.

    Lightning numbers them by group without FSDP, and with it by the model, but sorts them then; either would go on from
    the other with the wrong moments.

    Args:
        state: The optimiser's state; changed. Empty where another process saves it.
        groups: Number in the model of each parameter of each group.
        done: Whether their states are numbered so already.
    """
    if state and not done:
        places = [number for group in groups for number in group]
        state["state"] = {places[place]: value for place, value in state["state"].items()}
    for group, numbers in zip(state.get("param_groups", ()), groups, strict=False):
        group["params"] = list(numbers)
