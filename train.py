"""Train, validate or test a vision transformer: ``python train.py fit --config configs/digits.yaml``."""

import logging
import os
import signal
import sys
import warnings

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities.exceptions import SIGTERMException

from data.datamodule import ImageDataModule
from vit.classifier import ViTClassifier
from vit.cli import UNUSABLE, TrainCLI
from vit.config import Parser, check_config, configs
from vit.guard import Diverged
from vit.memory import keep_freed_memory
from vit.records import printable

DESCRIPTION = (
    "Train a vision transformer on images. The project's own settings are --model.* and --data.*; --trainer.* are "
    "Lightning's. predict.py classifies."
)


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
        ".*args parameter is intended to run from within Python.*",  # TrainCLI gives it the words, in another order
        ".*does not have many workers.*",  # small sets are in memory and need none
        ".*Experiment logs directory.*exists and is not empty.*",  # a run may be started again
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*number of training batches.*is smaller than the logging interval.*",
        ".*LeafSpec.*is deprecated.*",  # Lightning's own affair
        ".*resuming from a checkpoint that ended before the epoch ended.*",  # TrainOrder goes on where it stopped
        ".*The dirpath has changed.*",  # a checkpoint of another folder
        ".*need to be provided during .Trainer.*(Best|ModelCheckpoint|Timer|EarlyStopping).*",  # other settings now
        ".*Total length of `list` across ranks is zero.*",  # data.val_fraction 0: nothing to validate on
        ".*could not find the monitored key.*",  # nothing was validated; the end of the run says so
        ".*WeightAveraging callback with a model that overrides the configure_model.*",  # which shards only for FSDP
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
        say(error)
        return 2
    except Diverged as error:
        say(f"diverged: {error}; try a lower model.lr, with Muon a lower model.muon_lr")
        return 5
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):  # a processor's has no type of its own
            raise
        say(f"out of memory; try half the --data.batch_size, or a smaller model ({error})")
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning makes the one the other
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            return 128 + signal.SIGINT  # before training began; after that the guard sees to it
        if isinstance(stop, SIGTERMException):
            return 128 + signal.SIGTERM
        raise
    return 0


def say(why: object) -> None:
    """Why a run ends, in one line; names of files and classes in it move no terminal."""
    print(f"train.py: {printable(' '.join(str(why).split()))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
