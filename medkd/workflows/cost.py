"""``medkd profile``: what several bundles cost, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medkd.data.atomic import atomic_write
from medkd.data.volumes import read_volume
from medkd.deploy.bundle import load_bundle
from medkd.deploy.profile import Cost, profile_bundles
from medkd.errors import ConfigError
from medkd.workflows.devices import choose_device


def profile_models(
    models: Sequence[str | Path],
    *,
    image: str | Path | None = None,
    out: str | Path | None = None,
    rounds: int = 7,
    device: str = "auto",
    trust: str | None = None,
) -> list[Cost]:
    """Measure bundles side by side on one real image.

    Args:
        models: bundle folders, or run folders with one.
        image: the image; MNI152 by default.
        out: a picture of parameters against time per volume, if wanted.
        rounds: timed repetitions.
        device: auto, cpu or cuda[:N].
        trust: hash of a bundle whose code is beyond the allow-list.

    Raises:
        ConfigError, InputError: a bundle or the image cannot be used.
    """
    if trust is not None and len(models) > 1:
        raise ConfigError("--trust", "is the hash of one bundle", "profile one model at a time")
    chosen = choose_device(device)
    bundles = [load_bundle(model, trust=trust, device=chosen) for model in models]
    costs = profile_bundles(bundles, image=None if image is None else read_volume(image), rounds=rounds)
    if out is not None:
        _draw(costs, Path(out))
    return costs


def pareto_front(costs: Sequence[Cost]) -> list[Cost]:
    """The models that no other beats in both parameters and time per volume."""
    return [
        cost
        for cost in costs
        if not any(
            other.parameters <= cost.parameters
            and other.volume_ms <= cost.volume_ms
            and (other.parameters, other.volume_ms) != (cost.parameters, cost.volume_ms)
            for other in costs
        )
    ]


def _draw(costs: Sequence[Cost], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = sorted(pareto_front(costs), key=lambda cost: cost.parameters)
    axes.plot([c.parameters for c in front], [c.volume_ms for c in front], color="0.75", zorder=1)
    axes.scatter([c.parameters for c in costs], [c.volume_ms for c in costs], color="#2b6cb0", zorder=2)
    for cost in costs:
        axes.annotate(cost.name, (cost.parameters, cost.volume_ms), xytext=(6, 4), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=f"ms per volume ({costs[0].device})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.3, y=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)
