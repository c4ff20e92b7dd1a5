"""Self-supervised teacher, distilled student: against what else could explain a gain, at equal numbers of updates.

    python benchmarks/ssl_kd.py --task idrid --data DIR    referable retinopathy, real photographs
    python benchmarks/ssl_kd.py --task demo                simulated lesions on scikit-image's photograph of a retina
    python benchmarks/ssl_kd.py --task idrid --report      only summarize the seeds already computed

DIR holds idrid_grading (IDRiD, CC BY 4.0): 413 photographs to train on, 103 to test on, the official split; copies of a
photograph within the training set and in both sets are left out of training. Referable is grade 2 and more. A seed is
a subset of labeled photographs, half of them of each class, together with the initial weights; the other photographs
are used without labels. Every network is updated equally often, PRETRAINING +
FINE_TUNING times in all, with one optimizer setting; nothing was chosen on test photographs; the last iterate counts.
Arms (T: the teacher's small ResNet, S: the student's, twice as deep):

- supervised: T on the labels alone.
- teacher: T, SimCLR on all photographs, then fine-tuned on the labels.
- student_kd: S from the teacher's hard labels of the unlabeled photographs alone.
- student: S, the same, then fine-tuned: the whole method.
- self_distilled: T from new initial weights instead of S: is it the larger network?
- student_supervised: S on the labels alone, from the student's initial weights.
- student_train_mode: the student of a teacher left in train mode, as released.

Scored on the test photographs and on the same ones with changed colors, gamma and vignette, "another camera" simulated.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from fundus_demo import simulated_photographs
from fundus_views import normalized, other_camera, strong_view, weak_view
from monai.networks.nets import ResNet
from torch import nn

from medkd.data.atomic import atomic_write
from medkd.data.cards import load_card
from medkd.data.fundus import crop_fundus
from medkd.data.idrid import idrid_cases, referable
from medkd.data.tile_images import read_tile_image
from medkd.engine import Method, MethodTrainer
from medkd.losses.classification import cross_entropy_loss
from medkd.methods.ssl_kd import SSLKD, SimCLR
from medkd.methods.supervised import Supervised
from medkd.nets.projection import projection_head

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SIDE = 64
WIDTHS = [16, 32, 64, 128]
PRETRAINING, FINE_TUNING = 200, 80
BATCH, CONTRASTIVE_BATCH = 32, 64
RATE, DECAY = 1e-3, 1e-4
SEEDS = 5
RESAMPLES = 4000
TITLES = {
    "supervised": "supervised, T",
    "teacher": "teacher: SimCLR + fine-tuning, T",
    "student_kd": "student, distilled only, S",
    "student": "student, distilled + fine-tuned, S",
    "self_distilled": "the same with T (self-distillation)",
    "student_supervised": "supervised, S, the student's initial weights",
    "student_train_mode": "student of a teacher in train mode (as released)",
}
FEW_ARMS = ("supervised", "teacher", "student", "student_supervised")
ARMS: dict[str, dict[str, tuple[str, ...]]] = {  # task → share of labels → arms
    "idrid": {"0.1": tuple(TITLES), "0.02": FEW_ARMS},
    "demo": {"0.1": FEW_ARMS},
}
PAIRS = [
    ("teacher", "supervised"),
    ("student", "teacher"),
    ("student", "student_supervised"),
    ("student", "self_distilled"),
    ("student", "student_kd"),
    ("student", "student_train_mode"),
]


@dataclass(frozen=True)
class Photographs:
    """Images (N, 3, SIDE, SIDE) uint8 with 0 or 1 each; ``names`` of the test images."""

    title: str
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    names: list[str]


class TrainModeSSLKD(SSLKD):
    """As released: the frozen teacher's BatchNorm uses and collects statistics of the batches it labels."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the teacher too."""
        super().train(mode)
        self.teacher.train(mode)
        return self


def load(task: str, data: Path, work: Path) -> Photographs:
    """A task's photographs, cropped and scaled once and kept in ``work``."""
    if task == "demo":
        train, train_labels, test, test_labels = simulated_photographs(SIDE)
        names = [f"simulated-{place}" for place in range(len(test))]
        title = "simulated lesions on one photograph of a healthy retina"
    else:
        cached = work / f"idrid-{SIDE}.npz"
        if not cached.exists():
            made: dict[str, Any] = {}
            root = data / "idrid_grading"
            for split, cases in idrid_cases(root, load_card("idrid")).items():
                made[split] = np.stack([crop_fundus(read_tile_image(root / case.image), SIDE) for case in cases])
                made[f"{split}_labels"] = np.array([referable(case).label for case in cases], dtype=np.int64)
                made[f"{split}_names"] = np.array([case.image for case in cases])
            with atomic_write(cached, "wb") as out:
                np.savez_compressed(out, **made)
        with np.load(cached, allow_pickle=False) as found:
            train, train_labels, test, test_labels = (
                found[name] for name in ("training", "training_labels", "test", "test_labels")
            )
            names = found["test_names"].tolist()
        title = "referable retinopathy (grade 2 and more), IDRiD"
    first, second = (torch.from_numpy(part).movedim(-1, 1).contiguous() for part in (train, test))
    return Photographs(title, first, torch.from_numpy(train_labels), second, torch.from_numpy(test_labels), names)


class Batches:
    """Endless batches of one stream, augmented as a whole: a round over the images, reshuffled, and again."""

    def __init__(
        self, stream: str, size: int, seed: int, make: Callable[[torch.Tensor, torch.Generator], dict[str, Any]],
        count: int,
    ) -> None:  # fmt: skip
        self.names, self.stream, self.size, self.seed, self.make, self.count = (
            (stream,),
            stream,
            size,
            seed,
            make,
            count,
        )

    def __iter__(self) -> Iterator[dict[str, dict[str, Any]]]:
        generator = torch.Generator().manual_seed(self.seed)
        waiting = torch.empty(0, dtype=torch.long)
        while True:
            while len(waiting) < self.size:
                waiting = torch.cat([waiting, torch.randperm(self.count, generator=generator)])
            chosen, waiting = waiting.split([self.size, len(waiting) - self.size])
            yield {self.stream: self.make(chosen, generator)}


def fit(method: Method, batches: Batches, steps: int, seed: int) -> None:
    """The one setting of all trainings: Adam with decoupled weight decay, linear decay of the rate."""
    parameters = method.role_parameters(method.roles[0])
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=1.0)
    MethodTrainer(
        "cpu",
        1,
        batches,
        method,
        optimizer,
        lr_schedulers=schedule,
        epoch_length=steps,
        clip_norm=5.0,
        seed=seed,
        channels_last=True,
    ).run()


def network(blocks: int, seed: int) -> ResNet:
    """A ResNet of four stages for two classes."""
    torch.manual_seed(seed)
    return ResNet("basic", [blocks] * 4, WIDTHS, spatial_dims=2, n_input_channels=3, num_classes=2, conv1_t_size=3,
                  conv1_t_stride=2)  # fmt: skip


class Trainings:
    """The trainings of one seed and share of labels."""

    def __init__(self, photographs: Photographs, seed: int, share: float, encoder: Callable[[], ResNet]) -> None:
        self.data, self.seed, self.encoder = photographs, seed, encoder
        self.labeled = labeled_subset(photographs.train_labels, share, seed)
        kept = torch.ones(len(photographs.train), dtype=torch.bool)
        kept[self.labeled] = False
        self.unlabeled = kept.nonzero().squeeze(1)
        self.networks: dict[str, nn.Module] = {}

    def run(self, arm: str) -> nn.Module:
        """The arm's network, trained once."""
        if arm not in self.networks:
            self.networks[arm] = self._train(arm)
        return self.networks[arm]

    def _train(self, arm: str) -> nn.Module:
        whole = PRETRAINING + FINE_TUNING
        if arm == "supervised":
            return self._supervise(network(1, self.seed), whole)
        if arm == "teacher":
            return self._supervise(copy.deepcopy(self.encoder()), FINE_TUNING)
        if arm == "student_supervised":
            return self._supervise(network(2, self.seed + 100), whole)
        teacher = copy.deepcopy(self.run("teacher"))
        if arm == "student_kd":
            return self._distil(network(2, self.seed + 100), teacher, whole)
        method = TrainModeSSLKD if arm == "student_train_mode" else SSLKD
        fresh = network(1, self.seed + 200) if arm == "self_distilled" else network(2, self.seed + 100)
        return self._supervise(self._distil(fresh, teacher, PRETRAINING, method), FINE_TUNING)

    def _supervise(self, student: nn.Module, steps: int) -> nn.Module:
        def batch(chosen: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
            index = self.labeled[chosen]
            return {"image": weak_view(self.data.train[index], generator), "label": self.data.train_labels[index]}

        method = Supervised(student, segmentation_loss=cross_entropy_loss)
        fit(method, Batches("labeled", BATCH, self.seed, batch, len(self.labeled)), steps, self.seed)
        return student

    def _distil(self, student: nn.Module, teacher: nn.Module, steps: int, method: type[SSLKD] = SSLKD) -> nn.Module:
        def batch(chosen: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
            return {"image": weak_view(self.data.train[self.unlabeled[chosen]], generator)}

        fit(
            method(student, teacher),
            Batches("unlabeled", BATCH, self.seed, batch, len(self.unlabeled)),
            steps,
            self.seed,
        )
        return student


def labeled_subset(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Indices of a share of the images, half of each class as in the released sampling script."""
    generator = torch.Generator().manual_seed(1000 + seed)
    count = round(share * len(labels))
    chosen = []
    for label, size in ((0, count // 2), (1, count - count // 2)):
        own = (labels == label).nonzero().squeeze(1)
        chosen.append(own[torch.randperm(len(own), generator=generator)[:size]])
    return torch.cat(chosen)


def self_supervised(photographs: Photographs, seed: int, file: Path) -> ResNet:
    """T after SimCLR on all photographs; kept in a file, since it serves every share of labels."""
    encoder = network(1, seed)
    if not file.exists():

        def batch(chosen: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
            images = photographs.train[chosen]
            return {"image": strong_view(images, generator), "second_view": strong_view(images, generator)}

        method = SimCLR(encoder, projection_head(WIDTHS[-1]))
        fit(method, Batches("unlabeled", CONTRASTIVE_BATCH, seed, batch, len(photographs.train)), PRETRAINING, seed)
        with atomic_write(file, "wb") as out:
            torch.save(encoder.state_dict(), out)
    encoder.load_state_dict(torch.load(file, weights_only=True))
    return encoder


@torch.inference_mode()
def score(trained: nn.Module, images: torch.Tensor) -> list[float]:
    """Probability of class 1 of every image."""
    trained.eval()
    found = [torch.softmax(trained(normalized(part)), dim=1)[:, 1] for part in images.split(128)]
    return [round(value, 6) for value in torch.cat(found).tolist()]


def run_seed(task: str, photographs: Photographs, seed: int, folder: Path, work: Path) -> None:
    """All arms of one seed that are missing, each kept as soon as it is done."""
    path = folder / f"seed-{seed}.json"
    done = json.loads(path.read_text()) if path.exists() else {"seed": seed, "scores": {}, "cpu_s": {}}
    shifted = other_camera(photographs.test)
    encoder = partial(self_supervised, photographs, seed, work / f"ssl-{task}-{seed}.pt")
    for key, arms in ARMS[task].items():
        trainings = Trainings(photographs, seed, float(key), encoder)
        done["scores"].setdefault(key, {})
        done["cpu_s"].setdefault(key, {})
        for arm in arms:
            if arm in done["scores"][key]:
                continue
            started = time.process_time()
            trained = trainings.run(arm)
            done["cpu_s"][key][arm] = round(time.process_time() - started, 1)
            done["scores"][key][arm] = {"test": score(trained, photographs.test), "shifted": score(trained, shifted)}
            with atomic_write(path) as file:
                json.dump(done, file)


class Resamples:
    """AUCs of resampled test images of resampled seeds; the same resamples for every arm."""

    def __init__(self, labels: np.ndarray, seeds: int) -> None:
        self.positive = labels == 1
        generator = np.random.default_rng(0)
        images = generator.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES).astype(float)
        self.up, self.down = images[:, self.positive], images[:, ~self.positive]
        self.seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds

    def areas(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For (seeds, images) scores: the AUC of each seed, and the mean AUC of each resample."""
        ups, downs = scores[:, self.positive, None], scores[:, None, ~self.positive]
        wins = (ups > downs) + 0.5 * (ups == downs)
        pairs = self.up.sum(axis=1) * self.down.sum(axis=1)
        resampled = np.einsum("rp,spn,rn->rs", self.up, wins, self.down, optimize=True) / pairs[:, None]
        return wins.mean(axis=(1, 2)), (self.seeds * resampled).sum(axis=1)


def summarize(task: str, photographs: Photographs, folder: Path) -> dict[str, Any]:
    """AUC of every arm and of the differences, with intervals over images and label subsets."""
    seeds = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    resamples = Resamples(photographs.test_labels.numpy(), len(seeds))
    labels = photographs.train_labels
    result: dict[str, Any] = {
        "task": task, "title": photographs.title, "command": f"python benchmarks/ssl_kd.py --task {task}",
        "seeds": len(seeds), "train": len(labels), "train_positive": int(labels.sum()),
        "test": len(photographs.test_labels), "test_positive": int(photographs.test_labels.sum()),
        "steps": {"pretraining or distillation": PRETRAINING, "fine-tuning": FINE_TUNING},
        "parameters": {
            name: sum(p.numel() for p in network(blocks, 0).parameters()) for name, blocks in (("T", 1), ("S", 2))
        },
        "cpu_s": round(sum(sum(own.values()) for seed in seeds for own in seed["cpu_s"].values())), "shares": {},
    }  # fmt: skip
    for key, arms in ARMS[task].items():
        found = {
            (arm, kind): resamples.areas(np.array([seed["scores"][key][arm][kind] for seed in seeds]))
            for arm in arms
            for kind in ("test", "shifted")
        }
        part: dict[str, Any] = {"labeled": len(labeled_subset(labels, float(key), 0)), "arms": {}, "differences": {}}
        for (arm, kind), (each, drawn) in found.items():
            own = part["arms"].setdefault(arm, {})
            own[kind] = _interval(each.mean(), drawn) | {"per_seed": [round(float(value), 4) for value in each]}
        for a, b in PAIRS:
            if a not in arms or b not in arms:
                continue
            part["differences"][f"{a} - {b}"] = {
                kind: _interval((found[a, kind][0] - found[b, kind][0]).mean(), found[a, kind][1] - found[b, kind][1])
                for kind in ("test", "shifted")
            }
        result["shares"][key] = part
    return result


def _interval(estimate: float, drawn: np.ndarray) -> dict[str, Any]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    # 1.96 + 0.84 standard errors: a difference of this size would be found four times in five.
    numbers = {"auc": estimate, "low": low, "high": high, "smallest_effect": 2.8 * drawn.std(ddof=1)}
    return {name: round(float(value), 4) for name, value in numbers.items()}


def section(result: dict[str, Any]) -> str:
    """The results as Markdown, for docs/results.md."""
    pretraining, fine_tuning = result["steps"].values()
    sizes = result["parameters"]
    lines = [
        f"## Self-supervised teacher, distilled student: {result['title']}",
        "",
        f"{result['train']} photographs to train on ({result['train_positive']} positive), {result['test']} to test on "
        f"({result['test_positive']} positive), {SIDE} × {SIDE} px. {result['seeds']} label subsets, half of each "
        f"class; all other photographs are used without labels. T: ResNet, {sizes['T']:,} parameters; S: twice as "
        f"deep, {sizes['S']:,}. Every network gets {pretraining + fine_tuning} updates: {pretraining} of SimCLR or of "
        f"distillation (hard labels) and {fine_tuning} on labels, or all of one kind. Nothing was chosen on test "
        "photographs. AUC, "
        "mean over label subsets, with 95 % bootstrap intervals that resample photographs and label subsets. "
        "*Smallest effect*: what these data would show four times in five. *Other camera*: the test photographs with "
        "simulated changes of color, gamma and vignette.",
        "",
        f"`{result['command']}` ({result['cpu_s'] / 60:.0f} CPU minutes)",
        "",
    ]  # fmt: skip
    for share, part in result["shares"].items():
        lines += [
            f"### {part['labeled']} labeled photographs ({100 * float(share):g} %)",
            "",
            "| arm | AUC | AUC, other camera | AUC per label subset |",
            "|---|---|---|---|",
        ]
        for arm, row in part["arms"].items():
            each = ", ".join(f"{value:.3f}" for value in row["test"]["per_seed"])
            lines.append(f"| {TITLES[arm]} | {_auc(row['test'])} | {_auc(row['shifted'])} | {each} |")
        lines += [
            "",
            "| difference in AUC | test | smallest effect | reading | other camera |",
            "|---|---|---:|---|---|",
        ]
        for name, pair in part["differences"].items():
            own = pair["test"]
            reading = "better" if own["low"] > 0 else "worse" if own["high"] < 0 else "no difference shown"
            lines.append(
                f"| {name.replace('_', ' ').replace(' - ', ' − ')} | {_auc(own, '+')} | {own['smallest_effect']:.3f} "
                f"| {reading} | {_auc(pair['shifted'], '+')} |"
            )
        lines.append("")
    return "\n".join([*lines, NOTES[result["task"]], ""])


def _auc(row: Mapping[str, float], sign: str = "") -> str:
    return f"{row['auc']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


NOTES = {
    "idrid": """\
The claim under test is *student − teacher*, on the other camera too; *student − self distilled* says how much of it is
the larger network. IDRiD has no table of patients: the split is the official one, by photograph, so both eyes of a
patient may be on both sides; copies of one photograph are left out of training. At 64 px small lesions are gone, and
the self-supervised stage is short. Not tested: an external set of photographs (Messidor-2), the paper's 57,146
photographs and network sizes, ImageNet initialization.""",
    "demo": """\
The lesions are drawn: the table shows that the pipeline runs and what its arms do, not that it helps in a clinic.""",
}


def main() -> None:
    """Run what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(ARMS), default="demo")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with idrid_grading")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ssl_kd")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--report", action="store_true", help="only summarize what is there")
    options = parser.parse_args()
    folder = RESULTS / f"ssl_kd_{options.task}"
    for place in (folder, options.work):
        place.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    photographs = load(options.task, options.data, options.work)
    for seed in () if options.report else options.seeds:
        run_seed(options.task, photographs, seed, folder, options.work)
    result = summarize(options.task, photographs, folder)
    with atomic_write(RESULTS / f"{folder.name}.json") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    page = section(result)
    with atomic_write(RESULTS / f"{folder.name}.md") as file:
        file.write(page)
    print(page)


if __name__ == "__main__":
    main()
