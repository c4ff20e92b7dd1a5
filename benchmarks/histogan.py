"""Does adding selected generated images help a classifier of few labeled patches? HistoGAN with selective augmentation.

    python benchmarks/histogan.py --data DIR                   CAMELYON16 tiles, about a quarter of an hour on one core
    python benchmarks/histogan.py --task ocdc --data DIR        oral carcinoma tiles
    python benchmarks/histogan.py --task demo                   made-up nuclei, no data needed, some minutes
    python benchmarks/histogan.py --task camelyon --report      only summarize what is there

DIR of --data holds camelyon_tiles and ocdc_oral_tiles. Patches of 96 px, cut at 0.5 µm per pixel, are reduced to 32 px;
the class is that of the central 32 px. Two folds: half of the pictures (blocks of neighboring numbers, which may be of
one slide) train, the other half tests, in turn. Of the training half 60 patches per class are labeled; nothing else of
it is used but in the arm "all labels". Per fold one classifier of the real patches, one HistoGAN of the same 120
patches, one pool of generated images with its scores. Per fold and seed one classifier of each arm, from the same
weights, with the same number of steps and of images per step; in the arms with generated images half of a batch is
generated. The final iterate is scored once; nothing is chosen on the held-out pictures. Models of CAMELYON also score
the oral tiles, a second site they never saw.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medkd.data.atomic import atomic_write
from medkd.data.synthetic_pool import write_pool
from medkd.data.tile_images import read_tile_image, read_tile_mask
from medkd.engine import MethodTrainer
from medkd.engine.synthesis_samples import SynthesisSamples
from medkd.losses.classification import cross_entropy_loss
from medkd.methods.histogan import HistoGAN
from medkd.methods.selective_augmentation import Scores, SelectiveAugmentation, select
from medkd.methods.supervised import Supervised
from medkd.metrics.roc import auc_difference, auc_interval
from medkd.nets.conditional_gan import ConditionalCritic, ConditionalGenerator, class_codes
from medkd.wsi.patches import cut_patches

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDS, SEEDS = 2, 5
SIZE, CENTER, SIDE = 96, 32, 32
LABELED = 60
LATENT = 64
ATTENTION = 16  # at 32 px it would take two thirds of the time
POOL = 400  # candidates per class
KEEP, CONFIDENT = 0.25, 0.5
BATCH, GAN_BATCH = 32, 16
STEPS = {"camelyon": 160, "ocdc": 160, "demo": 100}
GAN_STEPS = {"camelyon": 1080, "ocdc": 1080, "demo": 300}
GAN_WIDTH = {"camelyon": 16, "ocdc": 16, "demo": 8}
FOLDERS = {"camelyon": "camelyon_tiles", "ocdc": "ocdc_oral_tiles"}
TITLES = {
    "real": "60 real per class, as they are",
    "classic": "+ classic augmentation",
    "all": "+ all generated",
    "random": "+ random K",
    "confidence": "+ K by confidence",
    "distance": "+ K by distance",
    "both": "+ K by both (the paper)",
    "full": "all labels, classic augmentation",
}
COMPARISONS = (("both", "random"), ("both", "classic"), ("both", "all"), ("confidence", "random"),
               ("distance", "random"), ("all", "classic"), ("classic", "real"), ("full", "classic"))  # fmt: skip


@dataclass(frozen=True)
class Patches:
    """``image`` (N, 3, H, W) float32 in [-1, 1], ``label`` (N,) int64, ``picture`` the name of each one's picture."""

    image: torch.Tensor
    label: torch.Tensor
    picture: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, chosen: npt.ArrayLike) -> Patches:
        """Those at the given places, or where a mask is true."""
        index = np.asarray(chosen)
        if index.dtype == bool:
            index = index.nonzero()[0]
        place = torch.as_tensor(index, dtype=torch.int64)
        return Patches(self.image[place], self.label[place], self.picture[index])


def cut(folder: Path, *, step: int) -> Patches:
    """Patches of all pictures of a data set; the files have red and blue swapped."""
    images, labels, pictures = [], [], []
    for file in sorted((folder / "images").glob("*.jpg")):
        image = np.ascontiguousarray(read_tile_image(file)[..., ::-1])
        mask = read_tile_mask(folder / "masks" / file.name, threshold=127)
        for _x, _y, label, patch in cut_patches(image, mask, size=SIZE, center=CENTER, step=step):
            images.append(cv2.resize(patch, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
            labels.append(label)
            pictures.append(file.stem)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return Patches(stacked.contiguous(), torch.tensor(labels), np.array(pictures))


def made_up(pictures: int = 24, each: int = 24, seed: int = 0) -> Patches:
    """Nuclei on pink ground, two classes that overlap in size, number and darkness; every picture has its own stain."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    images, labels, names = [], [], []
    for picture in range(pictures):
        ground = np.array([225, 170, 205]) + rng.normal(0, 12, 3)
        ink = np.array([105, 60, 140]) + rng.normal(0, 12, 3)
        for number in range(each):
            label = number % 2
            image = np.broadcast_to(ground, (SIDE, SIDE, 3)) + rng.normal(0, 8, (SIDE, SIDE, 3))
            for _ in range(rng.poisson(7 - 1.5 * label)):
                x, y = rng.uniform(0, SIDE, 2)
                wide, high = rng.normal(2.2 + 0.7 * label, 0.6, 2).clip(1.0)
                inside = np.exp(-((((columns - x) / wide) ** 2 + ((rows - y) / high) ** 2) ** 2))[..., None]
                image = image * (1 - inside) + (ink + rng.normal(0, 10 + 8 * label, 3)) * inside
            images.append(image.clip(0, 255))
            labels.append(label)
            names.append(f"made-up-{picture:02d}")
    stacked = torch.from_numpy(np.stack(images).astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1.0
    return Patches(stacked.contiguous(), torch.tensor(labels), np.array(names))


class SmallClassifier(nn.Module):
    """(B, 3, 32, 32) → logits (B, 2); 70 thousand parameters, dropout before the last layer and in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(_layer(3, 24, 2), _layer(24, 32, 1))
        self.middle = nn.Sequential(_layer(32, 48, 2), nn.Dropout2d(0.1), _layer(48, 48, 1))
        self.late = nn.Sequential(_layer(48, 64, 2))
        self.head = nn.Sequential(nn.Dropout(0.4), nn.Linear(64, 2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.late(self.middle(self.early(image))).mean(dim=(2, 3)))


def _layer(before: int, after: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class Batches:
    """Endless balanced batches; ``extra`` makes half of every batch generated. A function of the seed alone.

    Flips, turns and small changes of the three stain-like color channels are the classic augmentation; ``turned`` alone
    flips and turns, as the GAN sees them.
    """

    names = ("labeled",)

    def __init__(
        self, real: Patches, *, seed: int, augment: str = "none", extra: Patches | None = None, size: int = BATCH
    ) -> None:
        self.real, self.extra, self.augment, self.seed, self.size = real, extra, augment, seed, size

    def __iter__(self) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
        generator = torch.Generator().manual_seed(self.seed)
        sources = [self.real] if self.extra is None else [self.real, self.extra]
        pools = [[(part.label == value).nonzero().squeeze(1) for value in (0, 1)] for part in sources]
        each = self.size // (2 * len(sources))
        while True:
            images, labels = [], []
            for part, pool in zip(sources, pools, strict=True):
                for value, own in enumerate(pool):
                    images.append(part.image[own[torch.randint(len(own), (each,), generator=generator)]])
                    labels += [value] * each
            yield {"labeled": {"image": self._augmented(torch.cat(images), generator), "label": torch.tensor(labels)}}

    def _augmented(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.augment == "none":
            return image
        turns = torch.randint(8, (len(image),), generator=generator).tolist()
        image = torch.stack(
            [
                torch.rot90(one.flip(2) if turn > 3 else one, turn % 4, (1, 2))
                for one, turn in zip(image, turns, strict=True)
            ]
        )
        if self.augment == "turned":
            return image
        gain = 1 + 0.08 * torch.randn(len(image), 3, 1, 1, generator=generator)
        shift = 0.08 * torch.randn(len(image), 3, 1, 1, generator=generator)
        return (image * gain + shift).clamp(-1, 1)


def train_classifier(batches: Batches, *, seed: int, steps: int) -> SmallClassifier:
    """A classifier after ``steps`` steps; its first weights depend on the seed alone."""
    torch.manual_seed(1000 + seed)
    network = SmallClassifier()
    method = Supervised(network, segmentation_loss=cross_entropy_loss)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    MethodTrainer("cpu", 1, batches, method, optimizer, lr_schedulers=schedule, epoch_length=steps, seed=seed).run()
    return network.eval()


@torch.inference_mode()
def score(network: nn.Module, patches: Patches) -> list[float]:
    """Probability of class 1 of every patch."""
    parts = [network(image).softmax(dim=1)[:, 1] for image in patches.image.split(256)]
    return [round(value, 4) for value in torch.cat(parts).tolist()]


def train_gan(task: str, real: Patches, fold: int, work: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The averaged generator of a fold, and what is known of its images."""
    torch.manual_seed(fold)
    width, steps = GAN_WIDTH[task], GAN_STEPS[task]
    method = HistoGAN(
        ConditionalGenerator(2, SIDE, latent=LATENT, width=width, attention_side=ATTENTION),
        ConditionalCritic(2, SIDE, width=width, attention_side=ATTENTION),
        classes=2, latent=LATENT, decay=0.998,
    )  # fmt: skip
    optimizers = {
        role: torch.optim.Adam(method.role_parameters(role), lr=rate, betas=(0.0, 0.9))
        for role, rate in (("generator", 3e-4), ("critic", 6e-4))
    }
    run_dir = work / f"gan-{fold}"
    items = [{"image": image, "label": label} for image, label in zip(real.image, real.label, strict=True)]
    samples = SynthesisSamples(run_dir, items, names=["normal", "tumor"], columns=12)
    trainer = MethodTrainer(
        "cpu", 6, Batches(real, seed=fold, augment="turned", size=GAN_BATCH), method, optimizers,
        epoch_length=steps // 6, seed=fold, handlers=[samples],
    )  # fmt: skip
    trainer.run()
    return method.deployed.eval(), samples.measures


@torch.inference_mode()
def generate(generator: nn.Module, method_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool: ``POOL`` images of each class."""
    label = torch.arange(2).repeat_interleave(POOL)
    codes = class_codes(label, LATENT, 2, torch.Generator().manual_seed(7000 + method_seed))
    return torch.cat([generator(part) for part in codes.split(100)]), label


def choose(scores: Scores, seed: int) -> dict[str, list[int]]:
    """Positions in the pool for every arm with generated images, equally many of each class but in ``all``."""
    by_rule = {
        "both": select(scores, keep=KEEP, confident=CONFIDENT),
        "confidence": select(scores, keep=KEEP, confident=CONFIDENT, rules=["confidence"]),
        "distance": select(scores, keep=KEEP, confident=CONFIDENT, rules=["distance"]),
    }
    # Where the classifier agrees with too few, the other arms get no more than the paper's.
    counts = {value: len(place) for value, place in by_rule["both"].items()}
    chosen = {
        arm: [i for v, place in found.items() for i in place[: counts[v]].tolist()] for arm, found in by_rule.items()
    }
    generator = torch.Generator().manual_seed(seed)
    chosen["random"] = []
    for value, count in counts.items():
        own = (scores.label == value).nonzero().squeeze(1)
        chosen["random"] += own[torch.randperm(len(own), generator=generator)[:count]].tolist()
    return chosen | {"all": list(range(len(scores)))}


def labeled_few(train: Patches, fold: int) -> Patches:
    """``LABELED`` patches of each class, drawn once per fold."""
    rng = np.random.default_rng(fold)
    classes = [np.flatnonzero(train.label.numpy() == value) for value in (0, 1)]
    return train.take(np.concatenate([rng.choice(own, LABELED, replace=False) for own in classes]))


def run_fold(task: str, fold: int, sets: dict[str, Patches], folder: Path, work: Path) -> None:
    """Train and score all arms of one fold, keeping each as soon as it is done."""
    path = folder / f"fold-{fold}.json"
    names = np.unique(sets["train"].picture)
    held_out = set(names[np.arange(len(names)) * FOLDS // len(names) == fold])
    train = sets["train"].take([name not in held_out for name in sets["train"].picture])
    tests = {"held out": sets["test"].take([name in held_out for name in sets["test"].picture])}
    tests |= {name: part for name, part in sets.items() if name not in ("train", "test")}
    few = labeled_few(train, fold)
    truth = {name: {"label": part.label.tolist(), "picture": part.picture.tolist()} for name, part in tests.items()}
    done: dict[str, Any] = {"fold": fold, "training_patches": len(train), "truth": truth, "scores": {}, "cpu_s": {}}
    if path.exists():
        done = json.loads(path.read_text())

    def keep() -> None:
        with atomic_write(path) as file:
            json.dump(done, file)

    wanted = {f"{arm}-{seed}" for arm in TITLES for seed in range(SEEDS)}
    if wanted <= set(done["scores"]):
        return
    image, label, scores = pool_of(task, fold, few, work, done)
    keep()
    for seed in range(SEEDS):
        chosen = choose(scores, seed)
        done["kept"] = {arm: len(places) for arm, places in chosen.items()}
        for arm in TITLES:
            name = f"{arm}-{seed}"
            if name in done["scores"]:
                continue
            started = time.process_time()
            extra = None
            if arm in chosen:
                place = torch.tensor(chosen[arm])
                extra = Patches(image[place], label[place], np.array(["generated"] * len(place)))
            real, augment = train if arm == "full" else few, "none" if arm == "real" else "classic"
            batches = Batches(real, seed=100 * fold + seed, augment=augment, extra=extra)
            network = train_classifier(batches, seed=seed, steps=STEPS[task])
            done["scores"][name] = {test: score(network, part) for test, part in tests.items()}
            done["cpu_s"][name] = round(time.process_time() - started, 1)
            keep()


def pool_of(
    task: str, fold: int, few: Patches, work: Path, done: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, Scores]:
    """Generated images of a fold with their classes and scores, made once."""
    file = work / f"generator-{fold}.pt"
    work.mkdir(parents=True, exist_ok=True)
    if file.exists() and "gan" in done:
        generator: nn.Module = ConditionalGenerator(
            2, SIDE, latent=LATENT, width=GAN_WIDTH[task], attention_side=ATTENTION
        )
        generator.load_state_dict(torch.load(file, weights_only=True))
        generator.eval()
    else:
        started = time.process_time()
        generator, done["gan"] = train_gan(task, few, fold, work)
        done["cpu_s"]["gan"] = round(time.process_time() - started, 1)
        with atomic_write(file, "wb") as out:
            torch.save(generator.state_dict(), out)
    image, label = generate(generator, fold)
    judge = train_classifier(Batches(few, seed=900 + fold, augment="classic"), seed=900 + fold, steps=STEPS[task])
    judging = SelectiveAugmentation(judge, ["early", "middle", "late"], batch_size=200)
    judging.fit([(few.image, few.label)])
    scores = judging.score(image, label)
    done["pool"] = {
        "agreed": [float((scores.predicted == label)[label == value].float().mean()) for value in (0, 1)],
        "entropy": [float(scores.entropy[label == value].median()) for value in (0, 1)],
    }
    kept = torch.cat(list(select(scores, keep=KEEP, confident=CONFIDENT).values()))
    columns = {"confidence": scores.confidence, "entropy": scores.entropy, "distance": scores.distance}
    write_pool(work / f"pool-{fold}", image, label, ["normal", "tumor"], scores=columns, kept=kept.tolist())
    return image, label, scores


def summarize(task: str, folder: Path) -> dict[str, Any]:
    """AUC of every arm and differences between arms, with intervals over pictures; and how sharp the data could be."""
    folds = [json.loads(path.read_text()) for path in sorted(folder.glob("fold-*.json"))]
    tests = list(folds[0]["truth"])
    result: dict[str, Any] = {
        "task": task, "folds": len(folds), "seeds": SEEDS, "labeled_per_class": LABELED, "pool_per_class": POOL,
        "keep": KEEP, "confident": CONFIDENT, "steps": STEPS[task], "gan_steps": GAN_STEPS[task], "batch": BATCH,
        "kept": [fold["kept"] for fold in folds], "gan": [fold["gan"] for fold in folds],
        "pool": [fold["pool"] for fold in folds], "training_patches": [fold["training_patches"] for fold in folds],
        "cpu_s": round(sum(sum(fold["cpu_s"].values()) for fold in folds)),
        "gan_cpu_s": [fold["cpu_s"]["gan"] for fold in folds], "tests": {},
        "command": "python benchmarks/histogan.py" + ("" if task == "camelyon" else f" --task {task}"),
    }  # fmt: skip
    for test in tests:
        table = {arm: _rows(folds, test, arm) for arm in TITLES}
        some = table["real"]
        entry: dict[str, Any] = {
            "pictures": len(set(some["picture"])), "arms": {}, "differences": {},
"patches": sum(len(fold["truth"][test]["label"]) for fold in (folds if test == "held out" else folds[:1])),
        }  # fmt: skip
        for arm, rows in table.items():
            own = _interval(auc_interval(rows["score"], rows["label"], patients=rows["picture"], strata=rows["model"]))
            right = (rows["score"] >= 0.5) == rows["label"].astype(bool)
            balanced = np.mean([right[rows["label"] == value].mean() for value in (0, 1)])
            entry["arms"][arm] = {**own, "balanced_accuracy": round(float(balanced), 4), "per_seed": _per_seed(rows)}
        for a, b in COMPARISONS:
            one, other = table[a], table[b]
            found = auc_difference(
                one["score"], other["score"], one["label"], patients=one["picture"], strata=one["model"]
            )
            entry["differences"][f"{a} - {b}"] = _interval(found) | {
                "seeds": [round(x - y, 4) for x, y in zip(_per_seed(one), _per_seed(other), strict=True)],
                "detectable": round(2.8 * (found.high - found.low) / (2 * 1.96), 4),
            }
        result["tests"][test] = entry
    return result


def _rows(folds: list[dict[str, Any]], test: str, arm: str) -> dict[str, npt.NDArray[Any]]:
    columns: dict[str, list[Any]] = {"score": [], "label": [], "picture": [], "model": [], "seed": []}
    for fold in folds:
        for seed in range(SEEDS):
            values = fold["scores"][f"{arm}-{seed}"][test]
            columns["score"] += values
            columns["label"] += fold["truth"][test]["label"]
            columns["picture"] += fold["truth"][test]["picture"]
            columns["model"] += [f"{fold['fold']}-{seed}"] * len(values)
            columns["seed"] += [seed] * len(values)
    return {name: np.array(values) for name, values in columns.items()}


def _per_seed(rows: dict[str, npt.NDArray[Any]]) -> list[float]:
    """AUC of each classifier seed, over all folds."""
    found = []
    for seed in range(SEEDS):
        own = rows["seed"] == seed
        area = auc_interval(rows["score"][own], rows["label"][own], strata=rows["model"][own], resamples=1)
        found.append(round(area.estimate, 4))
    return found


def _interval(found: Any) -> dict[str, float]:
    return {"auc": round(found.estimate, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def section(result: dict[str, Any]) -> str:
    """The results as Markdown, for docs/results.md."""
    data = {
        "camelyon": "32 CAMELYON16 lymph node tiles (CC0; slides and patients unknown, so tiles of one slide may be on "
        "both sides)",
        "ocdc": "10 tiles of one slide of oral carcinoma (OCDC, CC BY 4.0): one patient, so intervals over tiles say "
        "nothing about other patients",
        "demo": "made-up nuclei in 24 pictures, embedded; they say nothing about tissue",
    }[result["task"]]
    kept = [sum(kept["both"] for kept in result["kept"]) / len(result["kept"]), 2 * result["pool_per_class"]]
    lines = [
        f"## HistoGAN with selective augmentation: {result['task']}",
        "",
        f"{data}. {result['folds']} folds by picture with one GAN each, {result['seeds']} classifier seeds; "
        f"{result['labeled_per_class']} labeled patches per class, 32 px; {result['steps']} steps of {result['batch']} "
        f"in every arm, {result['gan_steps']} of {GAN_BATCH} for the GAN. Of {kept[1]} generated "
        f"images {kept[0]:.0f} are kept; K is "
        "the same in all selecting arms, which also use classic augmentation. AUC with 95 % bootstrap intervals over "
        "pictures; only scores of one model are compared with each other. The intervals hold for these GANs: two are "
        "too few to say how much another one would change.",
        "",
        f"`{result['command']}`",
    ]
    for test, entry in result["tests"].items():
        lines += [
            "",
            f"**{test.capitalize()}**: {entry['patches']} patches of {entry['pictures']} pictures.",
            "",
            "| arm | AUC | per classifier seed, lowest to highest | balanced accuracy |",
            "|---|---|---|---:|",
        ]
        for arm, row in entry["arms"].items():
            seeds = sorted(row["per_seed"])
            lines.append(
                f"| {TITLES[arm]} | {row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {seeds[0]:.3f} to "
                f"{seeds[-1]:.3f} | {row['balanced_accuracy']:.3f} |"
            )
        lines += ["", "| difference in AUC | 95 % interval | seeds in favor | detectable at 80 % power | reading |"]
        lines += ["|---|---|---:|---:|---|"]
        for name, row in entry["differences"].items():
            reading = "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "not shown to differ"
            favor = sum(value > 0 for value in row["seeds"])
            lines.append(
                f"| {name}: {row['auc']:+.3f} | [{row['low']:+.3f}, {row['high']:+.3f}] | {favor} of "
                f"{len(row['seeds'])} | {row['detectable']:.3f} | {reading} |"
            )
    measured = result["gan"]
    lines += [
        "",
        "The GANs' images against the patches they learned from, in the features of a fixed random network (comparable "
        "only within this table): "
        + "; ".join(
            f"fold {n}: FID {m['fid']:.3f}, KID {m['kid']:.4f}, density {m['density']:.2f}, coverage "
            f"{m['coverage']:.2f}"
            for n, m in enumerate(measured)
        )
        + f". CPU seconds on one core: {result['cpu_s']} in all, {', '.join(f'{s:.0f}' for s in result['gan_cpu_s'])} "
        "of them for the GANs.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(STEPS), default="camelyon")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "histogan", help="generators and pools")
    parser.add_argument("--report", action="store_true", help="only summarize what is there")
    options = parser.parse_args()
    name = f"histogan_{options.task}"
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if not options.report:
        if options.task == "demo":
            patches = made_up()
            sets = {"train": patches, "test": patches}
        else:
            own = options.data / FOLDERS[options.task]
            sets = {"train": cut(own, step=SIZE // 2), "test": cut(own, step=SIZE)}
        if options.task == "camelyon":
            sets["oral tiles"] = cut(options.data / FOLDERS["ocdc"], step=SIZE)
        for fold in range(FOLDS):
            run_fold(options.task, fold, sets, folder, options.work / options.task)
    summary = summarize(options.task, folder)
    with atomic_write(RESULTS / f"{name}.json") as file:
        json.dump(summary, file, indent=1)
        file.write("\n")
    with atomic_write(RESULTS / f"{name}.md") as file:
        file.write(section(summary))
    print(section(summary))


if __name__ == "__main__":
    main()
