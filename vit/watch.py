"""Watch attention form while a model trains: the same validation images with their maps, in TensorBoard."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image
from torch import Tensor

from vit.preprocess import MODES, Preprocess
from vit.rollout import METHODS, attention_map
from vit.visualize import contact_sheet


class Watch(Callback):
    """Writes a sheet of maps to TensorBoard (IMAGES, ``val/maps``). Training is the same bit for bit with it.

    The first process draws; where it has not the whole model (FSDP), there is no sheet.

    Args:
        every_n_epochs: Epochs from one sheet to the next; of those that validate.
        images: Validation images on it, spread evenly over their order.
        method: How maps are made, a name in ``vit.rollout.METHODS``.
    """

    def __init__(self, every_n_epochs: int = 5, images: int = 16, method: str = "rollout"):
        if method not in METHODS:
            raise ValueError(f"Watch: method {method!r} is not one of {', '.join(METHODS)}")
        if every_n_epochs < 1 or images < 1:
            raise ValueError(f"Watch needs at least 1 epoch and 1 image, got {every_n_epochs} and {images}")
        self.every_n_epochs, self.images, self.method = every_n_epochs, images, method
        self.kept: list[tuple[Tensor, int]] = []  # normalised image and label
        self.choosing, self.seen = True, 0  # whether this validation is the one they are taken from
        self.last = -1  # epoch of the last sheet

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.choosing, self.seen = not self.kept, 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.choosing or not self._wanted(trainer):  # kept for the whole run
            return
        loader: Any = trainer.val_dataloaders
        total = -(-len(loader.dataset) // trainer.world_size)
        places = np.linspace(0, total - 1, min(self.images, total)).astype(int) - self.seen
        for i in places[(places >= 0) & (places < len(batch.labels))].tolist():
            self.kept.append((batch.images[i].clone(), int(batch.labels[i])))
        self.seen += len(batch.labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = self.last < 0 or trainer.current_epoch >= self.last + self.every_n_epochs
        if self._wanted(trainer) and self.kept and due:
            self.last = trainer.current_epoch
            for logger in self._boards(trainer):
                logger.experiment.add_image("val/maps", self._sheet(pl_module), trainer.global_step, dataformats="HWC")

    def _wanted(self, trainer: Trainer) -> bool:
        whole = not isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and whole and trainer.is_global_zero and bool(self._boards(trainer))

    @staticmethod
    def _boards(trainer: Trainer) -> list[TensorBoardLogger]:
        return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def _sheet(self, pl_module: Any) -> np.ndarray:
        """The picture (H, W, 3), uint8."""
        images = torch.stack([image for image, _ in self.kept])
        logits, grids = attention_map(pl_module.vit, images, method=self.method)
        scores = logits.float().softmax(1).cpu()
        names = pl_module.class_names
        entries = []
        for (image, label), grid, row in zip(self.kept, grids.cpu(), scores, strict=True):
            said, truth = names[int(row.argmax())], names[label]
            caption = f"{said} {row.max():.0%}" + ("" if said == truth else f", is {truth}")
            entries.append({"image": picture(image, pl_module.preprocess), "grid": grid.numpy(), "caption": caption})
        return np.asarray(contact_sheet(entries, size=128))


def picture(image: Tensor, preprocess: Preprocess) -> Image.Image:
    """A normalised image (C, H, W) as a person sees it; the first channel where there are neither 1 nor 3."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    pixels = (255 * (image.float().cpu() * std + mean)).round().clamp(0, 255).to(torch.uint8)
    mode = MODES.get(len(pixels), "L")
    return Image.fromarray(pixels.permute(1, 2, 0).numpy() if mode == "RGB" else pixels[0].numpy()).convert("RGB")
