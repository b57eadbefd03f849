"""How long a chain runs and which of its steps are draws."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How long a chain runs and which of its steps are draws.

    Attributes:
        num_draws: losses that enter λ̂.
        num_burnin: steps before the first draw.
        num_steps_bw_draws: steps from a draw to the next.
    """

    num_draws: int
    num_burnin: int
    num_steps_bw_draws: int = 1

    @property
    def num_steps(self) -> int:
        return self.num_burnin + self.num_draws * self.num_steps_bw_draws

    @property
    def draws(self) -> slice:
        """The steps that are draws: the last of each stretch of `num_steps_bw_draws`."""
        return slice(self.num_burnin + self.num_steps_bw_draws - 1, self.num_steps, self.num_steps_bw_draws)

    def draw_at(self, step: int) -> int | None:
        """The number of the draw that a step is; None if it is no draw."""
        draw, rest = divmod(step - self.num_burnin + 1, self.num_steps_bw_draws)
        return draw - 1 if draw >= 1 and rest == 0 else None
