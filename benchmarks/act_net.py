"""ACT-Net against its parts, at equal steps and equal data, over several seeds.

    python benchmarks/act_net.py --task acdc --data DIR         real cardiac MRI, 7 labeled patients of 70, 2-D
    python benchmarks/act_net.py --task hippocampus --data DIR  real brain MRI, 10 labeled cases of 150, 3-D
    python benchmarks/act_net.py --demo                         the embedded demo cohort, 2-D
    python benchmarks/act_net.py --task acdc --report           only summarize the seeds already computed
    python benchmarks/act_net.py --task acdc --kd-weight 1.0    another weight (or --demo --cohort 9001), kept apart

Arms, all with the same student, initial weights, order of labeled images, steps and optimizer:
supervised; mean_teacher; kd (the teacher's term alone); act_net (both terms); sequential (mean teacher for the first
half of the steps, then kd); and the teacher, trained with mean teacher on the same labels, then frozen.
The final iterate is scored once on patients that nothing was chosen on. Every seed is one file, so that an interrupted
run goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset, set_track_meta
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    RandSpatialCropd,
    SqueezeDimd,
)
from torch import nn

from medkd.data import Stream, Streams
from medkd.data.atomic import atomic_write
from medkd.engine import Method, MethodTrainer
from medkd.losses.distillation import softened_mse
from medkd.methods.act_net import ACTNet
from medkd.methods.kd import KD
from medkd.methods.mean_teacher import MeanTeacher
from medkd.methods.supervised import Supervised
from medkd.metrics import bootstrap_ci, paired_test, score_case
from medkd.nets.unet import unet

RESULTS = Path(__file__).parent / "results"
LOSSLESS_DICE = 0.02
KD_WEIGHT = 0.1  # ACTNet's default
PAIRS = (
    ("act_net", "supervised"),
    ("act_net", "kd"),
    ("act_net", "mean_teacher"),
    ("act_net", "sequential"),
    ("kd", "supervised"),
    ("mean_teacher", "supervised"),
    ("teacher", "act_net"),
    ("teacher", "supervised"),
)
ARMS = ("supervised", "mean_teacher", "kd", "act_net", "sequential", "teacher")


@dataclass(frozen=True)
class Case:
    """One test volume: ``image`` (1, *S) normalised, ``label`` (*S), ``spacing_mm`` in axis order or None."""

    name: str
    patient: str
    image: torch.Tensor
    label: np.ndarray
    spacing_mm: tuple[float, ...] | None


@dataclass(frozen=True)
class Task:
    """What the arms are compared on."""

    name: str
    title: str
    labels: dict[int, str]
    labeled: list[dict[str, Any]]
    unlabeled: list[dict[str, Any]]
    test: list[Case]
    transform: Compose
    spatial_dims: int
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    teacher_name: str
    student_name: str
    batch_size: int
    teacher_rate: float
    student_rate: float
    steps: int
    predict: Callable[[nn.Module, torch.Tensor], np.ndarray]
    facts: dict[str, Any]


def normalize(image: np.ndarray) -> torch.Tensor:
    """Zero mean and unit variance, as (1, *S) float32."""
    image = image.astype(np.float32)
    return torch.from_numpy((image - image.mean()) / (image.std() + 1e-8)).unsqueeze(0)


def acdc(data: Path, steps: int) -> Task:
    """The published split of ACDC: 70 training patients, 7 of them labeled, 10 held out.

    The slices' central 128 × 128 px are halved to 64 × 64; of the training patients' labels 0.06 % lie outside.
    """
    arrays = np.load(data / "acdc_slices" / "acdc_192.npz")
    split = json.loads((data / "acdc_slices" / "split.json").read_text())
    image, label, patient, volume = (arrays[key] for key in ("image", "label", "patient", "volume"))
    items = [
        {
            "image": torch.nn.functional.avg_pool2d(normalize(image[k])[:, 32:-32, 32:-32], 2),
            "label": torch.from_numpy(label[k][32:-32:2, 32:-32:2].astype(np.int64)).unsqueeze(0),
            "case": f"{volume[k]}-{k}",
        }
        for k in range(len(image))
    ]
    train, labeled = set(split["train"]), set(split["labeled_7"])
    held_out = sorted(set(split["validation"]))
    if train & set(held_out):
        raise SystemExit("the split leaks patients")
    test = [
        Case(str(name), str(patient[volume == name][0]), torch.stack([normalize(x) for x in image[volume == name]], 1),
             label[volume == name].astype(np.int64), None)
        for name in sorted({str(v) for v, p in zip(volume, patient, strict=True) if p in held_out})
    ]  # fmt: skip

    @torch.no_grad()
    def predict(network: nn.Module, volume: torch.Tensor) -> np.ndarray:
        slices = torch.nn.functional.avg_pool2d(volume[0].unsqueeze(1)[..., 32:-32, 32:-32], 2)
        logits = torch.nn.functional.interpolate(network(slices), scale_factor=2, mode="bilinear")
        # What lies outside the crop counts as background, against the method.
        return torch.nn.functional.pad(logits.argmax(1), (32, 32, 32, 32)).numpy()

    return Task(
        name="acdc",
        title="ACDC cine MRI, end-diastole and end-systole, slices",
        labels={int(k): v for k, v in split["labels"].items()},
        labeled=[item for item, p in zip(items, patient, strict=True) if p in labeled],
        unlabeled=[
            {k: v for k, v in item.items() if k != "label"}
            for item, p in zip(items, patient, strict=True)
            if p in train - labeled
        ],
        test=test,
        transform=Compose(
            [
                RandRotate90d(["image", "label"], prob=0.5, allow_missing_keys=True),
                RandFlipd(["image", "label"], prob=0.5, spatial_axis=0, allow_missing_keys=True),
                RandAffined(["image", "label"], prob=0.5, rotate_range=math.radians(20), mode=["bilinear", "nearest"],
                            padding_mode="border", allow_missing_keys=True),
            ]
        ),
        spatial_dims=2,
        teacher=partial(unet, 6, 16, out_channels=4),
        student=partial(unet, 4, 4, out_channels=4),
        teacher_name="U-Net, 6 levels, width 16",
        student_name="U-Net, 4 levels, width 4",
        batch_size=8,
        teacher_rate=3e-3,
        student_rate=1e-2,
        steps=steps,
        predict=predict,
        facts={
            "labeled_patients": len(labeled), "unlabeled_patients": len(train - labeled),
            "test_patients": len(held_out),
            "input": "central 128 px of each slice at 64 × 64, z-scored per slice; scored on all 192 × 192 px",
        },
    )  # fmt: skip


def hippocampus(data: Path, steps: int) -> Task:
    """MSD hippocampus: 150 training cases, 10 of them labeled, 50 held out; whole volumes in 3-D."""
    import nibabel as nib

    folder = data / "msd_hippocampus"
    names = sorted(path.name for path in (folder / "images").glob("*.nii.gz"))
    order = np.random.default_rng(2026).permutation(len(names))
    size = (24, 32, 24)

    def load(name: str) -> tuple[torch.Tensor, np.ndarray, tuple[float, ...]]:
        image = nib.load(folder / "images" / name)
        label = nib.load(folder / "labels" / name)
        return normalize(image.get_fdata()), np.asarray(label.dataobj).astype(np.int64), image.header.get_zooms()[:3]

    def pad(array: torch.Tensor) -> torch.Tensor:
        missing = [max(0, want - have) for want, have in zip(size, array.shape[1:], strict=True)]
        return torch.nn.functional.pad(
            array, [part for gap in reversed(missing) for part in (gap // 2, gap - gap // 2)]
        )

    loaded = [load(names[k]) for k in order]
    items = [
        {"image": pad(image), "label": pad(torch.from_numpy(label).unsqueeze(0)), "case": names[k]}
        for k, (image, label, _) in zip(order, loaded, strict=True)
    ]
    test = [
        Case(names[k].removesuffix(".nii.gz"), names[k].removesuffix(".nii.gz"), image, label, tuple(map(float, zooms)))
        for k, (image, label, zooms) in zip(order[150:], loaded[150:], strict=True)
    ]

    @torch.no_grad()
    def predict(network: nn.Module, volume: torch.Tensor) -> np.ndarray:
        shape = volume.shape[1:]
        target = [-(-s // 8) * 8 for s in shape]
        padded = torch.nn.functional.pad(
            volume, [p for s, t in zip(reversed(shape), reversed(target), strict=True) for p in (0, t - s)]
        )
        logits = network(padded.unsqueeze(0))
        return logits.argmax(1)[0, : shape[0], : shape[1], : shape[2]].numpy()

    return Task(
        name="hippocampus",
        title="MSD hippocampus, T1 MRI, 3-D",
        labels={0: "background", 1: "anterior", 2: "posterior"},
        labeled=items[:10],
        unlabeled=[{k: v for k, v in item.items() if k != "label"} for item in items[10:150]],
        test=test,
        transform=Compose(
            [
                RandSpatialCropd(["image", "label"], roi_size=size, random_size=False, allow_missing_keys=True),
                RandAffined(["image", "label"], prob=0.5, rotate_range=[math.radians(15)] * 3, scale_range=[0.1] * 3,
                            mode=["bilinear", "nearest"], padding_mode="border", allow_missing_keys=True),
                RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
            ]
        ),
        spatial_dims=3,
        teacher=partial(unet, 4, 16, out_channels=3, spatial_dims=3),
        student=partial(unet, 3, 4, out_channels=3, spatial_dims=3),
        teacher_name="3-D U-Net, 4 levels, width 16",
        student_name="3-D U-Net, 3 levels, width 4",
        batch_size=2,
        teacher_rate=3e-3,
        student_rate=1e-2,
        steps=steps,
        predict=predict,
        facts={
            "labeled_patients": 10, "unlabeled_patients": 140, "test_patients": len(test),
            "input": "24 × 32 × 24 voxel crops at 1 mm, z-scored per volume",
        },
    )  # fmt: skip


def demo(data: Path, steps: int, *, cohort: int = 0) -> Task:
    """The embedded demo cohort: 4 labeled and 28 unlabeled virtual patients, 10 held out; whole axial slices."""
    from tempfile import TemporaryDirectory

    from medkd.data import demo_mri, read_datalist
    from medkd.data.demo import LABELS
    from medkd.data.volumes import read_label, read_volume

    def item(entry: dict[str, Any]) -> dict[str, Any]:
        loaded: dict[str, Any] = {"image": normalize(read_volume(entry["image"]).array), "case": entry["case"]}
        if "label" in entry:
            loaded["label"] = torch.from_numpy(read_label(entry["label"]).array.astype(np.int64)).unsqueeze(0)
        return loaded

    with TemporaryDirectory() as folder:
        cases = read_datalist(demo_mri(folder, seed=cohort))
        labeled, unlabeled = ([item(e) for e in cases.section(name)] for name in ("training", "unlabeled"))
        test = []
        for entry in cases.section("test"):
            loaded, spacing = item(entry), read_volume(entry["image"]).spacing_mm
            # Slices first, as for the other 2-D task.
            image, label = loaded["image"].movedim(-1, 1), np.moveaxis(loaded["label"][0].numpy(), -1, 0)
            test.append(Case(entry["case"], entry["patient"], image, label, (spacing[2], *spacing[:2])))

    @torch.no_grad()
    def predict(network: nn.Module, volume: torch.Tensor) -> np.ndarray:
        return network(volume[0].unsqueeze(1)).argmax(1).numpy()

    def network(*channels: int) -> nn.Module:
        return UNet(2, 1, len(LABELS), channels, [2] * (len(channels) - 1))

    return Task(
        name="demo",
        title="virtual patients made from the MNI152 MRI (simulated), 2-D slices",
        labels=dict(LABELS),
        labeled=labeled,
        unlabeled=unlabeled,
        test=test,
        transform=Compose(
            [
                RandSpatialCropd(["image", "label"], roi_size=(96, 112, 1), random_size=False, allow_missing_keys=True),
                SqueezeDimd(["image", "label"], dim=-1, allow_missing_keys=True),
                RandFlipd(["image", "label"], prob=0.5, spatial_axis=0, allow_missing_keys=True),
                RandAffined(["image", "label"], prob=0.5, rotate_range=0.3, scale_range=[0.15] * 2,
                            mode=["bilinear", "nearest"], padding_mode="border", allow_missing_keys=True),
                RandScaleIntensityd("image", factors=0.1, prob=0.5),
                RandGaussianNoised("image", prob=0.5, std=0.1),
            ]
        ),
        spatial_dims=2,
        teacher=partial(network, 32, 64, 128, 256, 512),
        student=partial(network, 4, 8, 16, 32),
        teacher_name="MONAI UNet, channels 32 to 512",
        student_name="MONAI UNet, channels 4 to 32",
        batch_size=8,
        teacher_rate=2e-3,
        student_rate=1e-2,
        steps=steps,
        predict=predict,
        facts={
            "labeled_patients": len(labeled), "unlabeled_patients": len(unlabeled), "test_patients": len(test),
            "cohort": cohort, "input": "96 × 112 px axial slices at 2 mm, z-scored per volume",
        },
    )  # fmt: skip


def train(task: Task, method: Method, seed: int, steps: int, *, is_teacher: bool = False) -> dict[str, float]:
    """Run one method for ``steps`` optimizer updates with poly decay; returns seconds per step and the last losses.

    The learning rates were chosen on the training loss of the supervised arm, and of the teacher's network trained
    like it; the other arms were not looked at.
    """
    streams = {"labeled": Stream(Dataset(task.labeled, task.transform), task.batch_size)}
    if "unlabeled" in method.streams + method.optional_streams:
        streams["unlabeled"] = Stream(Dataset(task.unlabeled, task.transform), task.batch_size)
    optimizer = torch.optim.AdamW(
        method.role_parameters("student"), lr=task.teacher_rate if is_teacher else task.student_rate
    )
    trainer = MethodTrainer(
        "cuda" if torch.cuda.is_available() else "cpu",
        max_epochs=1,
        train_data_loader=Streams(length_of="labeled", seed=seed, **streams),
        method=method,
        optimizers=optimizer,
        lr_schedulers=torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9),
        epoch_length=steps,
        amp="bf16",
        channels_last=True,
        seed=seed,
    )
    started = time.perf_counter()
    trainer.run()
    return {"seconds_per_step": (time.perf_counter() - started) / steps, **_last_terms(trainer.state.output)}


def _last_terms(output: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in output.items()}


def score(task: Task, network: nn.Module) -> list[dict[str, Any]]:
    """Dice per test volume and class; HD95 per volume in mm, or per slice in px where there is no spacing."""
    network = network.eval().float().cpu()
    rows = []
    for case in task.test:
        prediction = task.predict(network, case.image)
        whole = score_case(prediction, case.label, case=case.name, patient=case.patient, labels=task.labels,
                           spacing_mm=case.spacing_mm)  # fmt: skip
        for entry in whole:
            if case.spacing_mm is not None:
                distances = [entry.hd95]
            else:
                pairs = [(p, r) for p, r in zip(prediction, case.label, strict=True)]
                distances = [_slice_hd95(p, r, entry.class_index) for p, r in pairs]
            finite = [d for d in distances if math.isfinite(d)]
            rows.append(
                {
                    "case": case.name,
                    "patient": case.patient,
                    "class": entry.class_index,
                    "dice": None if math.isnan(entry.dice) else round(entry.dice, 5),
                    "hd95": round(float(np.mean(finite)), 3) if finite else None,
                    "missed": sum(math.isinf(d) for d in distances),
                    "scored": len(finite),
                }
            )
    return rows


def _slice_hd95(prediction: np.ndarray, reference: np.ndarray, label: int) -> float:
    from medkd.metrics import hd95_mm

    return hd95_mm(prediction, reference, spacing_mm=(1.0, 1.0), classes=[label])[label]


def run_seed(
    make: Callable[[], Task], seed: int, folder: Path, arms: Sequence[str] = ARMS, kd_weight: float = KD_WEIGHT
) -> None:
    """Train and score all arms for one seed, keeping each arm as soon as it is done."""
    torch.set_num_threads(1)
    set_track_meta(False)  # the arrays have no geometry left to track, and plain tensors are faster
    task = make()
    path = folder / f"seed-{seed}.json"
    done = json.loads(path.read_text()) if path.exists() else {"seed": seed, "steps": task.steps, "arms": {}}
    if done["steps"] != task.steps:
        raise SystemExit(f"{path}: computed with {done['steps']} steps; remove it or use --steps {done['steps']}")
    torch.manual_seed(1000 + seed)
    teacher_network, student_network = task.teacher(), task.student()

    weights = folder / f"teacher-{seed}.pt"
    teacher_method = MeanTeacher(teacher_network)
    if weights.exists():
        teacher_network.load_state_dict(torch.load(weights, weights_only=True))
    else:
        facts = train(task, teacher_method, seed, task.steps, is_teacher=True)
        torch.save(teacher_network.state_dict(), weights)
        done["arms"]["teacher"] = {"facts": facts, "cases": score(task, copy.deepcopy(teacher_network))}
        _keep(path, done)

    def student() -> nn.Module:
        return copy.deepcopy(student_network)

    def frozen() -> nn.Module:
        return copy.deepcopy(teacher_network)

    def distilled(network: nn.Module) -> Method:
        """ACT-Net's own distillation term without the co-teacher."""
        return KD(network, frozen(), temperature=20.0, kd_weight=kd_weight, distillation_loss=softened_mse)

    def sequential() -> tuple[Method, dict[str, float]]:
        first = MeanTeacher(student())
        train(task, first, seed, task.steps // 2)
        second = distilled(first.student)
        return second, train(task, second, seed + 500, task.steps - task.steps // 2)

    methods: dict[str, Callable[[], Method]] = {
        "supervised": lambda: Supervised(student()),
        "act_net": lambda: ACTNet(student(), frozen(), kd_weight=kd_weight),
        "kd": lambda: distilled(student()),
        "mean_teacher": lambda: MeanTeacher(student()),
    }
    for arm in (*methods, "sequential"):
        if arm in done["arms"] or arm not in arms:
            continue
        if arm == "sequential":
            method, facts = sequential()
        else:
            method = methods[arm]()
            facts = train(task, method, seed, task.steps)
        done["arms"][arm] = {"facts": facts, "cases": score(task, method.deployed)}
        _keep(path, done)


def _keep(path: Path, done: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        json.dump(done, file)


def summarize(task: Task, folder: Path, kd_weight: float, command: str) -> dict[str, Any]:
    """Intervals of every arm and of the paired differences, over seeds and patients."""
    seeds = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    arms_done = [arm for arm in ARMS if any(arm in seed["arms"] for seed in seeds)]
    seeds = [seed for seed in seeds if set(arms_done) <= set(seed["arms"])]  # an interrupted seed does not count
    if not seeds:
        raise SystemExit(f"{folder}: no finished seed")
    table: dict[str, dict[str, list[Any]]] = {}
    for arm in arms_done:
        columns: dict[str, list[Any]] = defaultdict(list)
        for seed in seeds:
            by_case: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for row in seed["arms"][arm]["cases"]:
                by_case[row["case"]].append(row)
            for case in sorted(by_case):
                rows = by_case[case]
                dices = [row["dice"] for row in rows if row["dice"] is not None]
                columns["dice"].append(float(np.mean(dices)))
                distances = [row["hd95"] for row in rows if row["hd95"] is not None]
                columns["hd95"].append(float(np.mean(distances)) if distances else math.nan)
                columns["missed"].append(sum(row["missed"] for row in rows))
                columns["patient"].append(rows[0]["patient"])
                columns["seed"].append(seed["seed"])
        table[arm] = columns
    arms = {}
    for arm, columns in table.items():
        labels = {"patients": columns["patient"], "seeds": columns["seed"]}
        arms[arm] = {
            "parameters": sum(p.numel() for p in (task.teacher if arm == "teacher" else task.student)().parameters()),
            "dice": _interval(bootstrap_ci(columns["dice"], **labels)),
            "hd95": _interval(bootstrap_ci(columns["hd95"], **labels)),
            "missed": int(sum(columns["missed"])),
            "last_training_loss": [round(seed["arms"][arm]["facts"]["segmentation_loss"], 3) for seed in seeds],
            "dice_per_seed": [
                round(float(np.mean(np.array(columns["dice"])[np.array(columns["seed"]) == seed["seed"]])), 4)
                for seed in seeds
            ],
        }
    pairs = {}
    for a, b in PAIRS:
        if a not in table or b not in table:
            continue
        result = paired_test(table[a]["dice"], table[b]["dice"], patients=table[a]["patient"], seeds=table[a]["seed"])
        pairs[f"{a} - {b}"] = {
            "mean": round(result.mean_difference, 4), "low": round(result.low, 4), "high": round(result.high, 4),
            "wilcoxon_p": round(result.wilcoxon_p, 5), "permutation_p": round(result.permutation_p, 5),
            "n_patients": result.n_patients, "n_seeds": result.n_seeds,
        }  # fmt: skip
    ratio = arms["teacher"]["parameters"] / next(v for k, v in arms.items() if k != "teacher")["parameters"]
    gap = pairs.get("teacher - act_net")
    return {
        "task": task.name, "title": task.title,
        "command": command,
        "facts": task.facts, "unit": "mm" if task.test[0].spacing_mm else "px", "steps": seeds[0]["steps"],
        "batch": f"{task.batch_size} labeled + {task.batch_size} unlabeled", "seeds": [seed["seed"] for seed in seeds],
        "optimizer": f"AdamW, learning rate {task.student_rate} (teacher {task.teacher_rate}), poly decay",
        "teacher": task.teacher_name, "student": task.student_name, "kd_weight": kd_weight,
        "ratio": round(ratio, 1),
        "arms": arms, "paired_dice": pairs,
        "lossless": None if gap is None else gap["high"] <= LOSSLESS_DICE,
        "lossless_rule": f"upper 95 % bound of teacher - student <= {LOSSLESS_DICE} Dice",
    }  # fmt: skip


def _interval(interval: Any) -> dict[str, Any]:
    return {
        "mean": round(interval.estimate, 4), "low": round(interval.low, 4), "high": round(interval.high, 4),
        "n": interval.n, "n_undefined": interval.n_nan,
    }  # fmt: skip


@dataclass(frozen=True)
class Maker:
    """Builds a task in a worker process."""

    name: str
    data: Path
    steps: int
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> Task:
        """The task."""
        return TASKS[self.name](self.data, self.steps, **dict(self.options))


TASKS: dict[str, Callable[..., Task]] = {"acdc": acdc, "hippocampus": hippocampus, "demo": demo}
STEPS = {"acdc": 600, "hippocampus": 300, "demo": 400}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds that are missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), default="acdc")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=2, help="seeds trained at once, one thread each")
    parser.add_argument("--demo", action="store_true", help="the embedded demo cohort")
    parser.add_argument("--cohort", type=int, default=0, help="seed of the demo cohort")
    parser.add_argument("--kd-weight", type=float, default=KD_WEIGHT, help="weight of the KD term")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to train")
    parser.add_argument("--report", action="store_true", help="only summarize what is there")
    options = parser.parse_args(arguments)
    name = "demo" if options.demo else options.task
    if options.cohort and not options.demo:
        parser.error("--cohort is for --demo")
    marks = ""
    command = "python benchmarks/act_net.py " + ("--demo" if name == "demo" else f"--task {name}")
    for option, value, usual in (("cohort", options.cohort, 0), ("kd-weight", options.kd_weight, KD_WEIGHT)):
        if value != usual:
            marks += f"_{option}-{value}"
            command += f" --{option} {value}"
    make = Maker(
        name, options.data, options.steps or STEPS[name], (("cohort", options.cohort),) if options.demo else ()
    )
    folder = RESULTS / f"act_net_{name}{marks}"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.report:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            arguments_of_all = (options.arms, options.kd_weight)
            for future in [pool.submit(run_seed, make, s, folder, *arguments_of_all) for s in range(options.seeds)]:
                future.result()
    summary = summarize(make(), folder, options.kd_weight, command)
    with atomic_write(RESULTS / f"{folder.name}.json") as file:
        json.dump(summary, file, indent=1)
    print(json.dumps(summary["arms"], indent=1))
    print(json.dumps(summary["paired_dice"], indent=1))


if __name__ == "__main__":
    main()
