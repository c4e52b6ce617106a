"""The cascade: text encoder, base U-Net, super-resolution U-Nets (Imagen, arXiv 2205.11487)."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import from_dict, read_json, to_dict
from ..diffusion.noise import AUGMENTATION, Noise
from ..diffusion.sampling import sample_loop
from ..errors import CheckpointError
from ..files import atomic_directory
from ..ops._checks import is_integer
from ..reference.guidance import DynamicThreshold
from . import checkpoint
from .cascade_config import ImagenConfig, StageConfig, StagePlan, check_interval
from .guided import GuidedUNet
from .t5 import T5Encoder
from .t5.checkpoint import refuse_to_replace_others as refuse_to_replace_other_text_encoders
from .t5.tokenizer import check_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1  # of the directory that save_pretrained writes
CARD = "README.md"  # of the model, written by hand


class Imagen(nn.Module):
    """A cascade of diffusion models from prompts to pictures.

    Args:
        config: the stages, smallest pictures first.
        text_encoder: what reads the prompts; its width is the U-Nets' text_dim.

    Example:
        >>> model = Imagen.from_pretrained("emoji")
        >>> model.sample(["a cute cat", "一只可爱的猫咪"], seed=1, progress=False)[0].size
        (128, 128)
    """

    def __init__(self, config: ImagenConfig, text_encoder: T5Encoder) -> None:
        super().__init__()
        width = text_encoder.config.d_model
        for stage in config.stages:
            if stage.text_dim not in (None, width):
                raise ValueError(
                    f"stage {stage.name!r} reads text of width {stage.text_dim}, the encoder gives {width}"
                )
        self.config = config
        self.text_encoder = text_encoder
        self.unets = nn.ModuleDict({stage.name: stage.build() for stage in config.stages})

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
    ) -> Imagen:
        """The cascade that `save_pretrained` wrote, in evaluation mode.

        Args:
            directory: its path, or the name of a cascade that ships with the package: "emoji", which stands for that
                cascade even where a directory has the same name (that one is "./emoji", or a `Path`).
            dtype: of the weights; None leaves them as they are stored.
            device: where they go; the CPU if None.

        Raises:
            CheckpointError: a file or tensor is missing or does not fit; the message names it.
            TypeError: dtype is not float64, float32, float16 or bfloat16.
        """
        checkpoint.check_dtype(dtype)
        path = _find(directory)
        values = read_json(path / "config.json")
        if values.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path / 'config.json'} is not a cascade of format {FORMAT}")
        try:
            config = from_dict(ImagenConfig, values, str(path / "config.json"))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        # All headers are checked before the first tensor is read: U-Nets on the meta device, then the text encoder.
        unets = {}
        for stage in config.stages:
            try:
                with torch.device("meta"):
                    unets[stage.name] = stage.build()
            except (ValueError, RuntimeError) as error:  # PyTorch's own, of sizes beyond every memory
                raise CheckpointError(f"{path / 'config.json'}: stage {stage.name!r}: {error}") from error
            checkpoint.check_module(unets[stage.name], path, stage.name)
        text_encoder = T5Encoder.from_pretrained(path / "text_encoder", dtype=dtype)
        try:
            with torch.device("meta"):
                model = cls(config, text_encoder)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        for name, unet in unets.items():
            checkpoint.load_module(unet, path, name, dtype)
            model.unets[name] = unet
        return model.to(device).eval().requires_grad_(False)

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write the cascade as a directory: config.json, one safetensors file per U-Net, and the text encoder in
        Hugging Face's layout.

        Args:
            directory: created, or replaced if it holds a cascade, whose README.md stays; it appears only once it is
                whole.
            dtype: of the stored weights; theirs if None.

        Raises:
            OutputError: it cannot be written, or holds something else.
            TypeError: dtype is not float64, float32, float16 or bfloat16.
        """
        directory = Path(directory)
        checkpoint.check_dtype(dtype)
        checkpoint.refuse_to_replace_others(directory, "a cascade", _written, kept=(CARD,))
        refuse_to_replace_other_text_encoders(directory / "text_encoder")
        with atomic_directory(directory) as folder:
            if (directory / CARD).is_file():
                shutil.copyfile(directory / CARD, folder / CARD)
            checkpoint.write_json(folder / "config.json", {"format": FORMAT, **to_dict(self.config)})
            for name, unet in self.unets.items():
                state = unet.state_dict()
                dtypes = dict.fromkeys(state, dtype) if dtype is not None else None
                checkpoint.write(folder, state, stem=name, dtypes=dtypes)
            self.text_encoder.save_pretrained(folder / "text_encoder", dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where the first U-Net is."""
        return next(self.unets.parameters()).device

    @torch.inference_mode()
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int | Sequence[int] | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        solver: str | None = None,
        threshold: str | DynamicThreshold | None = None,
        progress: bool = True,
        until: str | None = None,
    ) -> list[Image]:
        """Draw one picture per prompt, without dropout.

        Args:
            prompts: sentences; an empty one samples without text. Longer ones than the text length are cut, with a
                warning that says after which character.
            seed: prompt b gets the seed `seed + b`; or one seed per prompt. The seed fixes the picture, to rounding
                whatever else is in the batch.
            steps: evaluations of each stage's U-Net, or one number per stage; None takes the stages' own.
            guidance: classifier-free guidance scale of all stages, or one per stage; None takes the stages' own.
            guidance_interval: the lowest and highest noise level σ (noise over signal) at which to guide; steps outside
                of it take one evaluation instead of two. None guides at all.
            solver: for all stages: "ddpm", "ddim", or "dpm" for DPM-Solver++ 2M. None takes the stages' own; for stages
                whose number of steps is given here, `default_solver` of it.
            threshold: of all stages: "none", "static" or a `DynamicThreshold`; None takes the stages' own.
            progress: show a progress bar over all stages' steps.
            until: name of the stage to stop after; None runs them all.

        Raises:
            TypeError: prompts are not strings, or seed, steps, guidance or guidance_interval no numbers.
            ValueError: an argument is out of range, or there is not one value per stage or per prompt.
        """
        if isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping):
            prompts = list(prompts)
        prompts = check_prompts(prompts)
        plans = self.config.plan(steps=steps, guidance=guidance, solver=solver, threshold=threshold, until=until)
        interval = check_interval(guidance_interval)
        seeds = self._seeds(seed, len(prompts))
        with _evaluating(self):
            return to_pictures(self._run(plans, prompts, seeds, interval, progress))

    def _run(
        self,
        plans: list[StagePlan],
        prompts: list[str],
        seeds: list[int],
        guidance_interval: tuple[float, float] | None,
        progress: bool,
    ) -> Tensor:
        """The pictures (B, 3, H, W) of the last stage, in [−1, 1]; sampled in float32, by U-Nets in float64 in that."""
        exact = next(self.unets.parameters()).dtype == torch.float64
        dtype = torch.float64 if exact else torch.float32
        text, mask = self._encode(prompts)
        picture: Tensor | None = None
        total = sum(len(plan.table) for plan in plans)
        with tqdm(total=total, disable=not progress, unit="step") as bar:
            for number, plan in enumerate(plans):
                noise = Noise(seeds, self.device, dtype).of_stage(number)
                bar.set_description(f"{plan.stage.name} {plan.stage.size}×{plan.stage.size}")
                model = self._model(plan.stage, plan.guidance, text, mask, picture, noise)
                picture = sample_loop(
                    model,
                    plan.table,
                    noise,
                    (plan.stage.channels, plan.stage.size, plan.stage.size),
                    guidance=plan.guidance,
                    guidance_interval=guidance_interval,
                    threshold=plan.threshold,
                    on_step=bar.update,
                )
        assert picture is not None
        return picture

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Features and mask; an empty prompt is one without text."""
        features = self.text_encoder.encode(prompts, max_length=self.config.max_text_length)
        empty = torch.tensor([not prompt.strip() for prompt in prompts], dtype=torch.bool, device=features.mask.device)
        return features.features, features.mask & ~empty[:, None]

    def _model(
        self, stage: StageConfig, guidance: float, text: Tensor, mask: Tensor, low: Tensor | None, noise: Noise
    ) -> GuidedUNet:
        unet = self.unets[stage.name]
        if low is None:
            return GuidedUNet(unet, text, mask, guidance)
        # Noise-conditioning augmentation: noise at low resolution, then upsampling, and the U-Net is told how much.
        timestep = int(stage.augmentation * stage.train_timesteps)
        alpha = stage.alphas_cumprod()[timestep].item() if timestep else 1.0
        low = alpha**0.5 * low + (1 - alpha) ** 0.5 * noise(*low.shape[1:], use=AUGMENTATION)
        low = F.interpolate(low, size=(stage.size, stage.size), mode="bilinear", align_corners=False)
        level = torch.full((low.shape[0],), timestep, dtype=torch.long, device=low.device)
        return GuidedUNet(unet, text, mask, guidance, low=low, augmentation=level)

    @staticmethod
    def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
        if is_integer(seed):
            return [int(seed) + b for b in range(count)]  # type: ignore[arg-type]
        if isinstance(seed, str) or not isinstance(seed, Iterable):
            raise TypeError(f"seed must be an integer, or one per prompt, got {seed!r}")
        try:
            seeds = list(seed)
        except TypeError as error:  # a tensor without dimensions
            raise TypeError(f"seed must be an integer, or one per prompt, got {seed!r}") from error
        if len(seeds) != count:
            raise ValueError(f"seed must be one number, or one per prompt: {count}, got {len(seeds)}")
        if not all(map(is_integer, seeds)):
            raise TypeError(f"seed must be an integer, or one per prompt, got {seeds}")
        return [int(one) for one in seeds]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module then returns to the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _written(values: checkpoint.Values) -> tuple[str, ...]:
    """Patterns of the files of the cascade whose config.json this is; none if it is something else's."""
    stages = values.get("stages")
    if values.get("format") != FORMAT or not isinstance(stages, list):
        return ()
    names = [str(stage.get("name")) for stage in stages if isinstance(stage, dict)]
    weights = [pattern for name in names if name.isidentifier() for pattern in checkpoint.patterns_of(name)]
    return ("config.json", "text_encoder", *weights)


def _find(directory: str | os.PathLike[str]) -> Path:
    """The path of a cascade, or of one that ships with the package."""
    shipped = Path(str(resources.files(__package__) / "weights"))
    names = sorted(p.name for p in shipped.iterdir() if (p / "config.json").is_file()) if shipped.is_dir() else []
    if isinstance(directory, str) and directory in names:  # a Path drops the "./" that tells a directory from a name
        return shipped / directory
    if os.fspath(directory) and Path(directory).is_dir():
        return Path(directory)
    if not isinstance(directory, str):
        raise CheckpointError(f"no cascade {os.fspath(directory)!r}: not a directory")
    known = f"not one of {', '.join(names)}" if names else "no cascade ships with this installation"
    raise CheckpointError(f"no cascade {os.fspath(directory)!r}: not a directory, and {known}")


def to_pictures(x: Tensor) -> list[Image]:
    """(B, 3, H, W) in [−1, 1] to PIL images of 8 bits."""
    from PIL import Image

    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in levels]
