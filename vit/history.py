"""``metrics.csv``: what a run measured, one row for each time it logged, over all its restarts."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class History(Logger):
    """Writes ``metrics.csv``; a run that goes on from a checkpoint keeps the rows that came before it.

    Lightning's CSVLogger deletes the file of the run's first part. A row is on the disk as soon as it was logged.

    Args:
        folder: Where ``metrics.csv`` is.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns: list[str] = []
        self.rows: list[Mapping[str, Any]] = []

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def go_on_at(self, step: int) -> None:
        """Keep the rows of earlier steps; the later ones are from after the checkpoint and come again.

        Args:
            step: Optimiser steps that the checkpoint has; 0 starts anew.
        """
        try:
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        except OSError:
            lines = []
        found = csv.DictReader(line for line in lines if line.endswith("\n"))  # half a row if the power was lost
        whole = (row for row in found if None not in row)  # a name for each cell
        self.rows = [row for row in whole if (row.get("step") or "").isdigit() and int(row["step"]) < step]
        self._write()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step or 0}
        if self.rows and self.rows[-1] == row:
            return  # logged just before a save, see Guard
        known = set(self.columns)
        self.rows.append(row)
        if known >= row.keys() and self.path.exists():
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self._write()

    def _write(self) -> None:
        """The whole file, which is never half there."""
        self.columns = sorted({name for row in self.rows for name in row})
        partial = self.path.with_name(f".{self.path.name}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)
