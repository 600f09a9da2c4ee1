"""Train, validate or test a vision transformer: ``python train.py fit --config configs/digits.yaml``."""

import os
import sys
import warnings
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from data.datamodule import ImageDataModule
from vit.classifier import ViTClassifier
from vit.progress import TrainingProgress

FACTS = ("class_names", "mean", "std", "image_size")  # flow from the data to the model


class TrainCLI(LightningCLI):
    """LightningCLI with what every run of this project has: facts linked, files in one folder, our progress bar."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for fact in FACTS:
            parser.link_arguments(f"data.{fact}", f"model.{fact}", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "trainer.use_distributed_sampler": False,  # the data module shards: without padding, and resumable
                "trainer.num_sanity_val_steps": 0,
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/acc",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config[self.subcommand]["trainer"]
        if config["logger"] is None:
            root = config["default_root_dir"]
            kwargs["logger"] = [CSVLogger(root, name="", version=""), TensorBoardLogger(root, name="", version="")]
        if config["enable_progress_bar"] is not False:
            kwargs["callbacks"] = [TrainingProgress()]
        return super().instantiate_trainer(**kwargs)


def main(args: ArgsType = None) -> int:
    """Run the command line.

    Args:
        args: The arguments; none takes the program's own.

    Returns:
        0 if all went well, 2 if the arguments or the data are not usable.
    """
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # a checkpoint is data: it must not run code
    torch.set_float32_matmul_precision("high")
    for text in (
        ".*does not have many workers.*",  # small sets are in memory and need none
        ".*Experiment logs directory.*exists and is not empty.*",  # a run may be started again
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*number of training batches.*is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", text)
    try:
        TrainCLI(
            ViTClassifier,
            ImageDataModule,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
        )
    except ValueError as error:  # a setting or an image that cannot be used; its message is for the user
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
