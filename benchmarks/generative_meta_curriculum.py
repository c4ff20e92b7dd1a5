"""Does a teacher that learns to augment help a student that has 40 images per class, and what does it cost?

    python benchmarks/generative_meta_curriculum.py --task demo                     generated textures, no data needed
    python benchmarks/generative_meta_curriculum.py --task camelyon --data DIR      patches of 32 lymph node tiles
    python benchmarks/generative_meta_curriculum.py --task camelyon --report        only summarize the seeds computed

Every arm of a seed has the same 40 images per class, initial student, optimizer, steps and order of batches:

- none: the images as they are.
- classic: flips, quarter turns, brightness, contrast and saturation, drawn anew for each image.
- random_teacher: each batch and its images changed by a teacher that never learns, same ε and μ over the run.
- adversarial: the teacher learns to make the student wrong (γ), without the virtual step.
- no_curriculum: everything, but ε, γ and μ are at their end from the start.
- gmcl: everything (variant A).
- first_order: gmcl with the reward in place of the meta-gradient.

All but the first two show the student two images for each real one, so random_teacher is their control. Tiles are
split, never patches: each seed tests on another half of the tiles, in blocks of four neighboring numbers (which may be
of one slide). The final student is scored; nothing is chosen on the test tiles. Each arm trains in a process of its
own, whose peak memory above its start is measured; a GAN's step on the same batches is timed beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from monai.data import Dataset
from scipy import ndimage
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import PolynomialLR

from medkd.data import Stream, Streams
from medkd.data.atomic import atomic_write
from medkd.data.tile_images import read_tile_image, read_tile_mask
from medkd.engine import Method, MethodTrainer
from medkd.losses.classification import cross_entropy_loss
from medkd.methods.generative_meta_curriculum import GenerativeMetaCurriculum
from medkd.methods.histogan import HistoGAN
from medkd.methods.supervised import Supervised
from medkd.metrics.roc import auc_difference, auc_interval
from medkd.nets.conditional_gan import ConditionalCritic, ConditionalGenerator
from medkd.nets.curriculum_teacher import PerturbingTeacher
from medkd.wsi.patches import cut_patches

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parents[2] / "shared" / "data"
NAME = "generative_meta_curriculum"
PER_CLASS, SIDE, BATCH, SEEDS = 40, 32, 32, 5
STEPS = {"camelyon": 200, "demo": 100}
PATCH_PX, CENTER_PX = 96, 32
RATE, TEACHER_RATE, TEACHER_WIDTH = 2e-3, 1e-3, 8
LATENT, GAN_WIDTH, GAN_STEPS_TIMED = 32, 8, 20
BLOCK = 4  # neighboring tiles that stay together
TITLES = {
    "none": "no augmentation",
    "classic": "classic augmentation",
    "random_teacher": "random teacher, never trained",
    "adversarial": "adversarial teacher, no meta term",
    "no_curriculum": "GMCL (A) without curriculum",
    "gmcl": "GMCL (A)",
    "first_order": "GMCL (A), first order",
}
PAIRS = [
    *[("gmcl", other) for other in ("none", "classic", "random_teacher", "adversarial", "no_curriculum")],
    *[(other, "random_teacher") for other in ("adversarial", "first_order")],
    *[(other, "none") for other in ("classic", "random_teacher")],
]
Item = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Patches of one seed: ``train`` has 40 items per class, ``test`` all patches of tiles that training never saw."""

    title: str
    train: list[Item]
    test: list[Item]


def load(name: str, seed: int, data: Path) -> Task:
    """The seed's images as float32 tensors (3, 32, 32) in [-1, 1]."""
    return {"camelyon": _camelyon, "demo": _demo}[name](seed, data)


def _camelyon(seed: int, data: Path) -> Task:
    tiles = _tiles(data / "camelyon_tiles")
    blocks = np.random.default_rng([2026, seed]).permutation(-(-len(tiles) // BLOCK))
    held_out = {number for block in blocks[: len(blocks) // 2] for number in range(block * BLOCK, (block + 1) * BLOCK)}
    pool = [item for number, found in enumerate(tiles) if number not in held_out for item in found]
    test = [item for number in sorted(held_out) for item in tiles[number] if item["apart"]]
    return Task("tumor in patches of 32 CAMELYON16 lymph node tiles (48 µm across, 1.5 µm per pixel)",
                _chosen(pool, seed), test)  # fmt: skip


@cache
def _tiles(folder: Path) -> list[list[Item]]:
    found = []
    for file in sorted((folder / "images").glob("*.jpg")):
        image = read_tile_image(file)[..., ::-1]  # stored with red and blue swapped
        mask = read_tile_mask(folder / "masks" / file.name, threshold=127)
        found.append(
            [
                _item(cv2.resize(np.ascontiguousarray(patch), (SIDE, SIDE), interpolation=cv2.INTER_AREA), label,
                      file.stem, f"{file.stem}_x{x}_y{y}", apart=x % PATCH_PX == 0 and y % PATCH_PX == 0)
                for x, y, label, patch in cut_patches(image, mask, size=PATCH_PX, center=CENTER_PX, step=PATCH_PX // 2)
            ]
        )  # fmt: skip
    return found


def _demo(seed: int, data: Path) -> Task:
    """Blobs whose typical size tells the class, on sheets of 10 images with colors and density of their own."""
    random = np.random.default_rng([7, seed])

    def sheet(name: str) -> list[Item]:
        ground, blobs = random.uniform((0.75, 0.5, 0.65), 1.0), random.uniform((0.3, 0.15, 0.4), (0.6, 0.4, 0.7))
        density, jitter = random.normal(0.0, 0.3), random.uniform(0.9, 1.1)
        items = []
        for number in range(10):
            label = number % 2
            field = ndimage.gaussian_filter(random.standard_normal((SIDE, SIDE)), (1.0, 1.5)[label] * jitter)
            share = 1 / (1 + np.exp(-4 * (field / field.std() - 0.7 - density)))[..., None]
            pixels = ground * (1 - share) + blobs * share + random.normal(0, 0.06, (SIDE, SIDE, 3))
            items.append(_item((pixels.clip(0, 1) * 255).astype(np.uint8), label, name, f"{name}-{number}"))
        return items

    pool = [item for number in range(24) for item in sheet(f"train-{seed}-{number}")]
    test = [item for number in range(40) for item in sheet(f"test-{seed}-{number}")]
    return Task("blobs of two sizes on sheets of many colors (generated)", _chosen(pool, seed), test)


def _item(pixels: np.ndarray, label: int, tile: str, case: str, *, apart: bool = True) -> Item:
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 127.5 - 1
    return {"image": image, "label": label, "patient": tile, "case": case, "apart": apart}


def _chosen(pool: list[Item], seed: int) -> list[Item]:
    random = np.random.default_rng([40, seed])
    by_class = [[item for item in pool if item["label"] == label] for label in (0, 1)]
    return [own[k] for own in by_class for k in random.choice(len(own), PER_CLASS, replace=False)]


def classic(item: Item) -> Item:
    """Flips, quarter turns, brightness, contrast and saturation; seeded by the stream."""
    image = torch.rot90(item["image"], int(torch.randint(4, ())), dims=(1, 2))
    image = image.flip(2) if torch.rand(()) < 0.5 else image
    brightness, contrast, saturation = (torch.rand(3) - 0.5) * torch.tensor([0.3, 0.4, 0.4])
    gray = image.mean(0, keepdim=True)
    image = gray + (image - gray) * (1 + saturation)
    return {**item, "image": (image * (1 + contrast) + brightness).clamp(-1, 1)}


def student() -> nn.Module:
    """Three strided convolutions with BatchNorm, 24 thousand parameters: (B, 3, 32, 32) → (B, 2)."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))


def build(arm: str, seed: int) -> Method:
    """The arm's method; the student's first weights depend on the seed alone, the teacher's too."""
    torch.manual_seed(1000 + seed)
    network = student()
    torch.manual_seed(2000 + seed)
    if arm in ("none", "classic"):
        return Supervised(network, segmentation_loss=cross_entropy_loss)
    teacher = PerturbingTeacher(2, width=TEACHER_WIDTH)
    settings: dict[str, dict[str, Any]] = {
        "random_teacher": {"meta_weight": 0.0, "distance_weight": 0.0, "adversarial_weight": 0.0},
        "adversarial": {"meta_weight": 0.0},
        "no_curriculum": {"ramp_up_frac": 0.0, "harder_frac": 0.0},
        "gmcl": {},
        "first_order": {"first_order": True},
    }
    return GenerativeMetaCurriculum(network, teacher, **settings[arm])


def fit(method: Method, items: list[Item], *, steps: int, seed: int, transform: Callable[..., Any] | None) -> Any:
    """Train with Adam, the first role by poly decay; returns what the last step logged."""
    rates = dict.fromkeys(method.roles, TEACHER_RATE) | {"student": RATE}
    optimizers = {role: Adam(method.role_parameters(role), lr=rates[role]) for role in method.roles}
    first = method.roles[0]
    trainer = MethodTrainer(
        "cuda" if torch.cuda.is_available() else "cpu", 1,
        Streams(length_of="labeled", seed=seed, labeled=Stream(Dataset(items, transform), BATCH)), method, optimizers,
        lr_schedulers={first: PolynomialLR(optimizers[first], total_iters=steps, power=0.9)},
        epoch_length=steps, seed=seed, clip_norm=5.0, channels_last=True,
    )  # fmt: skip
    trainer.run()
    return {name: round(float(value), 5) for name, value in trainer.state.output.items()}


@torch.inference_mode()
def score(network: nn.Module, items: list[Item]) -> list[float]:
    """Logit of class 1 minus that of class 0."""
    network.eval()
    device = next(network.parameters()).device
    logits = torch.cat([network(torch.stack([i["image"] for i in items[k : k + 256]]).to(device)) for k in
                        range(0, len(items), 256)])  # fmt: skip
    return [round(value, 5) for value in (logits[:, 1] - logits[:, 0]).tolist()]


def run_arm(arm: str, task: Task, seed: int, steps: int) -> dict[str, Any]:
    """Train and score one arm, or time a GAN's step, in this process."""
    torch.set_num_threads(1)
    method = build(arm, seed) if arm != "gan" else HistoGAN(
        ConditionalGenerator(2, SIDE, latent=LATENT, width=GAN_WIDTH), ConditionalCritic(2, SIDE, width=GAN_WIDTH),
        classes=2, latent=LATENT,
    )  # fmt: skip
    transform = classic if arm == "classic" else None
    start = _reset_peak()
    fit(copy.deepcopy(method), task.train, steps=2, seed=seed, transform=transform)  # what is slow only once
    started, cpu = time.perf_counter(), time.process_time()
    last = fit(method, task.train, steps=steps, seed=seed, transform=transform)
    cost = {
        "seconds": round(time.perf_counter() - started, 2), "cpu_s": round(time.process_time() - cpu, 2),
        "steps": steps, "peak_mb": _peak_mb() - start,
        "trained_parameters": sum(p.numel() for role in method.roles for p in method.role_parameters(role)),
    }  # fmt: skip
    return {"cost": cost, "last": last, "scores": [] if arm == "gan" else score(method.deployed, task.test)}


def _reset_peak() -> int:
    """Forget this process's peak memory; returns what it holds now, in MB (of the GPU where there is one)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return round(torch.cuda.memory_allocated() / 2**20)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def _peak_mb() -> int:
    return round(torch.cuda.max_memory_allocated() / 2**20) if torch.cuda.is_available() else _status_mb("VmHWM")


def _status_mb(entry: str) -> int:
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return round(int(found[1]) / 1024) if found else 0


def _child(pipe: Any, *arguments: Any) -> None:
    pipe.send(run_arm(*arguments))


def in_its_own_process(*arguments: Any) -> dict[str, Any]:
    """``run_arm`` in a fresh process, so that no arm finds memory left by another."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, *arguments))
    process.start()
    theirs.close()
    found: dict[str, Any] = ours.recv()
    process.join()
    return found


def run_seed(name: str, seed: int, steps: int, folder: Path, data: Path) -> None:
    """Train and score the arms of one seed that are not there yet."""
    path = folder / f"seed-{seed}.json"
    done = json.loads(path.read_text()) if path.exists() else {"seed": seed, "steps": steps, "arms": {}}
    if done["steps"] != steps:
        raise SystemExit(f"{path}: computed with {done['steps']} steps; remove it or use --steps {done['steps']}")
    task = load(name, seed, data)
    done |= {"title": task.title, "cases": [{key: i[key] for key in ("case", "patient", "label")} for i in task.test]}
    for arm in (*TITLES, "gan"):
        if arm in done["arms"]:
            continue
        done["arms"][arm] = in_its_own_process(arm, task, seed, GAN_STEPS_TIMED if arm == "gan" else steps)
        with atomic_write(path) as file:
            json.dump(done, file)


def summarize(name: str, folder: Path) -> dict[str, Any]:
    """AUC of every arm with intervals over tiles, paired differences, and costs."""
    seeds = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    seeds = [seed for seed in seeds if {*TITLES, "gan"} <= set(seed["arms"])]
    if not seeds:
        raise SystemExit(f"{folder}: no finished seed")
    cases = [{**case, "seed": seed["seed"]} for seed in seeds for case in seed["cases"]]
    columns = {
        "labels": [case["label"] for case in cases], "patients": [case["patient"] for case in cases],
        "strata": [case["seed"] for case in cases],
    }  # fmt: skip
    scores = {arm: [value for seed in seeds for value in seed["arms"][arm]["scores"]] for arm in TITLES}
    result: dict[str, Any] = {
        "task": name, "title": seeds[0]["title"], "command": f"python benchmarks/{NAME}.py --task {name}",
        "seeds": [seed["seed"] for seed in seeds], "steps": seeds[0]["steps"], "batch": BATCH, "per_class": PER_CLASS,
        "tiles": len(set(columns["patients"])), "test_patches": len(cases), "arms": {}, "differences": {},
        "gan": _costs(seeds, "gan"), "histogan_route": histogan_route(),
    }  # fmt: skip
    for arm, values in scores.items():
        interval = auc_interval(values, **columns)
        result["arms"][arm] = {
            "auc": round(interval.estimate, 4), "low": round(interval.low, 4), "high": round(interval.high, 4),
            "per_seed": [_auc_of(seed, arm) for seed in seeds], "last": seeds[0]["arms"][arm]["last"],
            **_costs(seeds, arm),
        }  # fmt: skip
    for a, b in PAIRS:
        found = auc_difference(scores[a], scores[b], **columns)
        per_seed = np.subtract(result["arms"][a]["per_seed"], result["arms"][b]["per_seed"])
        result["differences"][f"{a} - {b}"] = {
            "mean": round(found.estimate, 4), "low": round(found.low, 4), "high": round(found.high, 4),
            "smallest_shown": round((found.high - found.low) / 2, 4),
            "sd_of_seeds": round(float(np.std(per_seed, ddof=1)), 4) if len(seeds) > 1 else None,
        }  # fmt: skip
    return result


def _auc_of(seed: dict[str, Any], arm: str) -> float:
    labels = [case["label"] for case in seed["cases"]]
    return round(auc_interval(seed["arms"][arm]["scores"], labels, resamples=1).estimate, 4)


def _costs(seeds: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    found = [seed["arms"][arm]["cost"] for seed in seeds]
    return {
        "ms_per_step": round(float(np.median([1000 * one["cpu_s"] / one["steps"] for one in found])), 1),
        "seconds": round(float(np.median([one["seconds"] for one in found])), 1),
        "peak_mb": max(one["peak_mb"] for one in found), "trained_parameters": found[0]["trained_parameters"],
    }  # fmt: skip


def histogan_route() -> dict[str, Any]:
    """What ``benchmarks/histogan.py`` says its route cost, where it has been run."""
    found = {}
    for path in sorted(RESULTS.glob("histogan*.json")):
        summary = json.loads(path.read_text())
        wanted = ("gan_steps", "gan_cpu_s", "gan_peak_mb", "steps")
        found[path.stem] = {key: summary[key] for key in wanted if key in summary}
    return found


def section(result: dict[str, Any]) -> str:
    """The results as Markdown, for docs/results.md."""
    gan = result["gan"]
    lines = [
        f"## Generative meta curriculum: {result['title']}",
        "",
        f"{result['per_class']} images per class, {result['steps']} steps of {result['batch']}, {len(result['seeds'])} "
        f"seeds, each with its own split; {result['test_patches']} test patches of {result['tiles']} tiles in all. AUC "
        "with 95 % bootstrap intervals over tiles; only scores of one model are compared with each other. Time is "
        "process time, memory the peak above the start of the process, one core. Our reconstruction of the method.",
        "",
        f"`{result['command']}`",
        "",
        "| arm | AUC | lowest and highest seed | ms per step | seconds | peak MB | trained parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, title in TITLES.items():
        row = result["arms"][arm]
        lines.append(
            f"| {title} | {row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {min(row['per_seed']):.3f}, "
            f"{max(row['per_seed']):.3f} | {row['ms_per_step']:.0f} | {row['seconds']:.0f} | {row['peak_mb']} | "
            f"{row['trained_parameters']:,} |"
        )
    lines += [
        f"| a GAN's step (HistoGAN, width {GAN_WIDTH}), cost only |  |  | {gan['ms_per_step']:.0f} |  | "
        f"{gan['peak_mb']} | {gan['trained_parameters']:,} |",
        "",
        "| difference in AUC |  | smallest it could show | sd over seeds | reading |",
        "|---|---|---|---|---|",
    ]
    for pair, row in result["differences"].items():
        a, b = (TITLES[arm] for arm in pair.split(" - "))
        reading = "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "not shown to differ"
        deviation = "" if row["sd_of_seeds"] is None else f"{row['sd_of_seeds']:.3f}"
        lines.append(
            f"| {a} minus {b} | {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] | "
            f"{row['smallest_shown']:.3f} | {deviation} | {reading} |"
        )
    route = ", ".join(f"{name}: {json.dumps(cost)}" for name, cost in result["histogan_route"].items() if cost)
    lines += [
        "",
        "The GAN's step is added to the student's and repeated for as long as a GAN needs, thousands of times; its "
        + (f"whole route, as measured by `benchmarks/histogan.py`: {route}." if route else
           "whole route is measured by `benchmarks/histogan.py`."),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("demo", "camelyon"), default="demo")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--steps", type=int, help=f"of every arm; {STEPS} by default")
    parser.add_argument("--report", action="store_true", help="only summarize what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    folder = RESULTS / f"{NAME}_{options.task}"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in () if options.report else options.seeds:
        run_seed(options.task, seed, options.steps or STEPS[options.task], folder, options.data)
    summary = summarize(options.task, folder)
    with atomic_write(RESULTS / f"{NAME}_{options.task}.json") as file:
        json.dump(summary, file, indent=1)
        file.write("\n")
    with atomic_write(RESULTS / f"{NAME}_{options.task}.md") as file:
        file.write(section(summary))
    print(section(summary))


if __name__ == "__main__":
    main()
