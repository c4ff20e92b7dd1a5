"""A look at a generator in training: a sheet of samples, distances from the real images, and a stop if it diverges."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events

from medkd.data.atomic import atomic_write
from medkd.data.picture_grid import as_pixels, picture_grid
from medkd.engine.method import Method
from medkd.engine.processes import is_main_process
from medkd.engine.trainer import MethodTrainer
from medkd.errors import ConfigError, TrainingError
from medkd.metrics.synthesis import density_and_coverage, fid, kid
from medkd.nets.random_features import RandomFeatures

logger = logging.getLogger(__name__)

SHEETS = "samples"
LAST_GOOD_FILE = "last_good_generator.pt"
_LOOKS_FILE = "looks.json"
_AT_ONCE = 64


class SynthesisSamples:
    """Draw a sheet of generated images each epoch, measure them, and stop a generator that diverged.

    Writes ``samples/epoch-<n>.png`` to the run folder: for every class a row of real and a row of generated images,
    always of the same noise. Logs ``fid``, ``kid``, ``density`` and ``coverage`` against the real images in the
    features of a fixed random network, and ``diversity``, the standard deviation of generated over that of real pixels.

    A look is bad if a number is not finite, the diversity is below ``least_diversity``, or FID is above ``worst_fid``
    times the best one. After ``patience`` bad looks in a row, or when training fails, the averaged generator of the
    last good look (kept in ``last_good_generator.pt``) is put back, and training stops. List it before
    :class:`~medkd.engine.MetricsLog` and :class:`~medkd.engine.Checkpoints`.

    Args:
        run_dir: the run folder; made if absent.
        real: real training images without augmentation: items with image (3, H, W) in [-1, 1] and label, at least two
            of every class.
        names: of the classes.
        columns: images in a row of the sheet.
        every_epochs: look at the end of every so many epochs, and at the last.
        most: images measured of each kind, at most.
        least_diversity: below it the generator counts as collapsed.
        worst_fid: above this multiple of the best FID it counts as diverged.
        patience: bad looks in a row before stopping.
        seed: of the noise.

    Attributes:
        measures: of the last look.

    Raises:
        ConfigError: If images and classes do not fit each other.
    """

    def __init__(
        self,
        run_dir: str | Path,
        real: Any,
        *,
        names: Sequence[str],
        columns: int = 8,
        every_epochs: int = 1,
        most: int = 500,
        least_diversity: float = 0.1,
        worst_fid: float = 5.0,
        patience: int = 3,
        seed: int = 0,
    ) -> None:
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:most].tolist()
        items = [real[index] for index in order]
        self.label = torch.tensor([int(item["label"]) for item in items], dtype=torch.int64)
        counts = torch.bincount(self.label, minlength=len(names)).tolist()
        if len(counts) != len(names) or min(counts) < 2:
            raise ConfigError(
                "SynthesisSamples",
                f"of the {len(names)} classes there are {counts} images",
                "give at least two labeled images of every class",
            )
        self.run_dir = Path(run_dir)
        self.image = torch.stack([torch.as_tensor(item["image"]).as_subclass(torch.Tensor).float() for item in items])
        self.shown = {value: self.image[self.label == value][:columns] for value in range(len(names))}
        self.names = tuple(names)
        self.columns = columns
        self.every_epochs = every_epochs
        self.least_diversity = least_diversity
        self.worst_fid = worst_fid
        self.patience = patience
        self.seed = seed
        self.features = RandomFeatures(self.image.shape[1])
        self.measures: dict[str, float] = {}
        self._looks: list[dict[str, float]] = []

    def attach(self, trainer: MethodTrainer) -> None:
        """Register on a trainer; with several processes only the first one looks."""
        if is_main_process():
            trainer.add_event_handler(Events.STARTED, self._start)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._look)
            trainer.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, trainer: MethodTrainer) -> None:
        (self.run_dir / SHEETS).mkdir(parents=True, exist_ok=True)
        file = self.run_dir / SHEETS / _LOOKS_FILE
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() and trainer.state.iteration else []
        # What came after the checkpoint will be looked at again.
        self._looks = [look for look in before if look["iteration"] <= trainer.state.iteration]

    def _look(self, trainer: MethodTrainer) -> None:
        if trainer.state.epoch % self.every_epochs and not trainer.finished:
            return
        method = trainer.method
        mode = method.training
        method.eval()
        shown, made = self._generate(method, trainer.state.device)
        method.train(mode)
        with atomic_write(self.run_dir / SHEETS / f"epoch-{trainer.state.epoch:04d}.png", "wb") as file:
            file.write(
                picture_grid([as_pixels(row) for value in self.shown for row in (self.shown[value], shown[value])])
            )
        self.measures = self._measured(made)
        trainer.state.metrics.update(self.measures)
        is_good = self._is_good(self.measures)
        finite = {name: value for name, value in self.measures.items() if math.isfinite(value)}
        self._looks.append({"iteration": trainer.state.iteration, "good": float(is_good), **finite})
        with atomic_write(self.run_dir / SHEETS / _LOOKS_FILE) as file:
            json.dump(self._looks, file)
        if is_good:
            state = {name: value.detach().cpu().contiguous() for name, value in method.deployed.state_dict().items()}
            with atomic_write(self.run_dir / LAST_GOOD_FILE, "wb") as file:
                torch.save(state, file)
        elif len(self._looks) >= self.patience and not any(look["good"] for look in self._looks[-self.patience :]):
            self._stop(trainer)

    @torch.no_grad()
    def _generate(self, method: Method, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
        codes = getattr(method, "codes", None)
        if codes is None:
            raise ConfigError("SynthesisSamples", f"{type(method).__name__} generates nothing", "use it with HistoGAN")
        generator = torch.Generator(device=device).manual_seed(self.seed)

        def images(label: torch.Tensor) -> torch.Tensor:
            code = codes(label.to(device), generator)
            return torch.cat([method.deployed(part).float().cpu() for part in code.split(_AT_ONCE)])

        shown = [images(torch.full((self.columns,), value)) for value in range(len(self.names))]
        return shown, images(self.label)

    @torch.no_grad()
    def _measured(self, made: torch.Tensor) -> dict[str, float]:
        names = ("fid", "kid", "density", "coverage", "diversity")
        if not bool(torch.isfinite(made).all()):
            return dict.fromkeys(names, math.nan)
        real, generated = (
            torch.cat([self.features(part) for part in image.split(_AT_ONCE)]) for image in (self.image, made)
        )
        density, coverage = density_and_coverage(real, generated, neighbors=min(5, len(real) - 1))
        spread = [
            float(torch.stack([image[self.label == value].std(dim=0).mean() for value in self.label.unique()]).mean())
            for image in (self.image, made)
        ]
        distance = kid(real, generated, resamples=2).value
        values = (fid(real, generated), distance, density, coverage, spread[1] / max(spread[0], 1e-8))
        return dict(zip(names, values, strict=True))

    def _is_good(self, measures: dict[str, float]) -> bool:
        best = min((look["fid"] for look in self._looks if look["good"]), default=math.inf)
        return (
            all(math.isfinite(value) for value in measures.values())
            and measures["diversity"] >= self.least_diversity
            and measures["fid"] <= self.worst_fid * best
        )

    def _stop(self, trainer: MethodTrainer) -> None:
        described = ", ".join(f"{name} {value:.3g}" for name, value in self.measures.items())
        if not self._restore(trainer):
            raise TrainingError(
                f"iteration {trainer.state.iteration}",
                f"the generator never made usable images ({described})",
                "look at the sample sheets, lower the learning rates or give more images",
            )
        logger.warning(
            "the generator diverged (%s): stopping at iteration %d with the last good one, of iteration %d",
            described, trainer.state.iteration, self._last_good(),
        )  # fmt: skip
        trainer.stopped_early = True
        trainer.terminate()

    def _fail(self, trainer: MethodTrainer, error: BaseException) -> None:
        if isinstance(error, TrainingError) and self._restore(trainer):
            path = self.run_dir / LAST_GOOD_FILE
            logger.warning("training failed; the last good generator, of iteration %d, is %s", self._last_good(), path)

    def _last_good(self) -> int:
        return int(max((look["iteration"] for look in self._looks if look["good"]), default=0))

    def _restore(self, trainer: MethodTrainer) -> bool:
        path = self.run_dir / LAST_GOOD_FILE
        if not self._last_good() or not path.is_file():
            return False
        trainer.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return True
