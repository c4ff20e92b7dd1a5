"""A look at a translator in training: a few slices, their translations, and what comes back of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ignite.engine import Events
from torch.utils.data import Dataset

from medkd.data.atomic import atomic_write
from medkd.data.translate_slices import translate_slices
from medkd.engine.processes import is_main_process
from medkd.engine.trainer import MethodTrainer
from medkd.engine.translation import TranslationMethod
from medkd.errors import ConfigError

SAMPLES_FILE = "translations.npz"
DIRECTIONS = ("to_target", "to_source")


class TranslationSamples:
    """Translate middle slices there and back with the averaged generators; log the cycle error and keep the pictures.

    Writes ``translations.npz`` to the run folder, for the report: for every sample ``to_target_<n>`` (or
    ``to_source_<n>``), the image, its translation and the translation back as (3, H, W) float16 in [-1, 1], turned as
    they are displayed; ``cases_<direction>`` and ``domains``. Logs ``cycle_mae_source`` and ``cycle_mae_target``, the
    mean absolute difference of the samples from their way there and back, of 2. List it before
    :class:`~medkd.engine.MetricsLog`.

    Args:
        run_dir: the run folder; made if absent.
        source: items of the source domain, ``image`` (C, X, Y, Z), scaled as for training.
        target: items of the target domain.
        domains: what source and target are called.
        every_epochs: look at the end of every so many epochs, and at the last.
        samples: of each domain.
        translator: the method with the generators, where the trained method holds one; by default that method itself.
    """

    def __init__(
        self,
        run_dir: str | Path,
        source: Dataset[Any],
        target: Dataset[Any],
        *,
        domains: Sequence[str] = ("source", "target"),
        every_epochs: int = 1,
        samples: int = 4,
        translator: TranslationMethod | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.source = source
        self.target = target
        self.domains = tuple(domains)
        self.every_epochs = every_epochs
        self.samples = samples
        self.translator = translator

    def attach(self, trainer: MethodTrainer) -> None:
        """Register on a trainer; with several processes only the first one looks."""
        if is_main_process():
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._look)

    def _look(self, trainer: MethodTrainer) -> None:
        if trainer.state.epoch % self.every_epochs and not trainer.finished:
            return
        method = self.translator or trainer.method
        if not isinstance(method, TranslationMethod):
            raise ConfigError("TranslationSamples", f"{type(method).__name__} translates nothing", "give a translator")
        kept: dict[str, Any] = {"domains": np.array(self.domains)}
        for domain, dataset, there, back in (
            ("source", self.source, "to_target", "to_source"),
            ("target", self.target, "to_source", "to_target"),
        ):
            errors, cases = [], []
            for number, (case, image, upright) in enumerate(_middle_slices(dataset, self.samples)):
                image = image.to(trainer.state.device)
                translated = translate_slices(image, method.ema.get_submodule(there))
                returned = translate_slices(translated, method.ema.get_submodule(back))
                errors.append((returned - image).abs().mean())
                cases.append(case)
                shown = torch.cat([part[:1, :, :, 0] for part in (image, translated, returned)])
                kept[f"{there}_{number}"] = _as_displayed(shown.cpu().numpy(), upright=upright)
            kept[f"cases_{there}"] = np.array(cases, dtype=np.str_)
            if errors:
                trainer.state.metrics[f"cycle_mae_{domain}"] = float(torch.stack(errors).mean())
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.run_dir / SAMPLES_FILE, "wb") as file:
            np.savez_compressed(file, **kept)


def _middle_slices(dataset: Any, count: int) -> list[tuple[str, torch.Tensor, bool]]:
    """Case, middle slice (C, X, Y, 1), and whether its axes are known to run to right and front."""
    found = []
    wanted = min(count, len(dataset))
    for place in range(wanted):
        item = dataset[place * len(dataset) // wanted]
        volume = item["image"]
        middle = volume.shape[-1] // 2
        plain = torch.as_tensor(volume).as_subclass(torch.Tensor)[..., middle : middle + 1].float()
        affine = getattr(volume, "affine", None)
        upright = affine is not None and bool((torch.diagonal(affine)[:3] > 0).all())
        found.append((str(item.get("case", place)), plain, upright))
    return found


def _as_displayed(planes: npt.NDArray[Any], *, upright: bool) -> npt.NDArray[np.float16]:
    """(3, X, Y) → (3, H, W), rows downward; with known axes the patient's front at the top, the right at the left."""
    turned = planes.transpose(0, 2, 1)
    return (turned[:, ::-1, ::-1] if upright else turned).astype(np.float16)
