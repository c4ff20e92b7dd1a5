"""The bundle tissue_classification: cut the patches, train teacher and students, score them, ship the weights.

    python benchmarks/tissue_classification.py --data DIR --work DIR    everything, about ten minutes on one thread
    python benchmarks/tissue_classification.py --report                 only summarize the folds already computed
    python benchmarks/tissue_classification.py --ship --work DIR        put the weights into bundles/

DIR of --data holds camelyon_tiles and bcss_rois (both CC0). Networks, augmentation, optimizers and steps are those of
bundles/tissue_classification/configs/train.json, run through MONAI's own parser; nothing is repeated here.

Three folds: a third of the lymph node tiles (blocks of neighboring numbers, which may be of one slide) and one of the
three breast regions are held out in turn. Per fold one teacher; per fold and seed a supervised student and one
distilled from that teacher, from the same initial weights, over the same batches and steps. The final iterate is
scored; nothing is chosen on the held-out tiles. Shipped: the distilled student of fold 0, seed 0, decided beforehand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from PIL import Image

from medkd.data.atomic import atomic_write
from medkd.data.datalists import Case, Datalist, read_datalist, write_datalist
from medkd.data.tile_images import read_tile_image, read_tile_mask
from medkd.deploy.trust import read_config
from medkd.metrics.roc import auc_difference, auc_interval
from medkd.wsi.patches import cut_patches

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "tissue_classification"
RESULTS = ROOT / "benchmarks" / "results"
FOLDS, SEEDS = 3, 3
SIZE, CENTER, MPP = 96, 32, 0.5
SHIPPED = {"fold": 0, "seed": 0, "arm": "kd"}
# The files do not say their resolution. Lymphocyte nuclei, 6 to 8 µm, measure about 13 px in camelyon_tiles, so these
# are taken as 0.5 µm per pixel; bcss_rois are twice as fine, as BCSS is published (0.25).
SOURCES = {"camelyon": ("camelyon_tiles", 0.5), "bcss": ("bcss_rois", 0.25)}


def cut(data: Path, work: Path) -> Path:
    """Write all patches as PNG with a datalist that has folds; both sources store red and blue swapped."""
    cases: list[Case] = []
    for domain, (folder, mpp) in SOURCES.items():
        files = sorted((data / folder / "images").glob("*.jpg"))
        for number, file in enumerate(files):
            image = read_tile_image(file)[..., ::-1]
            mask = read_tile_mask(data / folder / "masks" / file.name, threshold=127)
            if mpp != MPP:
                size = tuple(round(side * mpp / MPP) for side in mask.shape[::-1])
                image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
                mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
            place = {"patient": f"{domain}-{file.stem}", "domain": domain, "fold": number * FOLDS // len(files)}
            for x, y, label, patch in cut_patches(image, mask, size=SIZE, center=CENTER, step=SIZE // 2):
                name = Path("patches", f"{domain}-{file.stem}_x{x}_y{y}.png")
                (work / name.parent).mkdir(parents=True, exist_ok=True)
                with atomic_write(work / name, "wb") as out:
                    Image.fromarray(np.ascontiguousarray(patch)).save(out, format="PNG")
                cases.append(Case(image=str(name), label=label, x=x, y=y, **place))
    listed = Datalist(
        name="tumor in 96 px patches", modality="H&E", labels={"0": "normal", "1": "tumor"}, training=cases,
        dataset_dir=work,
    )  # fmt: skip
    write_datalist(listed, work / "datalist.json")
    return work / "datalist.json"


def recipe(work: Path, fold: int, seed: int, run_dir: Path, *overlays: str) -> ConfigParser:
    """The bundle's training configuration for one run; weights of new networks depend on the seed alone."""
    files = [BUNDLE / "configs" / f"{name}.json" for name in ("train", *overlays)]
    config = {**read_config(*files), "dataset_dir": str(work), "datalist": str(work / "datalist.json"), "fold": fold}
    config |= {"seed": seed, "run_dir": str(run_dir), "output_weights": str(run_dir / "model.pt")}
    config["validate"]["dataset"]["data"] = []  # held-out tiles are scored once, below
    shutil.rmtree(run_dir, ignore_errors=True)
    parser = ConfigParser(config)
    set_determinism(1000 * fold + seed)
    parser.get_parsed_content("network_def")  # first, so that both arms begin with the same weights
    return parser


def train_teacher(work: Path, fold: int) -> tuple[dict[str, torch.Tensor], float]:
    """Weights of the fold's teacher and the CPU seconds they took."""
    file = work / f"teacher-{fold}.pt"
    parser = recipe(work, fold, 0, work / "runs" / f"teacher-{fold}")
    network = parser.get_parsed_content("teacher_def")
    started = time.process_time()
    if not file.exists():
        parser.get_parsed_content("teacher#trainer").run()
        with atomic_write(file, "wb") as out:
            torch.save(network.state_dict(), out)
    return torch.load(file, weights_only=True), time.process_time() - started


def held_out(work: Path, fold: int) -> list[dict[str, Any]]:
    """The fold's held-out patches that do not overlap."""
    items = read_datalist(work / "datalist.json").section("validation", fold=fold)
    return [item for item in items if item["x"] % SIZE == 0 and item["y"] % SIZE == 0]


@torch.inference_mode()
def score(parser: ConfigParser, network: torch.nn.Module, items: list[dict[str, Any]]) -> list[float]:
    """Tumor probability of every item, in float32."""
    prepare = parser.get_parsed_content("validate#preprocessing")
    network = network.float().eval()
    found: list[float] = []
    for start in range(0, len(items), 64):
        batch = torch.stack([prepare(dict(item))["image"].as_tensor() for item in items[start : start + 64]])
        found += torch.softmax(network(batch), dim=1)[:, 1].tolist()
    return [round(value, 5) for value in found]


def run_fold(work: Path, fold: int, folder: Path) -> None:
    """Train and score all arms of one fold, keeping each as soon as it is done."""
    path = folder / f"fold-{fold}.json"
    items = held_out(work, fold)
    truth = [{key: item[key] for key in ("case", "patient", "domain", "label")} for item in items]
    done = json.loads(path.read_text()) if path.exists() else {"fold": fold, "cases": truth, "scores": {}, "cpu_s": {}}
    weights, seconds = train_teacher(work, fold)

    def keep(name: str, parser: ConfigParser, network: torch.nn.Module, seconds: float) -> None:
        done["scores"][name] = score(parser, network, items)
        done["cpu_s"][name] = round(seconds, 1)
        with atomic_write(path) as file:
            json.dump(done, file)

    if "teacher" not in done["scores"]:
        parser = recipe(work, fold, 0, work / "runs" / "scoring")
        parser.get_parsed_content("teacher_def").load_state_dict(weights)
        keep("teacher", parser, parser.get_parsed_content("teacher_def"), seconds)
    for seed in range(SEEDS):
        for arm, overlays in (("supervised", ("supervised",)), ("kd", ())):
            name = f"{arm}-{seed}"
            if name in done["scores"]:
                continue
            started = time.process_time()
            parser = recipe(work, fold, seed, work / "runs" / f"{name}-{fold}", *overlays)
            parser.get_parsed_content("teacher_def").load_state_dict(weights)
            parser.get_parsed_content("train#trainer").run()
            keep(name, parser, parser.get_parsed_content("network_def"), time.process_time() - started)


def summarize(folder: Path) -> dict[str, Any]:
    """AUC of every arm over all folds and seeds, over all tiles and per source, and the difference of the students."""
    folds = [json.loads(path.read_text()) for path in sorted(folder.glob("fold-*.json"))]
    config = read_config(BUNDLE / "configs" / "train.json")
    labels = {"labels": {"0": "normal", "1": "tumor"}}
    parser = ConfigParser({**labels, "student": config["network_def"], "teacher": config["teacher_def"]})
    parameters = {
        role: sum(p.numel() for p in parser.get_parsed_content(role).parameters()) for role in ("student", "teacher")
    }
    names = {"supervised": range(SEEDS), "kd": range(SEEDS), "teacher": [None]}
    table = {
        arm: [
            {**case, "score": value, "model": f"{fold['fold']}-{seed}"}
            for fold in folds
            for seed in seeds
            for case, value in zip(
                fold["cases"], fold["scores"][arm if seed is None else f"{arm}-{seed}"], strict=True
            )
        ]
        for arm, seeds in names.items()
    }  # fmt: skip
    result: dict[str, Any] = {
        "task": "tissue_classification", "title": "tumor in 96 px patches at 0.5 µm per pixel",
        "command": "python benchmarks/tissue_classification.py", "parameters": parameters,
        "folds": len(folds), "seeds": SEEDS,
        "patches": sum(len(fold["cases"]) for fold in folds),
        "tumor": sum(case["label"] for fold in folds for case in fold["cases"]),
        "groups": len({case["patient"] for fold in folds for case in fold["cases"]}),
        "batch": config["batch_size"], "steps": config["epoch_length"] * config["train"]["trainer"]["max_epochs"],
        "teacher_steps": config["epoch_length"] * config["teacher_epochs"],
        "temperature": config["temperature"], "kd_weight": config["kd_weight"],
        "cpu_s": {name: [fold["cpu_s"][name] for fold in folds] for name in folds[0]["cpu_s"]},
        "arms": {}, "differences": {},
    }  # fmt: skip
    for arm, rows in table.items():
        result["arms"][arm] = {domain: _auc(rows, domain) for domain in ("all", *SOURCES)}
        result["arms"][arm]["per_model"] = {
            model: _auc([row for row in rows if row["model"] == model], "all")["auc"]
            for model in sorted({row["model"] for row in rows})
        }
    for domain in ("all", *SOURCES):
        result["differences"][domain] = _difference(table["kd"], table["supervised"], domain)
    shipped = next(fold for fold in folds if fold["fold"] == SHIPPED["fold"])
    rows = [
        {**case, "score": value, "model": "shipped"}
        for case, value in zip(shipped["cases"], shipped["scores"][f"{SHIPPED['arm']}-{SHIPPED['seed']}"], strict=True)
    ]
    result["shipped"] = {**SHIPPED, **{domain: _auc(rows, domain) for domain in ("all", *SOURCES)}}
    return result


def _columns(rows: list[dict[str, Any]], domain: str) -> dict[str, list[Any]]:
    chosen = [row for row in rows if domain in ("all", row["domain"])]
    return {key: [row[key] for row in chosen] for key in ("score", "label", "patient", "model")}


def _auc(rows: list[dict[str, Any]], domain: str) -> dict[str, Any]:
    own = _columns(rows, domain)
    return _numbers(auc_interval(own["score"], own["label"], patients=own["patient"], strata=own["model"]))


def _difference(a: list[dict[str, Any]], b: list[dict[str, Any]], domain: str) -> dict[str, Any]:
    first, second = _columns(a, domain), _columns(b, domain)
    return _numbers(
        auc_difference(
            first["score"], second["score"], first["label"], patients=first["patient"], strata=first["model"]
        )
    )  # fmt: skip


def _numbers(interval: Any) -> dict[str, Any]:
    bounds = [None if np.isnan(bound) else round(bound, 4) for bound in (interval.low, interval.high)]
    return {"auc": round(interval.estimate, 4), "low": bounds[0], "high": bounds[1], "groups": interval.n_patients}


def section(result: dict[str, Any]) -> str:
    """The results as Markdown, for docs/results.md."""
    titles = {"teacher": "teacher", "kd": "student, distilled", "supervised": "student, labels alone"}
    sizes = result["parameters"]
    lines = [
        f"## Tissue classification: {result['title']}",
        "",
        f"{result['patches']} patches ({result['tumor']} tumor) of {result['groups']} pictures: 32 CAMELYON16 lymph "
        f"node tiles and 3 BCSS breast regions, both CC0 and taken as 0.5 and 0.25 µm per pixel. {result['folds']} "
        f"folds by picture, {result['seeds']} seeds of every student, one teacher per fold. Teacher: "
        f"{sizes['teacher']:,} parameters, {result['teacher_steps']} steps; student: {sizes['student']:,} "
        f"(**{sizes['teacher'] / sizes['student']:.1f}× fewer**), {result['steps']} steps of {result['batch']}. "
        f"T = {result['temperature']:g}, KD weight {result['kd_weight']:g}. AUC with 95 % bootstrap intervals over "
        "pictures; only scores of one model are compared with each other. Slides and patients of the lymph node tiles "
        "are unknown, so tiles of one slide may be on both sides. An interval over three pictures is far too narrow.",
        "",
        f"`{result['command']}`",
        "",
        "| arm | AUC, all | 32 lymph node tiles | 3 breast regions | per model, lowest to highest |",
        "|---|---|---|---|---|",
    ]
    for arm, title in titles.items():
        row = result["arms"][arm]
        models = sorted(row["per_model"].values())
        numbers = " | ".join(interval_text(row[domain]) for domain in ("all", *SOURCES))
        lines.append(f"| {title} | {numbers} | {models[0]:.3f} to {models[-1]:.3f} |")
    difference = result["differences"]["all"]
    low, high = difference["low"], difference["high"]
    reading = "better" if low > 0 else "worse" if high < 0 else "not shown to differ"
    lines += [
        "",
        f"Distilled minus labels alone: {difference['auc']:+.3f} [{low:+.3f}, {high:+.3f}]: {reading}. Shipped are the "
        f"weights of the distilled student of fold {result['shipped']['fold']}, seed {result['shipped']['seed']}, as "
        f"decided beforehand: {interval_text(result['shipped']['all'])} on the pictures it never saw.",
        "",
    ]
    return "\n".join(lines)


def interval_text(row: dict[str, Any]) -> str:
    """An AUC with its interval."""
    if row["low"] is None:
        return f"{row['auc']:.3f}"
    return f"{row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def ship(work: Path) -> None:
    """Put the weights decided beforehand into the bundle."""
    weights = work / "runs" / f"{SHIPPED['arm']}-{SHIPPED['seed']}-{SHIPPED['fold']}" / "model.pt"
    state = torch.load(weights, weights_only=True)
    (BUNDLE / "models").mkdir(exist_ok=True)
    with atomic_write(BUNDLE / "models" / "model.pt", "wb") as file:
        torch.save(state, file)


def main() -> None:
    """Run what is missing, then write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "tissue_classification")
    parser.add_argument("--report", action="store_true", help="only summarize what is there")
    parser.add_argument("--ship", action="store_true", help="only copy the weights into the bundle")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    options = parser.parse_args()
    folder = RESULTS / "tissue_classification"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if options.ship:
        ship(options.work)
        return
    if not options.report:
        options.work.mkdir(parents=True, exist_ok=True)
        if not (options.work / "datalist.json").exists():
            cut(options.data, options.work)
        for fold in options.folds:
            run_fold(options.work, fold, folder)
    summary = summarize(folder)
    with atomic_write(RESULTS / "tissue_classification.json") as file:
        json.dump(summary, file, indent=1)
        file.write("\n")
    with atomic_write(RESULTS / "tissue_classification.md") as file:
        file.write(section(summary))
    print(json.dumps({key: summary[key] for key in ("arms", "differences", "shipped")}, indent=1))


if __name__ == "__main__":
    main()
