"""predict, evaluate, compare and report with a classifier of images; the weights are random, the bookkeeping is not."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from medkd.__main__ import main
from medkd.data.datalists import read_datalist
from medkd.deploy.bundle import load_bundle, write_bundle
from medkd.deploy.classifier import classification_metadata
from medkd.deploy.predict_images import classify_images
from medkd.errors import ConfigError, InputError
from medkd.metrics.classification import roc_curve
from medkd.metrics.image_scores import read_image_evaluation
from medkd.report import write_report
from medkd.workflows.compare import compare
from medkd.workflows.evaluate import evaluate
from medkd.workflows.image_train import require_one_size
from medkd.workflows.predict import predict

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = {"0": "normal", "1": "tumor"}
SIDE = 32


def recipe(labels: dict[str, str], *, resize: bool) -> dict[str, Any]:
    resized = {"_target_": "monai.transforms.Resized", "keys": "image", "spatial_size": [SIDE, SIDE]}
    scaled = {"_target_": "monai.transforms.ScaleIntensityRanged", "keys": "image"}
    return {
        "task": "classification",
        "labels": labels,
        "network_def": {
            "_target_": "monai.networks.nets.ResNet", "block": "basic", "layers": [1, 1, 1, 1],
            "block_inplanes": [4, 4, 8, 8], "spatial_dims": 2, "n_input_channels": 3, "conv1_t_size": 3,
            "num_classes": len(labels),
        },
        "loading": [
            {
                "_target_": "monai.transforms.LoadImaged", "keys": "image", "reader": "PILReader",
                "reverse_indexing": False, "ensure_channel_first": True,
            }
        ],
        "normalization": [
            *([resized] if resize else []), {**scaled, "a_min": 0, "a_max": 255, "b_min": 0.0, "b_max": 1.0},
        ],
        "inferer": {"_target_": "monai.inferers.SimpleInferer"},
    }  # fmt: skip


def classifier(out: Path, *, seed: int = 0, labels: dict[str, str] | None = None, resize: bool = True) -> Path:
    labels = labels or CLASSES
    config = recipe(labels, resize=resize)
    torch.manual_seed(seed)
    weights = ConfigParser({"n": config["network_def"]}).get_parsed_content("n").state_dict()
    weights["fc.weight"] *= 20  # far from 0.5, so that thresholds and calibration have something to show
    metadata = classification_metadata(
        labels=labels, side=SIDE, name="Test", task="classification", description="A test.", modality="photograph"
    )
    return write_bundle(out, train_config=config, weights=weights, metadata=metadata, readme="# Test\n")


def photograph(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    small = Image.fromarray(np.random.default_rng(seed).integers(256, size=(6, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return classifier(tmp_path_factory.mktemp("bundles") / "small_classifier", seed=7)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A folder with a datalist: 16 validation and 24 test images of 12 patients."""
    root = tmp_path_factory.mktemp("cohort")
    content: dict[str, Any] = {"name": "photographs", "labels": CLASSES, "training": [], "validation": [], "test": []}
    for section, count in (("training", 4), ("validation", 16), ("test", 24)):
        for number in range(count):
            photograph(sum(section.encode()) * 100 + number).save(root / f"{section}{number}.png")
            entry = {"image": f"{section}{number}.png", "label": number % 2, "patient": f"{section} {number // 2}"}
            content[section].append(entry)
    (root / "datalist.json").write_text(json.dumps(content))
    return root


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def changed(cohort: Path, out: Path, change: Any) -> Path:
    content = json.loads((cohort / "datalist.json").read_text())
    change(content)
    out.write_text(json.dumps(content))
    return out


def test_every_kind_of_picture_gets_a_row_and_a_bad_one_stops_nothing(model, tmp_path, capsys) -> None:
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    photograph(1).save(folder / "a.png")
    photograph(2, (70, 90)).convert("L").save(folder / "b.jpg")
    photograph(3).convert("RGBA").save(folder / "more" / "c.tif")
    photograph(4).save(folder / "d.jpg")
    (folder / "d.jpg").write_bytes((folder / "d.jpg").read_bytes()[:400])
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(folder / "e.png")
    (folder / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    assert main(["predict", str(model), str(folder), str(folder / "a.png"), "--out", str(out), "--device", "cpu"]) == 1
    rows = table(out / "predictions.csv")
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.jpg", "c.tif"]
    assert list(rows[0]) == ["file", "prob_normal", "prob_tumor", "label"]
    for row in rows:
        probabilities = {name: float(row[f"prob_{name}"]) for name in CLASSES.values()}
        assert sum(probabilities.values()) == pytest.approx(1, abs=2e-6)
        assert row["label"] == max(probabilities, key=probabilities.__getitem__)
    failed = {Path(row["file"]).name: row["error"] for row in table(out / "failures.csv")}
    assert failed.keys() == {"d.jpg", "e.png"}
    assert "damaged" in failed["d.jpg"]
    assert "8 bits" in failed["e.png"]
    assert "predictions.csv" in capsys.readouterr().out


def test_probabilities_are_those_of_the_bundles_own_configuration(model, tmp_path) -> None:
    photograph(5).save(tmp_path / "a.png")
    bundle = load_bundle(model)
    item = bundle.parser.get_parsed_content("preprocessing")({"image": str(tmp_path / "a.png")})
    with torch.no_grad():
        wanted = bundle.network(item["image"][None].as_tensor()).softmax(1)[0].numpy()
    (found,) = classify_images(bundle, [tmp_path / "a.png"])
    assert found == pytest.approx(wanted, abs=1e-5)


def test_results_do_not_depend_on_the_batch(model, tmp_path) -> None:
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.png")
        photograph(number, (48, 40 + 8 * (number % 2))).save(files[-1])
    bundle = load_bundle(model)
    one, all_ = (np.stack(list(classify_images(bundle, files, batch_size=size))) for size in (1, 5))
    assert np.abs(one - all_).max() < 1e-5
    assert len(np.unique(one[:, 0])) == 5


def test_another_size_than_the_network_was_trained_on_is_refused(tmp_path) -> None:
    rigid = classifier(tmp_path / "rigid", resize=False)
    photograph(1, (SIDE, SIDE)).save(tmp_path / "right.png")
    photograph(1, (SIDE, 48)).save(tmp_path / "wrong.png")
    found = predict(rigid, [tmp_path / "right.png", tmp_path / "wrong.png"], tmp_path / "out", device="cpu")
    assert len(table(tmp_path / "out" / "predictions.csv")) == 1
    (failure,) = found.failures
    assert "32 x 48 px" in failure.error
    assert "trained on 32 x 32 px" in failure.error


def test_deidentified_table_names_no_file(model, tmp_path) -> None:
    photograph(1).save(tmp_path / "Smith_John.png")
    (tmp_path / "Doe_Jane.png").write_bytes(b"broken")
    files = [tmp_path / "Smith_John.png", tmp_path / "Doe_Jane.png"]
    found = predict(model, files, tmp_path / "out", deidentify=True, device="cpu")
    assert [row["file"] for row in table(tmp_path / "out" / "predictions.csv")] == ["case-0001"]
    assert [failure.case for failure in found.failures] == ["case-0002"]
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "Smith" not in written
    assert "Doe" not in written


@pytest.mark.parametrize("option", [{"output_format": "dicom-seg"}, {"series": "1.2.3"}])
def test_options_of_volumes_are_refused(model, tmp_path, option) -> None:
    photograph(1).save(tmp_path / "a.png")
    if "output_format" in option:
        pytest.importorskip("highdicom")
    with pytest.raises(ConfigError, match="classifies images"):
        predict(model, [tmp_path / "a.png"], tmp_path / "out", device="cpu", **option)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        predict(model, [tmp_path / "empty"], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_evaluation_chooses_its_threshold_on_validation_images_alone(model, cohort, tmp_path) -> None:
    found = evaluate([model], cohort / "datalist.json", tmp_path / "out", device="cpu")
    scores, summary = read_image_evaluation(tmp_path / "out")
    assert summary == found.summary
    assert (summary["n_cases"], summary["n_patients"], summary["patients_known"]) == (24, 12, True)
    assert "ci95_delong" not in summary["measures"]["auc"]  # two images of each patient are not independent
    items = read_datalist(cohort / "datalist.json").section("validation")
    results = np.stack(list(classify_images(load_bundle(model), [item["image"] for item in items])))
    _, threshold = roc_curve(results[:, 1], [item["label"] for item in items]).at_specificity(0.9)
    point = summary["operating_point"]
    assert (point["source"], point["n_chosen_on"]) == ("validation", 16)
    assert point["threshold"] == pytest.approx(threshold, abs=1e-6)
    called = [score.probabilities[1] >= point["threshold"] for score in scores if score.label == 1]
    assert summary["measures"]["sensitivity"]["estimate"] == pytest.approx(np.mean(called))
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "chosen on 16 validation images" in page
    for name in ("roc", "reliability", "confusion"):
        assert (tmp_path / "out" / "figures" / f"{name}.svg").is_file()


def test_without_validation_only_the_curve_is_described(model, cohort, tmp_path, capsys) -> None:
    listed = changed(cohort, cohort / "no_validation.json", lambda content: content.pop("validation"))
    arguments = ["evaluate", str(model), "--datalist", str(listed), "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "property of the ROC curve" in capsys.readouterr().out
    _, summary = read_image_evaluation(tmp_path / "out")
    assert summary["operating_point"]["threshold"] is None
    assert "sensitivity" not in summary["measures"]
    assert main([*arguments, "--out", str(tmp_path / "given"), "--threshold", "0.3", "--json"]) == 0
    given = json.loads(capsys.readouterr().out)["summary"]
    assert given["operating_point"]["source"] == "given"
    assert given["measures"]["specificity"]["estimate"] is not None


def test_unknown_patients_are_said_and_allow_delong(model, cohort, tmp_path) -> None:
    def alone(content: dict[str, Any]) -> None:
        content["patients_known"] = False
        for section in ("training", "validation", "test"):
            for entry in content[section]:
                entry["patient"] = entry["image"]

    listed = changed(cohort, cohort / "alone.json", alone)
    summary = evaluate([model], listed, tmp_path / "out", device="cpu").summary
    assert summary["n_patients"] is None
    assert summary["measures"]["auc"]["ci95_delong"][0] is not None
    assert "no patients are known" in (tmp_path / "out" / "report.html").read_text()


def test_damaged_test_image_is_a_failure_and_in_no_number(model, cohort, tmp_path) -> None:
    (cohort / "broken.png").write_bytes(b"broken")
    entry = {"image": "broken.png", "label": 1, "patient": "someone"}
    listed = changed(cohort, cohort / "with_broken.json", lambda content: content["test"].append(entry))
    found = evaluate([model], listed, tmp_path / "out", device="cpu")
    assert [failure.case for failure in found.failures] == ["broken"]
    assert (found.summary["n_cases"], found.summary["n_failed"]) == (24, 1)


def test_several_models_are_scored_by_their_mean_probabilities(model, cohort, tmp_path) -> None:
    other = classifier(tmp_path / "other", seed=1)
    evaluate([model, other], cohort / "datalist.json", tmp_path / "out", device="cpu")
    scores, summary = read_image_evaluation(tmp_path / "out")
    path = cohort / f"{scores[0].case}.png"
    parts = [next(iter(classify_images(load_bundle(one), [path]))) for one in (model, other)]
    assert scores[0].probabilities == pytest.approx(np.mean(parts, axis=0), abs=1e-6)
    assert summary["pooled"] == "mean probabilities of 2 models"


@pytest.mark.parametrize("fault", ["swapped", "masks", "threshold"])
def test_datalist_of_another_task_is_refused(model, cohort, tmp_path, fault) -> None:
    def change(content: dict[str, Any]) -> None:
        if fault == "swapped":
            content["labels"] = {"0": "tumor", "1": "normal"}
        if fault == "masks":
            for section in ("training", "validation", "test"):
                for entry in content[section]:
                    entry["label"] = "mask.png"

    listed = changed(cohort, cohort / "other.json", change)
    options = {"threshold": 1.5} if fault == "threshold" else {}
    words = {"swapped": "has the classes", "masks": "label maps", "threshold": "not from 0 to 1"}[fault]
    with pytest.raises(ConfigError, match=words):
        evaluate([model], listed, tmp_path / "out", device="cpu", **options)
    assert not (tmp_path / "out").exists()


def test_several_classes_are_evaluated_and_reported(cohort, tmp_path) -> None:
    labels = {"0": "none", "1": "mild", "2": "severe"}
    grades = classifier(tmp_path / "grades", labels=labels)

    def change(content: dict[str, Any]) -> None:
        content["labels"] = labels
        for number, entry in enumerate(content["test"]):
            entry["label"] = number % 3

    summary = evaluate(
        [grades], changed(cohort, cohort / "grades.json", change), tmp_path / "out", device="cpu"
    ).summary
    assert summary["operating_point"] is None
    assert summary["per_class"]["severe"]["auc"]["estimate"] is not None
    assert "AUC against the rest" in (tmp_path / "out" / "report.html").read_text()


def test_two_evaluations_are_compared_on_the_images_both_scored(model, cohort, tmp_path, capsys) -> None:
    other = classifier(tmp_path / "other", seed=1)
    fewer = changed(cohort, cohort / "fewer.json", lambda content: content["test"].pop())
    evaluate([model], cohort / "datalist.json", tmp_path / "a", device="cpu")
    evaluate([other], fewer, tmp_path / "b", device="cpu")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c.html")]) == 0
    assert "23 images in both, 1 in only one" in capsys.readouterr().out
    assert "ROC curves" in (tmp_path / "c.html").read_text()
    same = compare(tmp_path / "a", tmp_path / "a")
    assert all(found.difference == 0 and found.low == found.high == 0 for found in same.differences)
    forth, back = compare(tmp_path / "a", tmp_path / "b"), compare(tmp_path / "b", tmp_path / "a")
    assert forth.differences[0].difference == pytest.approx(-back.differences[0].difference)


def test_report_of_a_run_shows_its_classifier(model, cohort, tmp_path) -> None:
    evaluate([model], cohort / "datalist.json", tmp_path / "run" / "evaluation", device="cpu")
    page = write_report(tmp_path / "run").read_text()
    assert "Classification: evaluation" in page
    assert "Reliability" in page
    assert "Dice" not in page.split("<body>")[1]


def test_images_that_make_no_batch_are_refused_before_training(cohort) -> None:
    photograph(77, (64, 40)).save(cohort / "wide.png")
    entry = {"image": "wide.png", "label": 1, "patient": "wide"}
    listed = read_datalist(changed(cohort, cohort / "mixed.json", lambda content: content["training"].append(entry)))
    require_one_size(ConfigParser(recipe(CLASSES, resize=True)), listed)
    with pytest.raises(ConfigError, match=r"64 x 40 px.*no batch.*Resized") as refused:
        require_one_size(ConfigParser(recipe(CLASSES, resize=False)), listed)
    assert "wide.png" in str(refused.value)
