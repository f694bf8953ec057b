"""A callback for tests, named in their recipes: in mid-training, a signal to the whole group, as Ctrl-C sends."""

import os

import lightning as L
from lightning.pytorch.callbacks import Callback


class Told(Callback):
    """Sends `number` to every process of the group when `step` steps are done."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            self.step = -1
            os.killpg(os.getpgrp(), self.number)
