"""Learning rates as plain functions of the step and of the validation errors so far."""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from sppnet_jax.run.settings import at_least, one_of

KINDS = ("epochs", "plateau", "cosine", "constant")


class Schedule(NamedTuple):
    """A learning rate over a run.

    `kind`: "epochs" divides by `drop_factor` at each of `drop_epochs`; "plateau" does
    so when the validation error has not fallen by `plateau_improvement` for
    `plateau_epochs`, at most `plateau_drops` times (the paper: twice); "cosine" falls
    to zero over the run; "constant" stays. Each may begin with `warmup_epochs` of
    linear rise.
    """

    learning_rate: Annotated[float, at_least(0)] = 0.01
    kind: Annotated[str, one_of(KINDS)] = "plateau"
    warmup_epochs: Annotated[float, at_least(0)] = 0.0
    drop_factor: Annotated[float, at_least(1)] = 10.0
    drop_epochs: tuple[Annotated[float, at_least(0)], ...] = (30.0, 50.0)
    plateau_epochs: Annotated[int, at_least(1)] = 5
    plateau_improvement: Annotated[float, at_least(0)] = 0.001
    plateau_drops: Annotated[int, at_least(0)] = 2

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
            if error < best - self.plateau_improvement:
                best, waited = error, 0
                continue
            waited += 1
            if waited >= self.plateau_epochs and drops < self.plateau_drops:
                drops, waited = drops + 1, 0
        return drops
