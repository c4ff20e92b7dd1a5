"""What the benchmarks over two modalities share: the tasks, one way to train, one way to score, one table.

Tasks (``load``):

- ``demo``: the embedded virtual patients in two contrasts, so that anyone can run it. Source T1, target T2; four
  labeled source patients, 12 more without labels, 16 target patients, 10 held-out target patients.
- ``ibsi_sts``: real CT and T1 MR of soft-tissue sarcomas, a tumor mask in each. Every patient has both; each is used
  in one modality only. Source MR, target CT. Seed s is fold s % 3: eight patients in CT are held out, eight train in
  CT, eight in MR, so that three seeds hold out every patient once.

A benchmark is a function from (task, seed, steps) to its arms, each trained only when its result is missing::

    def source_only(task: Task, seed: int, steps: int) -> tuple[Predictor, dict[str, Any]]:
        network = student(task)
        labeled = items(task.source.labeled, labels=True)
        facts = fit(Supervised(network), {"labeled": labeled}, task=task, steps=steps, seed=seed)
        return as_predictor(network), facts

    def arms(task: Task, seed: int, steps: int) -> Iterator[tuple[str, Callable[[], tuple[Predictor, dict[str, Any]]]]]:
        yield "source_only", partial(source_only, task, seed, steps)

    if __name__ == "__main__":
        main("uda", arms, heading="UDA baselines", pairs=[("dacs", "source_only")], seeds={"demo": 5}, …)

Every arm of a seed is one entry of ``benchmarks/results/<benchmark>_<task>/seed-<n>.json``, so that an interrupted run
goes on where it was; ``benchmarks/results/<benchmark>_<task>.json`` and ``.md`` are the summary.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from monai.data import Dataset, set_track_meta
from monai.transforms import Compose, RandFlipd, RandSpatialCropd, SpatialPadd
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import PolynomialLR

from medkd.data import Stream, Streams, demo_two_contrasts, read_datalist
from medkd.data.atomic import atomic_write
from medkd.data.volumes import read_label, read_volume
from medkd.engine import Method, MethodTrainer
from medkd.metrics import bootstrap_ci, paired_test, score_case

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
HU_WINDOW = (-160.0, 240.0)
KEYS = ("image", "label", "translated", "cycled")

Predictor = Callable[[torch.Tensor], np.ndarray]
"""(Z, 1, H, W) slices in [-1, 1] → (Z, H, W) integer labels."""


@dataclass(frozen=True)
class Scan:
    """One volume as slices: ``image`` (Z, 1, H, W) in [-1, 1], ``label`` (Z, 1, H, W) int64, spacing of (z, h, w)."""

    name: str
    patient: str
    image: torch.Tensor
    label: torch.Tensor
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Domain:
    """The volumes of one modality; no patient is in two of these lists, nor in another domain."""

    name: str
    labeled: list[Scan]
    unlabeled: list[Scan]  # their labels are for bounds and for the other direction, never for adaptation
    test: list[Scan] = field(default_factory=list)

    @property
    def train(self) -> list[Scan]:
        """All that may be trained on, labels aside."""
        return [*self.labeled, *self.unlabeled]


@dataclass(frozen=True)
class Task:
    """Labels in the source, the held-out patients in the target."""

    name: str
    title: str
    labels: dict[int, str]
    source: Domain
    target: Domain
    crop_px: tuple[int, int]
    input: str

    @property
    def classes(self) -> int:
        """Classes with background."""
        return len(self.labels)


def load(name: str, seed: int, data: Path = DATA) -> Task:
    """A task; the demo is the same for every seed, ibsi_sts is that seed's fold."""
    return {"demo": _demo, "ibsi_sts": _ibsi_sts}[name](seed, data)


def _demo(seed: int, data: Path) -> Task:
    with TemporaryDirectory() as folder:
        cases = read_datalist(demo_two_contrasts(folder))

        def scans(section: str, domain: str) -> list[Scan]:
            found = []
            for case in cases.cases(section):
                if case.domain != domain:
                    continue
                volume, label = read_volume(cases.resolve(case.image)), read_label(cases.resolve(str(case.label)))
                low, high = np.percentile(volume.array, (0, 99.5))
                image = np.clip((volume.array - low) / (high - low) * 2 - 1, -1, 1)
                found.append(_scan(cases.case_id(case), case.patient, image, label.array, volume.spacing_mm))
            return found

        return Task(
            name="demo",
            title="virtual patients made from the MNI152 MRI in two contrasts (simulated)",
            labels=cases.label_names,
            source=Domain("t1", scans("training", "t1"), scans("unlabeled", "t1")),
            target=Domain("t2", [], scans("unlabeled", "t2"), scans("test", "t2")),
            crop_px=(64, 64),
            input="axial slices at 2 mm, scaled to [-1, 1] by the volume's percentiles; 64 × 64 px crops in training, "
            "whole slices in the test",
        )


def _ibsi_sts(seed: int, data: Path) -> Task:
    root = data / "ibsi_sts"
    patients = sorted(path.name for path in root.iterdir() if (path / "CT_image.nii.gz").is_file())
    order = [patients[k] for k in np.random.default_rng([2026, seed // 3]).permutation(len(patients))]
    third = len(order) // 3
    fold = seed % 3
    order = order[fold * third :] + order[: fold * third]
    test, ct, mr = order[:third], order[third : 2 * third], order[2 * third :]

    def scan(patient: str, modality: str) -> Scan:
        volume = read_volume(root / patient / f"{modality}_image.nii.gz")
        label = read_label(root / patient / f"{modality}_mask.nii.gz").array
        low, high = HU_WINDOW if modality == "CT" else np.percentile(volume.array[volume.array > 0], (1, 99))
        image = np.clip((volume.array.astype(np.float32) - low) / (high - low) * 2 - 1, -1, 1)
        x, y = (size - size % 2 for size in image.shape[:2])
        blocks = (x // 2, 2, y // 2, 2, image.shape[2])
        image = image[:x, :y].reshape(blocks).mean(axis=(1, 3))
        label = (label[:x, :y].reshape(blocks).mean(axis=(1, 3)) >= 0.5).astype(np.uint8)
        spacing = volume.spacing_mm
        return _scan(f"{patient}_{modality}", patient, image, label, (spacing[0] * 2, spacing[1] * 2, spacing[2]))

    return Task(
        name="ibsi_sts",
        title="soft-tissue sarcoma, CT and T1 MR of different patients (real)",
        labels={0: "background", 1: "tumor"},
        source=Domain("MR_T1", [scan(patient, "MR_T1") for patient in mr], []),
        target=Domain("CT", [], [scan(p, "CT") for p in ct], [scan(patient, "CT") for patient in test]),
        crop_px=(48, 48),
        input="axial slices at 2 mm; CT window -160 to 240 HU, MR 1st to 99th percentile of the body, to [-1, 1]; "
        "48 × 48 px crops in training, whole slices in the test; masks scored at 2 mm",
    )


def _scan(
    name: str, patient: str, image: np.ndarray, label: np.ndarray, spacing_mm: tuple[float, float, float]
) -> Scan:
    """From (X, Y, Z) arrays."""
    slices = torch.from_numpy(np.ascontiguousarray(image.astype(np.float32).transpose(2, 0, 1)[:, None]))
    labels = torch.from_numpy(np.ascontiguousarray(label.astype(np.int64).transpose(2, 0, 1)[:, None]))
    return Scan(name, patient, slices, labels, (spacing_mm[2], spacing_mm[0], spacing_mm[1]))


def items(scans: Sequence[Scan], *, labels: bool, **extra: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """The slices of volumes as training items.

    Args:
        scans: volumes.
        labels: whether items carry the label.
        extra: key → function of a volume's (Z, 1, H, W) slices, for offline translations (``translated``, ``cycled``).
    """
    found = []
    for scan in scans:
        more = {key: function(scan.image) for key, function in extra.items()}
        for place in range(len(scan.image)):
            item = {"image": scan.image[place], "case": f"{scan.name}-{place}"}
            if labels:
                item["label"] = scan.label[place]
            found.append(item | {key: value[place] for key, value in more.items()})
    return found


def fit(
    method: Method,
    streams: Mapping[str, Sequence[Any]],
    *,
    task: Task,
    steps: int,
    seed: int,
    batch_size: int = 8,
    rates: Mapping[str, float] | float = 2e-3,
    betas: Mapping[str, tuple[float, float]] | None = None,
    optimizers: Mapping[str, Optimizer] | None = None,
    augment: bool = True,
) -> dict[str, float]:
    """Train a method for ``steps`` steps; Adam with poly decay for each role unless ``optimizers`` says otherwise.

    Args:
        method: the method.
        streams: stream name → items.
        task: gives the crop.
        steps: training steps.
        seed: of order, crops and the step's randomness.
        batch_size: of every stream.
        rates: learning rate of each role, or of all.
        betas: Adam's betas of a role; (0.9, 0.999) where absent.
        optimizers: built optimizers instead, without a schedule.
        augment: random left-right flips.

    Returns:
        Seconds per step and the last logged terms.
    """
    images = KEYS
    steps_of_augmentation = [
        SpatialPadd([*images], task.crop_px, constant_values=-1, allow_missing_keys=True),
        RandSpatialCropd([*images], task.crop_px, random_size=False, allow_missing_keys=True),
        *([RandFlipd([*images], prob=0.5, spatial_axis=0, allow_missing_keys=True)] if augment else []),
    ]
    transform = Compose([_PadLabel(task.crop_px), *steps_of_augmentation])
    chosen, schedules = optimizers, None
    if chosen is None:
        rate_of = rates if isinstance(rates, Mapping) else dict.fromkeys(method.roles, rates)
        chosen = {
            role: Adam(method.role_parameters(role), lr=rate_of[role], betas=(betas or {}).get(role, (0.9, 0.999)))
            for role in method.roles
        }
        schedules = {role: PolynomialLR(o, total_iters=steps, power=0.9) for role, o in chosen.items()}
    loader = Streams(
        length_of=next(iter(streams)),
        seed=seed,
        **{name: Stream(Dataset(list(found), transform), batch_size) for name, found in streams.items()},
    )
    trainer = MethodTrainer(
        "cuda" if torch.cuda.is_available() else "cpu", 1, loader, method, chosen, lr_schedulers=schedules,
        epoch_length=steps, channels_last=True, seed=seed, clip_norm=5.0,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.run()
    last = {name: float(value) for name, value in trainer.state.output.items()}
    return {"seconds_per_step": (time.perf_counter() - started) / steps, **last}


class _PadLabel:
    """Pad labels with background (0), where images are padded with -1."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.pad = SpatialPadd("label", size, constant_values=0, allow_missing_keys=True)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        padded: dict[str, Any] = self.pad(item)
        return padded


def as_predictor(network: nn.Module, *, multiple: int = 16) -> Predictor:
    """Whole slices through a network in eval mode, padded with -1 to a multiple of ``multiple`` px."""

    @torch.no_grad()
    def predict(slices: torch.Tensor) -> np.ndarray:
        was_training = network.training
        network.eval()
        logits = torch.cat([network(part) for part in _padded(slices, multiple).split(16)])
        network.train(was_training)
        return logits[..., : slices.shape[2], : slices.shape[3]].argmax(1).cpu().numpy()

    return predict


def through(network: nn.Module, *, multiple: int = 16) -> Callable[[torch.Tensor], torch.Tensor]:
    """Whole (Z, 1, H, W) slices through a translator in eval mode, for ``items(…, translated=through(generator))``."""

    @torch.no_grad()
    def translate(slices: torch.Tensor) -> torch.Tensor:
        network.eval()
        images = torch.cat([network(part) for part in _padded(slices, multiple).split(16)])
        return images[..., : slices.shape[2], : slices.shape[3]].cpu().contiguous()

    return translate


def _padded(slices: torch.Tensor, multiple: int) -> torch.Tensor:
    high, wide = (-size % multiple for size in slices.shape[2:])
    return torch.nn.functional.pad(slices, (0, wide, 0, high), value=-1.0)


def score(task: Task, predict: Predictor, scans: Sequence[Scan] | None = None) -> list[dict[str, Any]]:
    """Dice, surface Dice and HD95 (mm) of every test volume and class; the target's held-out patients by default."""
    rows = []
    for scan in task.target.test if scans is None else scans:
        prediction = predict(scan.image)
        for entry in score_case(prediction, scan.label[:, 0].numpy(), case=scan.name, patient=scan.patient,
                                labels=task.labels, spacing_mm=scan.spacing_mm):  # fmt: skip
            rows.append(
                {
                    "case": scan.name, "patient": scan.patient, "class": entry.class_index,
                    "dice": _number(entry.dice), "surface_dice": _number(entry.surface_dice),
                    "hd95": _number(entry.hd95), "missed": math.isinf(entry.hd95), "diagonal": entry.image_diagonal,
                }
            )  # fmt: skip
    return rows


def _number(value: float) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None


Arms = Callable[[Task, int, int], Iterator[tuple[str, Callable[[], tuple[Predictor, dict[str, Any]]]]]]
"""(task, seed, steps) → (arm's name, function that trains it and returns its predictor and facts)."""


def run_seed(name: str, arms: Arms, seed: int, steps: int, folder: Path, data: Path) -> None:
    """Train and score the arms of one seed that are not there yet."""
    torch.set_num_threads(1)
    set_track_meta(False)
    path = folder / f"seed-{seed}.json"
    done = json.loads(path.read_text()) if path.exists() else {"seed": seed, "steps": steps, "arms": {}}
    if done["steps"] != steps:
        raise SystemExit(f"{path}: computed with {done['steps']} steps; remove it or use --steps {done['steps']}")
    task = load(name, seed, data)
    for arm, train in arms(task, seed, steps):
        if arm in done["arms"]:
            continue
        started = time.perf_counter()
        torch.manual_seed(1000 + seed)
        predict, facts = train()
        facts["seconds"] = round(time.perf_counter() - started, 1)
        done["arms"][arm] = {"facts": facts, "cases": score(task, predict)}
        with atomic_write(path) as file:
            json.dump(done, file)


def summarize(
    task: Task, folder: Path, pairs: Sequence[tuple[str, str]], command: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Means with intervals of every arm, and the paired differences in Dice, over seeds and held-out patients."""
    seeds = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    names = list(dict.fromkeys(arm for seed in seeds for arm in seed["arms"]))
    seeds = [seed for seed in seeds if set(names) <= set(seed["arms"])]
    if not seeds:
        raise SystemExit(f"{folder}: no finished seed")
    table = {arm: _columns(seeds, arm) for arm in names}
    arms = {}
    for arm, columns in table.items():
        rows = {
            metric: _interval(bootstrap_ci(columns[metric], patients=columns["patient"], seeds=columns["seed"]))
            for metric in ("dice", "surface_dice", "hd95_penalised")
        }
        dice, seed_of, patient_of = (np.asarray(columns[key]) for key in ("dice", "seed", "patient"))
        class_of = np.asarray(columns["class"])
        per_patient = [np.nanmean(dice[patient_of == patient]) for patient in sorted(set(patient_of))]
        arms[arm] = {
            **rows,
            "missed": int(sum(columns["missed"])), "structures": len(columns["missed"]),
            "dice_per_seed": [round(float(np.nanmean(dice[seed_of == s["seed"]])), 4) for s in seeds],
            "dice_sd_patients": round(float(np.std(per_patient, ddof=1)), 4),
            "dice_per_class": {
                name: round(float(np.nanmean(dice[class_of == index])), 4)
                for index, name in task.labels.items() if index
            },
            "facts": seeds[0]["arms"][arm]["facts"],
        }  # fmt: skip
    differences = {}
    for a, b in pairs:
        if a in table and b in table:
            result = paired_test(
                table[a]["dice"], table[b]["dice"], patients=table[a]["patient"], seeds=table[a]["seed"]
            )
            differences[f"{a} - {b}"] = {
                "mean": round(result.mean_difference, 4), "low": round(result.low, 4), "high": round(result.high, 4),
                "wilcoxon_p": round(result.wilcoxon_p, 5), "permutation_p": round(result.permutation_p, 5),
            }  # fmt: skip
    return {
        "task": task.name, "title": task.title, "input": task.input, "command": command,
        "seeds": [seed["seed"] for seed in seeds], "steps": seeds[0]["steps"],
        "patients": len({p for p in table[names[0]]["patient"]}), "facts": dict(facts),
        "arms": arms, "paired_dice": differences,
    }  # fmt: skip


def _columns(seeds: Sequence[Mapping[str, Any]], arm: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        key: [] for key in ("dice", "surface_dice", "hd95_penalised", "missed", "class", "patient", "seed")
    }
    for seed in seeds:
        for row in seed["arms"][arm]["cases"]:
            columns["dice"].append(math.nan if row["dice"] is None else row["dice"])
            columns["surface_dice"].append(math.nan if row["surface_dice"] is None else row["surface_dice"])
            distance = row["diagonal"] if row["missed"] else row["hd95"]  # missing a structure never helps
            columns["hd95_penalised"].append(math.nan if distance is None else distance)
            columns["missed"].append(row["missed"])
            columns["class"].append(row["class"])
            columns["patient"].append(row["patient"])
            columns["seed"].append(seed["seed"])
    return columns


def _interval(interval: Any) -> dict[str, float]:
    return {"mean": round(interval.estimate, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def markdown(result: Mapping[str, Any], heading: str, titles: Mapping[str, str], notes: str = "") -> str:
    """One benchmark as a section of docs/results.md."""
    lines = [
        f"## {heading}: {result['title']}", "",
        f"{len(result['seeds'])} seeds, {result['steps']} steps per arm, {result['patients']} held-out patients. "
        f"{result['input']}. {' '.join(f'{key}: {value}.' for key, value in result['facts'].items())}", "",
        f"`{result['command']}`", "",
        "| arm | Dice | SD between patients | surface Dice | HD95 (mm, a missed structure counts the diagonal) "
        "| missed | Dice per class | Dice per seed |",
        "|---|---|---:|---|---|---:|---|---|",
    ]  # fmt: skip
    for arm, row in result["arms"].items():
        cells = [f"{row[m]['mean']:.3f} [{row[m]['low']:.3f}, {row[m]['high']:.3f}]" for m in ("dice", "surface_dice")]
        distance = row["hd95_penalised"]
        lines.append(
            f"| {titles.get(arm, arm.replace('_', ' '))} | {cells[0]} | {row['dice_sd_patients']:.3f} | {cells[1]} "
            f"| {distance['mean']:.1f} [{distance['low']:.1f}, {distance['high']:.1f}] "
            f"| {row['missed']} of {row['structures']} "
            f"| {', '.join(f'{name} {value:.2f}' for name, value in row['dice_per_class'].items())} "
            f"| {', '.join(f'{value:.3f}' for value in row['dice_per_seed'])} |"
        )
    lines += ["", "| paired difference in Dice | mean | 95 % interval | Wilcoxon p | permutation p | reading |"]
    lines += ["|---|---:|---|---:|---:|---|"]
    for name, pair in result["paired_dice"].items():
        a, b = name.split(" - ")
        reading = "better" if pair["low"] > 0 else "worse" if pair["high"] < 0 else "no difference shown"
        lines.append(
            f"| {titles.get(a, a.replace('_', ' '))} − {titles.get(b, b.replace('_', ' '))} | {pair['mean']:+.3f} "
            f"| [{pair['low']:+.3f}, {pair['high']:+.3f}] | {_p(pair['wilcoxon_p'])} | {_p(pair['permutation_p'])} "
            f"| {reading} |"
        )
    return "\n".join([*lines, *(["", notes] if notes else []), ""])


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def main(
    benchmark: str,
    arms: Arms,
    *,
    heading: str,
    pairs: Sequence[tuple[str, str]],
    titles: Mapping[str, str],
    seeds: Mapping[str, int],
    steps: Mapping[str, int],
    facts: Mapping[str, Any],
    notes: str = "",
    description: str = "",
) -> None:
    """Run the seeds that are missing, then write the summary as JSON and as a section for docs/results.md.

    Args:
        benchmark: name of the script, and of its results.
        arms: see ``Arms``; a module-level function, since seeds run in processes of their own.
        heading: of the section.
        pairs: arms to compare.
        titles: arm → words for the table.
        seeds: task → how many.
        steps: task → training steps of the segmenter in every arm.
        facts: further sentences about networks and optimizers.
        notes: Markdown below the table.
        description: of the command.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(seeds), default="demo")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds ibsi_sts")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--only-seed", type=int, help="run this seed alone, without a summary")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=2, help="seeds trained at once, one thread each")
    parser.add_argument("--report", action="store_true", help="only summarize what is there")
    options = parser.parse_args()
    folder = RESULTS / f"{benchmark}_{options.task}"
    folder.mkdir(parents=True, exist_ok=True)
    count = options.steps or steps[options.task]
    if options.only_seed is not None:
        run_seed(options.task, arms, options.only_seed, count, folder, options.data)
        return
    if not options.report:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(run_seed, options.task, arms, seed, count, folder, options.data)
                for seed in range(options.seeds or seeds[options.task])
            ]
            for job in jobs:
                job.result()
    command = f"python benchmarks/{re.sub('[^a-z_]', '', benchmark)}.py --task {options.task}"
    result = summarize(load(options.task, 0, options.data), folder, pairs, command, facts)
    with atomic_write(RESULTS / f"{folder.name}.json") as file:
        json.dump(result, file, indent=1)
    page = markdown(result, heading, titles, notes)
    with atomic_write(RESULTS / f"{folder.name}.md") as file:
        file.write(page)
    print(page)
