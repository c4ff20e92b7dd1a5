from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_factory import LABELS, make_bundle, write_image

from medkd.deploy.bundle import load_bundle
from medkd.deploy.predict import predict_ensemble, predict_volume
from medkd.errors import ConfigError, InputError
from medkd.metrics import dice, read_per_case
from medkd.workflows.evaluate import evaluate


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, shared_bundle) -> Path:
    """Four patients in two folds, two of them also a test set; the reference is close to the bundle's prediction."""
    root = tmp_path_factory.mktemp("cohort")
    bundle = load_bundle(shared_bundle)
    entries = []
    for number in range(6):
        image = write_image(root / f"case{number}.nii.gz", seed=number)
        labels = predict_volume(bundle, image)
        labels[: 2 + number] = 0
        nib.save(nib.Nifti1Image(labels, nib.load(image).affine), root / f"case{number}_label.nii.gz")
        entries.append({"image": image.name, "label": f"case{number}_label.nii.gz", "patient": f"p{number}"})
    content = {
        "name": "cohort",
        "labels": LABELS,
        "training": [{**entry, "fold": number % 2} for number, entry in enumerate(entries[:4])],
        "test": entries[4:],
    }
    (root / "datalist.json").write_text(json.dumps(content))
    return root


def test_scores_are_those_of_the_predictions(shared_bundle, cohort, tmp_path):
    result = evaluate([shared_bundle], cohort / "datalist.json", tmp_path / "out", device="cpu")
    assert result.failures == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "per_case.csv",
        "summary.json",
        "worst_cases",
    ]
    prediction = predict_volume(load_bundle(shared_bundle), cohort / "case4.nii.gz")
    reference = np.asarray(nib.load(cohort / "case4_label.nii.gz").dataobj)
    expected = dice(prediction, reference, classes=[1, 2])
    found = {s.class_index: s.dice for s in read_per_case(tmp_path / "out") if s.case == "case4"}
    assert found == pytest.approx(expected)
    assert 0 < found[1] < 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n_cases"] == 2
    assert summary["split"] == "test"
    assert summary["pooled"] == "one model"
    assert any((tmp_path / "out" / "worst_cases").glob("worst_*.png"))


def test_distances_use_the_spacing_of_the_image(shared_bundle, cohort, tmp_path):
    evaluate([shared_bundle], cohort / "datalist.json", tmp_path / "out", device="cpu")
    score = read_per_case(tmp_path / "out")[0]
    assert score.unit == "mm"
    shape, spacing = (24, 20, 18), (1.2, 1.0, 2.5)
    assert score.image_diagonal == pytest.approx(
        math.hypot(*(n * s for n, s in zip(shape, spacing, strict=True))), 1e-4
    )


def test_each_fold_model_scores_the_fold_it_held_out(cohort, tmp_path):
    models = [make_bundle(tmp_path / f"fold{fold}_segmentation", seed=fold, fold=fold) for fold in (0, 1)]
    result = evaluate(models, cohort / "datalist.json", tmp_path / "out", split="validation", device="cpu")
    assert {score.case for score in result.scores} == {"case0", "case1", "case2", "case3"}
    assert result.summary["pooled"] == "each model on the fold it held out"
    for case, model in (("case0", models[0]), ("case1", models[1])):
        prediction = predict_volume(load_bundle(model), cohort / f"{case}.nii.gz")
        reference = np.asarray(nib.load(cohort / f"{case}_label.nii.gz").dataobj)
        expected = dice(prediction, reference, classes=[1, 2])
        found = {s.class_index: s.dice for s in result.scores if s.case == case}
        assert found == pytest.approx(expected, nan_ok=True)


def test_on_the_test_split_several_models_are_an_ensemble(cohort, tmp_path):
    models = [make_bundle(tmp_path / f"m{seed}_segmentation", seed=seed) for seed in (0, 1)]
    result = evaluate(models, cohort / "datalist.json", tmp_path / "out", device="cpu")
    prediction = predict_ensemble([load_bundle(model) for model in models], cohort / "case5.nii.gz")
    reference = np.asarray(nib.load(cohort / "case5_label.nii.gz").dataobj)
    expected = dice(prediction, reference, classes=[1, 2])
    assert {s.class_index: s.dice for s in result.scores if s.case == "case5"} == pytest.approx(expected, nan_ok=True)
    assert result.summary["pooled"] == "mean probabilities of 2 models"


def test_bad_cases_are_listed_and_the_others_are_scored(shared_bundle, cohort, tmp_path):
    content = json.loads((cohort / "datalist.json").read_text())
    image = nib.load(cohort / "case0_label.nii.gz")
    array = np.asarray(image.dataobj).copy()
    array[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "out_of_range.nii.gz")
    shifted = image.affine.copy()
    shifted[0, 3] += 7
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), shifted), tmp_path / "shifted.nii.gz")
    bad = [
        {"image": str(cohort / "case0.nii.gz"), "label": str(tmp_path / "out_of_range.nii.gz"), "patient": "a"},
        {"image": str(cohort / "case1.nii.gz"), "label": str(tmp_path / "shifted.nii.gz"), "patient": "b"},
        {"image": str(cohort / "missing.nii.gz"), "label": str(cohort / "case2_label.nii.gz"), "patient": "c"},
        {"image": str(cohort / "case3.nii.gz"), "patient": "d"},
    ]
    for entry in bad:
        for key in ("image", "label"):
            if key in entry:
                entry[key] = str(Path(entry[key]).relative_to(tmp_path.parents[1]))
    good = [
        {**entry, **{key: str((cohort / entry[key]).relative_to(tmp_path.parents[1])) for key in ("image", "label")}}
        for entry in content["test"]
    ]
    file = tmp_path / "datalist.json"
    file.write_text(json.dumps({"name": "x", "labels": LABELS, "test": [*bad, *good]}))
    result = evaluate([shared_bundle], file, tmp_path / "out", dataset_dir=tmp_path.parents[1], device="cpu")
    assert {score.case for score in result.scores} == {"case4", "case5"}
    with open(tmp_path / "out" / "failures.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["case"] for row in rows] == ["case0", "case1", "missing", "case3"]
    for row, word in zip(rows, ("9", "origin", "missing.nii.gz", "no label"), strict=True):
        assert word in row["error"]
    assert result.summary["n_failed"] == 4


def test_when_every_case_fails_there_is_no_summary(shared_bundle, tmp_path):
    file = tmp_path / "datalist.json"
    file.write_text(
        json.dumps({"labels": LABELS, "test": [{"image": "a.nii.gz", "label": "b.nii.gz", "patient": "a"}]})
    )
    result = evaluate([shared_bundle], file, tmp_path / "out", device="cpu")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failures.csv"]
    assert result.summary == {}


def test_datalist_of_other_labels_is_refused_before_anything_is_written(shared_bundle, cohort, tmp_path):
    content = json.loads((cohort / "datalist.json").read_text())
    content["labels"] = {"0": "background", "1": "liver"}
    (cohort / "other.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="liver"):
        evaluate([shared_bundle], cohort / "other.json", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_models_without_a_fold_cannot_be_pooled_over_folds(cohort, tmp_path):
    models = [make_bundle(tmp_path / f"m{seed}_segmentation", seed=seed) for seed in (0, 1)]
    with pytest.raises(ConfigError, match="fold"):
        evaluate(models, cohort / "datalist.json", tmp_path / "out", split="validation", device="cpu")


def test_two_models_of_one_fold_are_refused(cohort, tmp_path):
    models = [make_bundle(tmp_path / f"m{seed}_segmentation", seed=seed, fold=0) for seed in (0, 1)]
    with pytest.raises(ConfigError, match="same fold"):
        evaluate(models, cohort / "datalist.json", tmp_path / "out", split="validation", device="cpu")


def test_empty_split_is_refused(shared_bundle, tmp_path):
    file = tmp_path / "datalist.json"
    file.write_text(json.dumps({"labels": LABELS, "unlabeled": [{"image": "a.nii.gz", "patient": "a"}]}))
    with pytest.raises(InputError, match="no case in test"):
        evaluate([shared_bundle], file, tmp_path / "out", device="cpu")
