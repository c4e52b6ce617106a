"""The training loop: AdamW, an average of the weights, checkpoints that resume to the same losses to the bit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import read_json, to_dict
from ..errors import CheckpointError, ConfigError, UserError
from ..files import atomic_directory, atomic_file, check_writable, recover_directory
from .config import TrainConfig
from .emoji.dataset import EmojiDataset
from .samples import save_sample_grid
from .stages import STAGES, DiffusionStage, Stage
from .state_file import TENSORS, open_state

CHECKPOINT = "checkpoint"
LOSSES = "losses.jsonl"
_DROPOUT = 1 << 40  # keeps the seeds of dropout apart from those of batches

# What a resumed run may change: it does not decide the losses, but for steps, of which it warns.
_RUNNING = ("log_every", "sample_every", "checkpoint_every", "sample_prompts", "device", "threads")
_FREE = frozenset(("out", "data", "initialize_from", "steps", *_RUNNING))


def train(
    config: str | TrainConfig,
    *,
    overrides: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Train one stage and return the directory that holds its checkpoint, losses and sample grids.

    Args:
        config: a TOML file, the name of a configuration that ships with the package, or a `TrainConfig`.
        overrides: "key=value" changes to it.
        out: directory to write to, instead of the configuration's.
        resume: continue from the checkpoint there; without it a directory that holds one is an error.
        progress: show a progress bar.

    Raises:
        UserError: the configuration or the data set cannot be used, the directory holds a run already, or `resume`
            finds none or one of another configuration.
        OutputError: the directory cannot be written.

    Example:
        >>> train("emoji-base", overrides=["steps=100"])  # doctest: +SKIP
    """
    if not isinstance(config, TrainConfig):
        config = TrainConfig.load(config, overrides)
    elif overrides:
        raise ConfigError("overrides go with a configuration's name or file, not with a TrainConfig")
    config = dataclasses.replace(config, out=os.fspath(out or config.out))
    directory = Path(config.out)
    recover_directory(directory / CHECKPOINT)
    has_checkpoint = (directory / CHECKPOINT).is_dir()
    if has_checkpoint and not resume:
        raise UserError(f"{directory} holds a run already: resume it (--resume), or choose another directory (--out)")
    if resume and not has_checkpoint:
        raise CheckpointError(f"nothing to resume: {directory / CHECKPOINT} does not exist")
    dataset = EmojiDataset(config.data)
    check_writable(directory / LOSSES)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    run = TrainingRun(config, STAGES[config.stage](config, dataset))
    if resume:
        run.load(directory / CHECKPOINT)
    else:
        for other in config.initialize_from:
            run.start_from(Path(other) / CHECKPOINT)
    run.fit(directory, progress=progress)
    return directory


class TrainingRun:
    """A stage with its optimizer and averaged weights, at some step."""

    def __init__(self, config: TrainConfig, stage: Stage) -> None:
        self.config, self.stage, self.step = config, stage, 0
        stage.modules.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.names, self.parameters = zip(*stage.modules.named_parameters(), strict=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            [p for p in self.parameters if p.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def fit(self, directory: Path, *, progress: bool) -> None:
        """Train from the current step to the last; checkpoints, the log and sample grids go to `directory`."""
        config = self.config
        recent: deque[float] = deque(maxlen=config.log_every)
        bar = tqdm(total=config.steps, initial=self.step, disable=not progress, desc=config.stage, unit="step")
        with bar, _LossLog(directory / LOSSES, self.step) as log:
            while self.step < config.steps:
                loss = self.train_step()
                log.write(self.step, loss)
                recent.append(loss)
                bar.update()
                if self.step % config.log_every == 0:
                    bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
                last = self.step == config.steps
                if last or self.step % config.checkpoint_every == 0:
                    log.flush()
                    self.save(directory / CHECKPOINT)
                if isinstance(self.stage, DiffusionStage) and (last or self.step % config.sample_every == 0):
                    save_sample_grid(self.stage, self.averaged_modules(), directory / f"samples-{self.step:06d}.png")

    def train_step(self) -> float:
        """One optimizer step; returns the loss. Raises UserError if it is not finite."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.stage.modules.train()
        torch.manual_seed(_DROPOUT + config.seed * 1_000_003 + self.step)  # a resumed run drops what the whole one does
        with torch.autocast(self.stage.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = self.stage.loss(self.step)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} at step {self.step}: lower learning_rate, or use precision = 'fp32'")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, config.gradient_clip)
        self.optimizer.step()
        self.step += 1
        # The average starts short and grows to its full memory, so that early samples are not the random start.
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return value

    def averaged_modules(self) -> nn.ModuleDict:
        """A copy of the stage's modules that holds the averaged weights, in evaluation mode."""
        modules = copy.deepcopy(self.stage.modules).eval().requires_grad_(False)
        for parameter, average in zip(modules.parameters(), self.average, strict=True):
            parameter.copy_(average)
        return modules

    def save(self, path: Path) -> None:
        """Write weights, averages and optimizer state, in one step: a killed run leaves the previous checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = average
            moments = self.optimizer.state.get(parameter)  # none of what is frozen, or reaches no loss
            if moments:
                tensors[f"first_moment.{name}"] = moments["exp_avg"]
                tensors[f"second_moment.{name}"] = moments["exp_avg_sq"]
        state = {"step": self.step, "config": to_dict(self.config), "dataset": self.stage.dataset.fingerprint()}
        with atomic_directory(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / TENSORS)
            (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged, or belongs to a run of another configuration or data set.
        """
        state = read_json(path / "state.json")
        step = state.get("step")
        if not isinstance(step, int) or step < 0 or not isinstance(state.get("config"), dict):
            raise CheckpointError(f"{path / 'state.json'} is damaged: it needs a step and a config")
        self._check_same_run(state, path)
        with open_state(path, "resume from") as file:
            for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
                file.copy(f"weight.{name}", parameter)
                file.copy(f"average.{name}", average)
                if parameter.requires_grad and f"first_moment.{name}" in file.names:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(step), device=parameter.device),
                        "exp_avg": file.copy(f"first_moment.{name}", torch.empty_like(parameter)),
                        "exp_avg_sq": file.copy(f"second_moment.{name}", torch.empty_like(parameter)),
                    }
        self.step = step

    def start_from(self, path: Path) -> None:
        """Take the averaged weights of another run for the parameters that both have.

        Raises:
            CheckpointError: it cannot be read, has none of these parameters, or one of another shape.
        """
        pairs = zip(self.parameters, self.average, strict=True)
        mine = {f"average.{name}": pair for name, pair in zip(self.names, pairs, strict=True)}
        with open_state(path, "start from") as file:
            shared = sorted(mine.keys() & file.names)
            for name in shared:
                for tensor in mine[name]:
                    file.copy(name, tensor)
        if not shared:
            raise CheckpointError(f"cannot start from {path}: it has none of this run's parameters")

    def _check_same_run(self, state: dict, path: Path) -> None:
        """What decides the losses must not change under a run; what does not (how often to log) may."""
        saved, mine = state["config"], to_dict(self.config)
        changed = sorted(key for key in mine if key not in _FREE and mine[key] != saved.get(key))
        if changed:
            raise CheckpointError(f"{path} is of another configuration: {', '.join(changed)} differ")
        if state.get("dataset", self.stage.dataset.fingerprint()) != self.stage.dataset.fingerprint():
            raise CheckpointError(f"{path} was trained on another data set than {self.config.data}")
        if saved.get("steps") != mine["steps"]:
            warnings.warn(
                f"steps changed from {saved.get('steps')} to {mine['steps']}: the learning rate's schedule follows",
                stacklevel=2,
            )


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear rise over the warm-up, then half a cosine down to the final rate at the last step."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))
    return rise * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * fall)


class _LossLog:
    """One JSON object a line: step and loss. On resuming, what came after the checkpoint is cut off."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        with atomic_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines[:step]), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, loss: float) -> None:
        self.file.write(json.dumps({"step": step, "loss": loss}) + "\n")

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> _LossLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
