"""Learning rates as plain functions of the step and of the validation errors so far."""

import math
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("epochs", "plateau", "cosine", "constant")


class Schedule(NamedTuple):
    """A learning rate over a run.

    `kind`: "epochs" divides by `drop_factor` at each of `drop_epochs`; "plateau" does
    so when the validation error has not fallen by `min_improvement` for `patience`
    epochs, at most `max_drops` times (the paper: twice); "cosine" falls to zero over
    the run; "constant" stays. Each may begin with `warmup_epochs` of linear rise.
    """

    learning_rate: float = 0.01
    kind: str = "plateau"
    warmup_epochs: float = 0.0
    drop_factor: float = 10.0
    drop_epochs: tuple[float, ...] = ()
    patience: int = 5
    min_improvement: float = 0.001
    max_drops: int = 2

    def rate(
        self,
        step: int,
        *,
        steps_per_epoch: int,
        total_steps: int,
        validation_errors: Sequence[float] = (),
    ) -> float:
        """The learning rate of a step, counted from 0."""
        epoch = step / steps_per_epoch
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        if self.kind == "cosine":
            done = (step - warmup) / max(total_steps - warmup, 1)
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        drops = 0
        if self.kind == "epochs":
            drops = sum(epoch >= at for at in self.drop_epochs)
        elif self.kind == "plateau":
            drops = self.plateaus(validation_errors)
        return self.learning_rate / self.drop_factor**drops

    def plateaus(self, validation_errors: Sequence[float]) -> int:
        """How many plateaus the errors of the epochs so far have shown."""
        best, waited, drops = math.inf, 0, 0
        for error in validation_errors:
            if error < best - self.min_improvement:
                best, waited = error, 0
                continue
            waited += 1
            if waited >= self.patience and drops < self.max_drops:
                drops, waited = drops + 1, 0
        return drops
