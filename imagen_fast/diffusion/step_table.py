"""A solver as a table: one row of coefficients per evaluation of the model.

With x the sample, o the guided output, x0' the previous evaluation's x0, and ε noise, every step of every solver is

    x0   = threshold(x0_from_sample · x + x0_from_output · o + x0_from_noise · ε)
    next = next_from_sample · x + next_from_output · o + next_from_x0 · x0 + next_from_previous_x0 · x0'
           + noise_scale · ε

where a learned variance multiplies ε in `next` by exp(½ · logvar), logvar interpolated between min_log_variance and
max_log_variance by the output's variance channels (improved DDPM, arXiv 2102.09672, equation 15). For the loop, a row
has the timestep that the model is told, what its input is multiplied by, and σ, the noise over the signal there.

The builders reproduce the schedulers of diffusers, step by step; how they come by their coefficients stands in
`_variance_preserving` (DDPM, DDIM, DPM-Solver++) and `_variance_exploding` (Euler, Heun, EDM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._tracing import makes_tensors_to_keep
from . import _variance_exploding as exploding
from . import _variance_preserving as preserving
from .coefficients import COLUMNS, Prediction, Row, Variance

__all__ = ["COLUMNS", "Prediction", "StepTable", "Variance"]


@dataclass(frozen=True, eq=False)
class StepTable:
    """Coefficients of a solver, with a builder for each.

    Attributes:
        rows: (evaluations, len(COLUMNS)) float64 on the CPU, in the order of `COLUMNS`.
        timesteps: the timestep that the model is told at every evaluation, noisiest first.
        learned_variance: whether the output carries variance channels that are used.
        initial_sigma: the standard deviation of the first sample.

    Example:
        >>> table = StepTable.ddim(squaredcos_cap_v2(1000), steps=25, prediction="v")
        >>> for index, timestep in enumerate(table.timesteps):
        ...     sample, _ = ops.sampler_step(sample, unet(sample, timestep), table, index)
    """

    rows: Tensor
    timesteps: tuple[float, ...]
    learned_variance: bool = False
    initial_sigma: float = 1.0
    _on: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rows.shape != (len(self.timesteps), len(COLUMNS)) or self.rows.dtype != torch.float64:
            raise ValueError(
                f"rows must be float64 of shape {(len(self.timesteps), len(COLUMNS))}, "
                f"got {self.rows.dtype} {tuple(self.rows.shape)}"
            )
        # As Python numbers, so that choosing a row reads no tensor, and traces as a constant
        values = [dict(zip(COLUMNS, row, strict=True)) for row in self.rows.tolist()]
        object.__setattr__(self, "_values", values)
        used = self.rows.ne(0).any(0).tolist()
        object.__setattr__(self, "_used", dict(zip(COLUMNS, used, strict=True)))
        reads = self.rows[:, COLUMNS.index("next_from_previous_x0")].ne(0).tolist()
        object.__setattr__(self, "_needs_x0", (*reads[1:], False))

    def __len__(self) -> int:
        return len(self.timesteps)

    def __deepcopy__(self, memo: Any) -> StepTable:
        return self  # nothing in it ever changes

    def row(self, index: int) -> dict[str, float]:
        """Row `index` by column name. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be between 0 and {len(self) - 1}, got {index}")
        return self._values[index].copy()  # type: ignore[attr-defined]

    def uses(self, column: str) -> bool:
        """Whether any row has a coefficient other than zero in this column."""
        return self._used[column]  # type: ignore[attr-defined]

    def needs_x0(self, index: int) -> bool:
        """Whether the row after `index` reads this row's x0."""
        return self._needs_x0[index]  # type: ignore[attr-defined]

    @cached_property
    def content(self) -> tuple[bytes, tuple[float, ...], bool]:
        """What its steps depend on, to compare tables by."""
        return self.rows.numpy().tobytes(), self.timesteps, self.learned_variance

    def on(self, device: torch.device) -> Tensor:
        """The rows on a device; the same tensor at every call."""
        if device.type == "cpu":
            return self.rows
        return self._kept(("rows", device), lambda: self.rows.to(device))

    def index(self, index: int, device: torch.device) -> Tensor:
        """`index` as a 0-d int64 tensor on a device; the same one at every call."""
        return self._kept(("index", device), lambda: torch.arange(len(self), device=device).unbind())[index]

    @property
    def told_dtype(self) -> torch.dtype:
        """In which the model is told timesteps: int64 if all are whole, else float32."""
        return torch.int64 if all(isinstance(timestep, int) for timestep in self.timesteps) else torch.float32

    def told(self, device: torch.device) -> Tensor:
        """The timesteps (evaluations,) on a device; the same tensor at every call."""
        return self._kept(("told", device), lambda: torch.tensor(self.timesteps, dtype=self.told_dtype, device=device))

    def input_scales(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """What the model's input is multiplied by, (evaluations,) on a device, the same tensor at every call; None if
        it is 1 everywhere."""
        if all(row["input_scale"] == 1 for row in self._values):  # type: ignore[attr-defined]
            return None
        column = self.rows[:, COLUMNS.index("input_scale")]
        return self._kept(("input_scales", device, dtype), lambda: column.to(device, dtype))

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling():
            return make()
        found = self._on.get(key)
        if found is None:
            if not makes_tensors_to_keep(key[1]):
                return make()
            with torch.inference_mode(False):  # autograd cannot save what was made in inference mode
                self._on[key] = found = make()
        return found

    def with_timesteps(self, timesteps: Sequence[float]) -> StepTable:
        """The same solver for a model that is told other numbers, such as imagen-pytorch's, which reads log-SNR.

        Args:
            timesteps: what the model is told at every evaluation.

        Example:
            >>> table = StepTable.ddpm(cosine(250), steps=250, final_alpha_cumprod=cosine_start())
            >>> table = table.with_timesteps(cosine(250).logit().flip(0).tolist())
        """
        told = tuple(float(timestep) for timestep in timesteps)
        if len(told) != len(self):
            raise ValueError(f"timesteps must be {len(self)}, one for each evaluation, got {len(told)}")
        if any(map(math.isnan, told)):
            raise ValueError(f"timesteps must be numbers, got {list(told)}")
        rows = self.rows.clone()
        rows[:, COLUMNS.index("timestep")] = torch.tensor(told, dtype=torch.float64, device="cpu")
        return StepTable(rows, told, self.learned_variance, self.initial_sigma)

    @classmethod
    def ddpm(
        cls,
        alphas_cumprod: Tensor,
        *,
        steps: int | str | Sequence[int],
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed_small",
        spacing: str = "leading",
        offset: int = 0,
        final_alpha_cumprod: float = 1.0,
    ) -> StepTable:
        """Ancestral sampling (DDPM, arXiv 2006.11239, equation 7); no noise at timestep 0.

        Args:
            alphas_cumprod: (n,), from a schedule. Of a float32 one, such as a diffusers scheduler's, quotients are
                rounded as diffusers rounds them.
            steps: how many of the n timesteps to visit; or the timesteps themselves, noisiest first; or the name of one
                of DeepFloyd IF's lists, such as "fast27".
            prediction: what the model's output is: "epsilon", "v" or "x0".
            variance: "fixed_small" (the posterior's), "fixed_large" (β) or "learned_range" (between the two).
            spacing, offset: see `spaced_timesteps`.
            final_alpha_cumprod: where the last step ends; 1 is a clean picture.

        Raises:
            ValueError: an unknown prediction, variance or spacing, or steps out of range.

        Example:
            >>> len(StepTable.ddpm(squaredcos_cap_v2(1000), steps=50, prediction="v"))
            50
        """
        levels = preserving.visited(alphas_cumprod, steps, spacing, offset, final_alpha_cumprod)
        rows = preserving.ddpm(levels, prediction, variance)
        return cls.of_rows(rows, learned_variance=variance == "learned_range")

    @classmethod
    def ddim(
        cls,
        alphas_cumprod: Tensor,
        *,
        steps: int | str | Sequence[int],
        prediction: Prediction = "epsilon",
        eta: float = 0.0,
        spacing: str = "leading",
        offset: int = 0,
        clipped_epsilon: bool = False,
        final_alpha_cumprod: float = 1.0,
    ) -> StepTable:
        """Implicit sampling (DDIM, arXiv 2010.02502, equation 12); deterministic for eta 0.

        A number of steps spaces them as diffusers does: each goes n // steps timesteps down, wherever the next one is.

        Args:
            alphas_cumprod, steps, prediction, spacing, offset, final_alpha_cumprod: as for `ddpm`.
            eta: 0 for the deterministic sampler, 1 for the noise of DDPM.
            clipped_epsilon: take the noise from the thresholded x0 (Imagen) instead of the raw output (diffusers).

        Raises:
            ValueError: as for `ddpm`, or eta outside [0, 1].
        """
        levels = preserving.visited(alphas_cumprod, steps, spacing, offset, final_alpha_cumprod, strided=True)
        return cls.of_rows(preserving.ddim(levels, prediction, eta, clipped_epsilon))

    @classmethod
    def dpm_solver_pp(
        cls,
        alphas_cumprod: Tensor,
        *,
        steps: int | str | Sequence[int],
        prediction: Prediction = "epsilon",
        order: int = 2,
        sde: bool = False,
        spacing: str = "linspace",
        offset: int = 0,
        solver_type: str = "midpoint",
        karras: bool = False,
        rounding: str = "nearest",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigma: str = "zero",
    ) -> StepTable:
        """DPM-Solver++ (arXiv 2211.01095) of order 1, or 2 as a multistep method ("2M"), and their stochastic forms.

        Args:
            alphas_cumprod, steps, prediction, offset: as for `ddpm`.
            order: 1 or 2; the second reads the previous evaluation's x0. The first step is of order 1.
            sde: solve the stochastic equation ("2M-SDE"), which adds noise at every step.
            spacing: "linspace", "leading" or "trailing", of diffusers' multistep solvers: the first two leave timestep
                0 out, and take less than n steps.
            solver_type: "midpoint" or "heun": how the second order is corrected.
            karras: space the noise levels as Karras et al. do, between those of the first and last timestep, whatever
                the spacing.
            rounding: of the timesteps that karras finds for its levels: "nearest", or "down" as diffusers does for its
                squaredcos_cap_v2.
            lower_order_final: take the last of less than 15 steps in order 1; euler_at_final: that of any number.
            final_sigma: "zero" (a clean picture) or "sigma_min" (timestep 0's noise).

        Raises:
            ValueError: as for `ddpm`, or an order, solver_type, rounding or final_sigma that there is not.
        """
        rows = preserving.dpm_solver_pp(
            alphas_cumprod,
            steps,
            prediction,
            order=order,
            sde=sde,
            spacing=spacing,
            offset=offset,
            solver_type=solver_type,
            karras=karras,
            rounding=rounding,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
            final_sigma=final_sigma,
        )
        return cls.of_rows(rows)

    @classmethod
    def euler(
        cls,
        alphas_cumprod: Tensor,
        *,
        steps: int | str | Sequence[float],
        prediction: Prediction = "epsilon",
        spacing: str = "linspace",
        offset: int = 0,
        karras: bool = False,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = float("inf"),
        churn_noise: float = 1.0,
        final_sigma: str = "zero",
    ) -> StepTable:
        """Euler steps of the probability flow in noise levels σ (EDM, arXiv 2206.00364), with diffusers' churn.

        The sample is x0 + σ ε: its input scale is 1 / √(σ² + 1), the first sample has standard deviation
        `initial_sigma`, and the timesteps may fall between those of training.

        Args:
            alphas_cumprod, steps, prediction, offset: as for `ddpm`.
            spacing: "linspace", "leading" or "trailing".
            karras: space the noise levels as Karras et al. do.
            churn, churn_min, churn_max, churn_noise: S_churn, S_tmin, S_tmax, S_noise of algorithm 2. As in diffusers,
                the model has seen the sample without the noise that churn adds.
            final_sigma: "zero" or "sigma_min".

        Raises:
            ValueError: as for `ddpm`.
        """
        levels = exploding.levels(alphas_cumprod, steps, spacing, offset, karras, final_sigma)
        rows = exploding.euler(levels, prediction, churn, churn_min, churn_max, churn_noise)
        return cls.of_rows(rows, initial_sigma=levels.initial_sigma)

    @classmethod
    def heun(
        cls,
        alphas_cumprod: Tensor,
        *,
        steps: int | str | Sequence[float],
        prediction: Prediction = "epsilon",
        spacing: str = "linspace",
        offset: int = 0,
        karras: bool = False,
    ) -> StepTable:
        """Heun's method in noise levels σ (EDM, arXiv 2206.00364, algorithm 1): 2 · steps − 1 evaluations.

        Every second row corrects: it reads the Euler iterate as sample, and the x0 that led there as previous_x0.

        Args:
            alphas_cumprod, steps, prediction, spacing, offset, karras: as for `euler`.

        Raises:
            ValueError: as for `ddpm`.
        """
        levels = exploding.levels(alphas_cumprod, steps, spacing, offset, karras, "zero")
        return cls.of_rows(exploding.heun(levels, prediction), initial_sigma=levels.initial_sigma)

    @classmethod
    def edm(
        cls,
        sigmas: Tensor,
        *,
        sigma_data: float = 0.5,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = float("inf"),
        churn_noise: float = 1.0,
    ) -> StepTable:
        """The stochastic sampler of EDM (arXiv 2206.00364, algorithm 2) for a model with its preconditioning.

        The noise that a step's churn adds is part of the noise of the row before, and of the first sample.

        Args:
            sigmas: (steps,) noise levels, falling; the last step ends at 0. See `karras_sigmas`.
            sigma_data: the standard deviation of the data, in the preconditioning.
            churn, churn_min, churn_max, churn_noise: S_churn, S_tmin, S_tmax, S_noise.

        Returns:
            2 · steps − 1 rows. The timesteps are ¼ ln σ, c_noise of the paper; the output is the raw network's.

        Raises:
            ValueError: sigmas are not positive and falling.
        """
        rows, initial_sigma = exploding.edm(sigmas, sigma_data, churn, churn_min, churn_max, churn_noise)
        return cls.of_rows(rows, initial_sigma=initial_sigma)

    @classmethod
    def of_rows(cls, rows: Sequence[Row], learned_variance: bool = False, initial_sigma: float = 1.0) -> StepTable:
        """The table of rows that have every column of `COLUMNS` by name; for solvers that have no builder here."""
        values = [[row[column] for column in COLUMNS] for row in rows]
        stacked = torch.tensor(values, dtype=torch.float64, device="cpu")
        timesteps = tuple(int(t) if float(t).is_integer() else float(t) for t in (row["timestep"] for row in rows))
        return cls(stacked.reshape(-1, len(COLUMNS)), timesteps, learned_variance, float(initial_sigma))
