"""``medkd quickstart``: the main job on embedded real MRI, from nothing to a report in a few minutes."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from medkd.data.atomic import atomic_write
from medkd.data.datalists import Datalist, read_datalist
from medkd.data.demo import demo_mri
from medkd.data.volumes import read_volume
from medkd.deploy.bundle import load_bundle
from medkd.deploy.profile import Cost, profile_bundles
from medkd.engine.checkpoint import load_newest
from medkd.errors import ConfigError
from medkd.report.html import write_report
from medkd.workflows.evaluate import evaluate
from medkd.workflows.predict import predict
from medkd.workflows.run_folder import CONFIG
from medkd.workflows.train import train
from medkd.workflows.trained_bundle import deploy

logger = logging.getLogger(__name__)

BUNDLE = "act_net_brain_segmentation"
TITLES = {
    "act_net": "ACT-Net student",
    "supervised": "supervised student of the same size",
    "teacher": "teacher",
}


def quickstart(out: str | Path, *, device: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Train a teacher, an ACT-Net student and a supervised student on the demo cohort, and compare them.

    Args:
        out: the run folder to make; must be absent or empty.
        device: auto, cpu or cuda[:N].
        seed: seeds training; the cohort is always the same.

    Returns:
        ``rows`` of the printed table (arm, parameters, Dice, HD95 in mm, ms per volume), ``ratio`` of the sizes,
        ``report``, ``bundle`` and ``next``, what to do next.

    Raises:
        ConfigError: If ``out`` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(out, "is not empty", "choose another --out")
    started = time.monotonic()
    logger.info("1/4 making virtual patients from the MNI152 MRI")
    datalist_file = demo_mri(out / "data")
    datalist = read_datalist(datalist_file)

    logger.info("2/4 training a teacher, then a small student with ACT-Net")
    overrides = {"dataset_dir": str(datalist_file.parent.resolve())}
    train(BUNDLE, overrides, run_dir=out, device=device, seed=seed)
    logger.info("3/4 training a student of the same size on the labeled images alone")
    train(BUNDLE, overrides, overlays=["supervised"], run_dir=out / "supervised", device=device, seed=seed)

    logger.info("4/4 scoring all three on patients that no training has seen")
    bundles = {
        "act_net": out / "bundle",
        "supervised": out / "supervised" / "bundle",
        "teacher": _deploy_teacher(out, datalist),
    }
    means = {
        arm: evaluate([bundle], datalist_file, out / "evaluation" / arm, device=device).summary["mean"]
        for arm, bundle in bundles.items()
    }
    images = [item["image"] for item in datalist.section("test")]
    predict(bundles["act_net"], images, out / "predictions", device=device)
    costs = dict(
        zip(
            bundles,
            profile_bundles([load_bundle(path) for path in bundles.values()], image=read_volume(images[0]), rounds=3),
            strict=True,
        )
    )
    ratio = costs["teacher"].parameters / costs["act_net"].parameters
    _write_notes(out, datalist, costs, ratio, seed=seed, seconds=time.monotonic() - started)
    report = write_report(out)
    rows = [
        {
            "arm": TITLES[arm],
            "parameters": costs[arm].parameters,
            "Dice": round(means[arm]["dice"]["mean"], 3),
            "HD95 mm": round(means[arm]["hd95_mm"]["mean"], 2),
            "ms per volume": round(costs[arm].volume_ms),
        }
        for arm in bundles
    ]
    return {
        "rows": rows,
        "ratio": round(ratio),
        "seconds": round(time.monotonic() - started),
        "report": str(report),
        "bundle": str(bundles["act_net"]),
        "next": [
            f"open {report}",
            f"medkd predict {bundles['act_net']} YOUR_SCAN.nii.gz --out predictions",
            f"medkd bundle copy {BUNDLE} my_bundle   # then train it on your own scans",
        ],
    }


def _deploy_teacher(out: Path, datalist: Datalist) -> Path:
    """Make a bundle of the teacher that the run trained, so that it is scored exactly like the students."""
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    _, state = load_newest(out / "teacher" / "checkpoints")
    weights = {
        name.removeprefix("student."): value for name, value in state["method"].items() if name.startswith("student.")
    }
    return deploy(out / "teacher" / "bundle", {**config, "network_def": config["teacher_def"]}, datalist, weights)


def _write_notes(
    out: Path, datalist: Datalist, costs: dict[str, Cost], ratio: float, *, seed: int, seconds: float
) -> None:
    """What the report says of this run beyond its numbers."""
    arms = [
        {
            "arm": arm,
            "title": TITLES[arm],
            "parameters": cost.parameters,
            "macs": cost.macs,
            "latency_ms": cost.volume_ms,
            "evaluation": f"evaluation/{arm}",
            "metrics": {"act_net": "metrics.csv"}.get(arm, f"{arm}/metrics.csv"),
            **({"compare_with": ["supervised", "teacher"]} if arm == "act_net" else {}),
        }
        for arm, cost in costs.items()
    ]
    notes = {
        "title": "ACT-Net on the demo cohort",
        "lead": f"A student {ratio:.0f}× smaller than its teacher, trained from "
        f"{len(datalist.section('training'))} labeled and {len(datalist.section('unlabeled'))} unlabeled patients.",
        "real": "The T1-weighted MNI152 template and its gray- and white-matter maps.",
        "simulated": "That there are several patients: each is that one brain, deformed, with another contrast, bias "
        "field and noise. The labels are warped tissue maps, not a radiologist's.",
        "statements": [
            "One training seed: the intervals cover test patients, not the luck of training. "
            "benchmarks/act_net.py --demo repeats this over several seeds.",
            "All arms use the same labels and the same number of steps for the student; the final iterate is scored.",
        ],
        "deviations": ["See docs/methods/act_net.md for everything that differs from the paper."],
        "run": {
            "method": "ACT-Net",
            "bundle": BUNDLE,
            "datalist": datalist.name,
            "seeds": [seed],
            "command": "medkd quickstart",
            "seconds": round(seconds),
        },
    }
    for name, content in (("arms.json", arms), ("notes.json", notes)):
        with atomic_write(out / name) as file:
            json.dump(content, file, indent=1)
