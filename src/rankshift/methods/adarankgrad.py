"""AdaRankGrad: GaLore whose rank follows the gradient. Refael et al. 2024, arXiv 2410.17881.

    when training inside the subspace has converged (or T updates have passed)
        Q_t ← the fewest directions r_t that keep a share η of ‖G‖², by a randomised range finder
        m ← m Rᵀ,  v ← v (R∘R)ᵀ,  R = Q_tᵀ Q_{t−1}
    W ← (1 − lr·wd) W − lr·α·N Q_tᵀ

Where the published text leaves the choice open, mathematics made it (none of this could be checked against the authors'
code, which is not public). The rank rule, a supremum over a set without one as it is printed, is the minimum. The
second moment goes over by R∘R, because R v has negative entries. Convergence is measured against the layer's own
gradient just after the last renewal: an absolute threshold would depend on the scale of the loss. A new direction's
average is corrected for how little it has seen (``rankshift.optim.project``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from rankshift.core.errors import ConfigError
from rankshift.core.form import Form
from rankshift.methods.galore import GaLore
from rankshift.optim.project import Clock, Project
from rankshift.optim.subspace import Transport


@dataclass(frozen=True, kw_only=True)
class AdaRankGrad(GaLore):
    """GaLore with a rank for every layer and renewal, kept just large enough, and moments that go along."""

    name: ClassVar[str] = "adarankgrad"
    paper: ClassVar[str] = "Refael et al. 2024, arXiv 2410.17881"
    summary: ClassVar[str] = "GaLore with the smallest rank that keeps a share of each gradient"

    rank: int = 128
    """The largest rank: where it does not keep ``energy``, the layer is saturated, and says so in the log."""
    min_rank: int = 1
    """The smallest rank."""
    energy: float = 0.9
    """η, the share of ‖G‖² to keep, in (0, 1]. The paper's value is not known; useful: 0.5 to 0.99."""
    multiple: int = 1
    """Ranks are rounded up to multiples of this: 8 or 16 suit tensor cores and compiled code."""
    every: int = 500
    """T_max: updates after which a subspace is renewed whatever happens; 0: never by the clock."""
    earliest: int = 50
    """T_min: updates before which it is not renewed."""
    kappa: float = 0.5
    """A subspace has converged when the running mean of ‖X‖ is at most this share of what it was when it was new."""
    transport: Transport = "square"

    def check(self) -> None:
        super().check()
        if not 0 < self.energy <= 1:
            raise ConfigError(f"AdaRankGrad(energy={self.energy}): the share of ‖G‖² to keep, in (0, 1].")
        if not 1 <= self.min_rank <= self.rank:
            raise ConfigError(f"AdaRankGrad(min_rank={self.min_rank}) must lie in 1 … rank = {self.rank}.")
        if self.transport == "none":
            raise ConfigError('AdaRankGrad(transport="none"): moments have no place in a subspace of another rank.')
        if self.earliest < 1 or (self.every and self.earliest > self.every):
            raise ConfigError(
                f"AdaRankGrad(earliest={self.earliest}) must lie in 1 … every = {self.every}. Lower earliest."
            )
        if not 0 < self.kappa < 1:
            raise ConfigError(f"AdaRankGrad(kappa={self.kappa}): a share, in (0, 1).")
        if self.multiple < 1:
            raise ConfigError(f"AdaRankGrad(multiple={self.multiple}): at least 1.")

    def project(self, form: Form) -> Project:
        return replace(
            super().project(form),
            energy=self.energy,
            min_rank=self.min_rank,
            multiple=self.multiple,
            clock=Clock(self.every, self.earliest, self.kappa, stagger=self.stagger),
        )
