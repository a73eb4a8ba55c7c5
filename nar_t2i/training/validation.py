"""Validations that a run still owes when it goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from nar_t2i.training.collectives import gather, on_first

VALIDATED = "validated"  # in a run's folder: global_step at the last validation that came to its end


class OwedValidation(Checkpoint):
    """Makes up for a validation that was due at the step of a checkpoint, and that the interrupted run did not end.

    A checkpoint is written before the validation of the same step, so that a long one puts nothing at risk. Lightning
    takes it for done when it goes on, and finishes one that was broken off with the batches that were left.

    (A Checkpoint, since Lightning calls those last: once RunCheckpoint knows what is saved already.)
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / VALIDATED
        self._owed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        loop = self._trainer.fit_loop.epoch_loop
        progress = loop.batch_progress.current
        batch_ends = progress.processed > progress.completed
        due = batch_ends and loop._should_check_val_fx(self._trainer.fit_loop._data_fetcher)
        return {"owed": bool(due or self._trainer.validating)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._owed = state_dict["owed"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._owed:  # there was no step left to train
            self._settle(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.validating:
            on_first(lambda: self._note(trainer.global_step))

    def _note(self, step: int) -> None:
        self.path.write_text(f"{step}\n", encoding="utf-8")

    def _settle(self, trainer: Trainer) -> None:
        validated = 0

        def read() -> None:
            nonlocal validated
            if self.path.is_file():
                text = self.path.read_text(encoding="utf-8").strip()
                validated = min(int(text) if text.isdecimal() else 0, trainer.global_step)
                self._note(validated)  # what came later is not of this run's past

        on_first(read)
        owed, self._owed = self._owed and gather(validated)[0] < trainer.global_step, False
        if owed:
            loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
            first_iteration = connector._first_loop_iter
            loop.restarting = False  # from its first batch
            trainer.validating = True
            loop.run()
            trainer.training = True
            connector._first_loop_iter = first_iteration
            loop.reset_restart_stage()
