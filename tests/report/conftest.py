"""A small run folder with everything a report can show."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medkd.metrics.cases import CaseScore, write_evaluation
from medkd.report import overlay, picture_name, representative_cases

CLASSES = {1: "left", 2: "right"}
Scores = Callable[..., list[CaseScore]]


def make_scores(
    *, quality: float = 0.8, patients: int = 6, missed: tuple[str, ...] = (), empty: tuple[str, ...] = (), seed: int = 0
) -> list[CaseScore]:
    """Two classes per patient; in the cases of ``missed`` class 2 is not found, in those of ``empty`` not there."""
    generator = np.random.default_rng(seed)
    scores = []
    for number in range(patients):
        case = f"case_{number:02d}"
        for index, name in CLASSES.items():
            dice, hd95 = quality + 0.03 * generator.standard_normal(), 2.0 + generator.random()
            is_missed, is_empty = index == 2 and case in missed, index == 2 and case in empty
            if is_missed:
                dice, hd95 = 0.0, math.inf
            if is_empty:
                dice, hd95 = math.nan, math.nan
            voxels = 0 if is_empty else 100
            scores.append(
                CaseScore(
                    case=case, patient=f"patient_{number}", class_index=index, class_name=name, dice=dice, hd95=hd95,
                    surface_dice=dice, assd=hd95 / 3, volume_ml_pred=0.1, volume_ml_ref=0.1, unit="mm",
                    image_diagonal=40.0, voxels_pred=0 if is_missed else voxels, voxels_ref=voxels, tolerance=1.0,
                )
            )  # fmt: skip
    return scores


@pytest.fixture
def scores() -> Scores:
    return make_scores


@pytest.fixture(scope="session")
def picture() -> bytes:
    image = np.add.outer(np.arange(30.0), np.arange(24.0))
    reference = np.zeros((30, 24), dtype=np.uint8)
    reference[8:16, 8:16] = 1
    return overlay(image, np.roll(reference, 2, axis=1), reference, labels={0: "background", 1: "left"})


@pytest.fixture
def run_dir(tmp_path: Path, finished_run: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, picture: bytes) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    for arm, arm_scores in {
        "supervised": make_scores(quality=0.7, missed=("case_02",), seed=1),
        "act_net": make_scores(quality=0.8, empty=("case_04",), seed=2),
        "teacher": make_scores(quality=0.85, seed=3),
    }.items():
        folder = run / "evaluation" / arm
        write_evaluation(folder, arm_scores)
        (folder / "worst_cases").mkdir()
        for rank, case in representative_cases(arm_scores).items():
            (folder / "worst_cases" / picture_name(rank, case)).write_bytes(picture)
    write_json(
        run / "arms.json",
        [
            entry("supervised", "Supervised student", 484_000),
            {**entry("act_net", "ACT-Net student", 484_000), "compare_with": ["supervised"]},
            entry("teacher", "Teacher", 124_387_332),
        ],
    )
    write_json(
        run / "environment.json", {"torch": "2.13.0", "cpu": {"threads": 2}, "command": ["medkd", "train", "x y"]}
    )
    method = {"_target_": "medkd.methods.act_net.ACTNet", "student": "@student", "temperature": 20.0}
    write_json(run / "config.json", {"seed": 3, "max_epochs": 5, "datalist": "lists/brain.json", "method": method})
    notes = {"real": "The MRI.", "simulated": "The patients.", "statements": ["Scored once."], "deviations": ["No E."]}
    write_json(run / "notes.json", {**notes, "run": {"labeled": 4, "unlabeled": 28}})
    rows = [f"{i},1,train,{name},{1 / i}" for i in range(1, 600) for name in ("loss", "supervised_loss")]
    rows += ["599,1,validation,val_mean_dice,0.7", "599,1,validation,val_hd95,inf"]
    (run / "metrics.csv").write_text("iteration,epoch,split,name,value\n" + "\n".join(rows) + "\n")
    (run / "log.txt").write_text("epoch 1 done\n")
    return run


def entry(arm: str, title: str, parameters: int) -> dict[str, object]:
    cost = {"parameters": parameters, "macs": 700 * parameters, "latency_ms": 4.2}
    return {"arm": arm, "title": title, "evaluation": f"evaluation/{arm}", **cost}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
