from __future__ import annotations

import csv
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_factory import LABELS, write_image

from medkd import __version__
from medkd.__main__ import main
from medkd.errors import TrainingError, TrainingPaused

COMMANDS = [
    [], ["quickstart"], ["methods"], ["doctor"], ["train"], ["evaluate"], ["predict"], ["compare"], ["profile"],
    ["export"], ["report"], ["data"], ["data", "list"], ["data", "show"], ["data", "fetch"], ["data", "prepare"],
    ["data", "make"], ["data", "check"], ["data", "split"], ["bundle"], ["bundle", "list"], ["bundle", "copy"],
    ["bundle", "check"],
]  # fmt: skip


def only_error(capsys) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert captured.out == ""
    return lines[0]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cohort")
    entries = []
    for number in range(4):
        image = write_image(root / f"case{number}.nii.gz", seed=number)
        labels = (np.asarray(nib.load(image).dataobj) > 100).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, nib.load(image).affine), root / f"case{number}_label.nii.gz")
        entries.append({"image": image.name, "label": f"case{number}_label.nii.gz", "patient": f"p{number}"})
    (root / "datalist.json").write_text(json.dumps({"labels": LABELS, "training": entries[:2], "test": entries[2:]}))
    return root


def test_command_line_starts_without_the_heavy_libraries():
    code = (
        "import sys, medkd.__main__ as m; m.main(['--help']); m.main(['predict', '--help']);"
        "heavy = {'torch', 'monai', 'numpy', 'scipy', 'nibabel', 'matplotlib', 'ignite'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # the default suite holds no timed test
def test_help_comes_within_half_a_second():
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "medkd", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5  # of processor time, so that other work on the machine does not count


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_a_help_page_that_fits_a_terminal(words, capsys):
    assert main([*words, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"Usage: medkd {' '.join(words)}".rstrip())
    assert max(len(line) for line in page.splitlines()) <= 80
    assert "<path>" not in page
    assert "..." not in page.split("\n", 1)[1], "a description was cut"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"medkd {__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["predcit"], r"error: predcit: is no command of `medkd`; did you mean predict\?"),
        (["data", "lst"], r"error: lst: is no command of `medkd data`; did you mean list\?"),
        (["predict", "--ouput", "x"], r"error: --ouput: is no option of `medkd predict`; did you mean --out\?"),
        (["predict"], r"error: MODEL: is missing; see `medkd predict --help`"),
        (["predict", "m", "i"], r"error: --out: is missing; see `medkd predict --help`"),
        (["evaluate", "m", "--datalist", "d", "--out", "o", "--split", "tset"], r"error: --split: .*test.*"),
        (["train", "b", "--devices", "0"], r"error: --devices: .*"),
        (["train", "b", "--resum"], r"error: --resum: is no option of `medkd train`; did you mean --resume\?"),
        (["train", "b", "epochs"], r"error: epochs: is not KEY=VALUE; .*"),
        (["predict", "nowhere", "nothing", "--out", "o"], r"error: nothing: does not exist; .*"),
        (["export", "nowhere", "--format", "onnx", "--out", "o"], r"error: nowhere: does not exist; .*"),
        (["report", "nowhere"], r"error: nowhere.*"),
        (["compare", "nowhere", "b"], r"error: nowhere.*"),
        (["data", "show", "hipocampus"], r"error: dataset hipocampus: has no card; did you mean .*\?"),
        (["bundle", "copy", "nothing_like_it", "o"], r"error: bundle nothing_like_it: is not among those shipped; .*"),
        (["bundle", "check", "nowhere"], r"error: nowhere: does not exist; .*"),
        (["methods", "kdd"], r"error: method kdd: is unknown; did you mean kd\?"),
    ],
)
def test_bad_usage_is_one_line_and_writes_nothing(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert re.fullmatch(expected, only_error(capsys))
    assert list(tmp_path.iterdir()) == []


def test_predict_evaluate_and_compare_from_the_command_line(shared_bundle, cohort, tmp_path, capsys):
    out = tmp_path / "predictions"
    assert main(["predict", str(shared_bundle), str(cohort / "case0.nii.gz"), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"written": [str(out / "case0_seg.nii.gz")], "failures": []}

    for name in ("a", "b"):
        words = ["evaluate", str(shared_bundle), "--datalist", str(cohort / "datalist.json")]
        assert main([*words, "--out", str(tmp_path / name), "-q"]) == 0
    captured = capsys.readouterr()
    assert "Dice" in captured.out
    assert "2 cases of 2 patients" in captured.out
    assert captured.err == ""
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c.html"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cases"] == 2
    assert result["differences"][0]["result"]["mean_difference"] == 0
    assert (tmp_path / "c.html").is_file()


def test_one_bad_case_gives_exit_1_a_line_and_a_row(shared_bundle, tmp_path, capsys):
    image = write_image(tmp_path / "in" / "good.nii.gz")
    (tmp_path / "in" / "bad.nii.gz").write_bytes(image.read_bytes()[:300])
    out = tmp_path / "out"
    assert main(["predict", str(shared_bundle), str(tmp_path / "in"), "--out", str(out), "-q"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(out / "good_seg.nii.gz")]
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("bad: ")
    with open(out / "failures.csv", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["bad"]


def test_even_a_single_bad_case_is_exit_1(shared_bundle, tmp_path):
    image = write_image(tmp_path / "a.nii.gz")
    image.write_bytes(image.read_bytes()[:300])
    assert main(["predict", str(shared_bundle), str(image), "--out", str(tmp_path / "out"), "-q"]) == 1


def test_progress_goes_to_stderr_and_results_to_stdout(shared_bundle, tmp_path, capsys):
    image = write_image(tmp_path / "a.nii.gz")
    assert main(["predict", str(shared_bundle), str(image), "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out' / 'a_seg.nii.gz'}\n"
    assert re.fullmatch(r"1/1 a: \d+\.\d s\n", captured.err)


@pytest.mark.parametrize("words", ["data list", "data show acdc", "methods", "methods kd", "bundle list", "doctor"])
def test_listings_print_a_table_or_one_json_document(words, capsys):
    assert main(words.split()) in (0, 1)
    assert capsys.readouterr().out.strip()
    assert main([*words.split(), "--json"]) in (0, 1)
    json.loads(capsys.readouterr().out)


def test_bundle_check_prints_the_hash_and_exits_1_on_findings(shared_bundle, tmp_path, capsys):
    assert main(["bundle", "check", str(shared_bundle)]) == 0
    assert re.search(r"sha256 of all files: [0-9a-f]{64}", capsys.readouterr().out)
    (tmp_path / "b" / "configs").mkdir(parents=True)
    (tmp_path / "b" / "configs" / "inference.json").write_text('{"x": "$open(1)"}')
    assert main(["bundle", "check", str(tmp_path / "b")]) == 1
    assert "open" in capsys.readouterr().out


def test_terminal_codes_in_a_bundle_cannot_hide_what_it_runs(tmp_path, capsys):
    (tmp_path / "b" / "configs").mkdir(parents=True)
    config = {"x": "$open(1)\x1b[2K\r", "network\x1b[1A": {"_target_": "os.system\x1b[8m"}}
    (tmp_path / "b" / "configs" / "inference.json").write_text(json.dumps(config))
    assert main(["bundle", "check", str(tmp_path / "b")]) == 1
    captured = capsys.readouterr().out
    assert "\x1b[2K" not in captured
    assert "\x1b[8m" not in captured
    assert "\\x1b[2K" in captured


def test_datalist_commands_work_together(cohort, tmp_path, capsys):
    made = tmp_path / "made.json"
    words = ["data", "make", str(cohort), "--images", "case?.nii.gz", "--labels", "case?_label.nii.gz"]
    assert main([*words, "--patient", r"case(\d+)", "--out", str(made), "-q"]) == 0
    assert "4 training (4 patients)" in capsys.readouterr().out
    divided = tmp_path / "divided.json"
    words = ["data", "split", str(made), "--dataset-dir", str(cohort), "--folds", "2", "--labeled", "2", "--json"]
    assert main([*words, "--out", str(divided), "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"] == {"training": 2, "unlabeled": 2}
    assert main(["data", "check", str(divided), "--dataset-dir", str(cohort), "-q"]) in (0, 1)
    assert main([*words, "--out", str(divided)]) == 2


def test_fix_writes_another_datalist_and_names_what_it_left_out(cohort, tmp_path, capsys):
    (cohort / "broken.nii.gz").write_bytes(b"x")
    content = json.loads((cohort / "datalist.json").read_text())
    content["unlabeled"] = [{"image": "broken.nii.gz", "patient": "q"}]
    file = cohort / "with_broken.json"
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    fixed = cohort / "fixed.json"
    assert main(["data", "check", str(file), "--fix", str(fixed), "-q"]) == 1
    assert "without 1 cases (broken)" in capsys.readouterr().out
    assert "unlabeled" not in json.loads(fixed.read_text())
    assert file.read_bytes() == before


def test_export_prints_the_largest_difference(shared_bundle, cohort, tmp_path, capsys):
    out = tmp_path / "n.ts"
    words = ["export", str(shared_bundle), "--format", "torchscript", "--out", str(out)]
    assert main([*words, "--image", str(cohort / "case0.nii.gz")]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_profile_prints_a_row_per_model(shared_bundle, cohort, capsys):
    words = ["profile", str(shared_bundle), "--image", str(cohort / "case0.nii.gz"), "--rounds", "1"]
    assert main(words) == 0
    assert "small_segmentation" in capsys.readouterr().out


def fake_train(monkeypatch, behave):
    import types

    module = types.ModuleType("medkd.workflows.train")
    module.train = behave
    monkeypatch.setitem(sys.modules, "medkd.workflows.train", module)


def test_train_hands_over_what_it_was_given(monkeypatch, tmp_path, capsys):
    seen = {}

    def behave(config, overrides, **options):
        seen.update(options, config=config, overrides=overrides)
        return tmp_path / "run"

    fake_train(monkeypatch, behave)
    words = ["train", "b", "train::trainer::max_epochs=5", "amp=bf16", "x=[1, 2]", "y='7'", "z=$@a + 1", "--fold", "2"]
    assert main([*words, "--run-dir", "r", "--seed", "3", "--devices", "2", "--device", "cpu", "--resume"]) == 0
    assert seen["overrides"] == {
        "train::trainer::max_epochs": 5,
        "amp": "bf16",
        "x": [1, 2],
        "y": "7",
        "z": "$@a + 1",
    }
    assert seen["config"] == Path("b")
    assert (seen["fold"], seen["seed"], seen["devices"], seen["device"]) == (2, 3, 2, "cpu")
    assert seen["resume"] is True
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"


def test_unknown_option_of_train_reaches_the_configuration_as_a_key(monkeypatch, tmp_path):
    seen = {}
    fake_train(monkeypatch, lambda config, overrides, **options: seen.update(overrides) or tmp_path)
    assert main(["train", "b", "--epoch", "5", "--lr=0.1"]) == 0
    assert seen == {"--epoch": 5, "--lr": 0.1}


def test_quickstart_prints_its_table_and_what_to_do_next(monkeypatch, tmp_path, capsys):
    import types

    rows = [{"arm": "teacher", "parameters": 1_900_000, "Dice": 0.84, "HD95 mm": 3.1, "ms per volume": 950}]
    result = {"rows": rows, "ratio": 250, "seconds": 200, "report": "r.html", "bundle": "b", "next": ["open r.html"]}
    module = types.ModuleType("medkd.workflows.quickstart")
    module.quickstart = lambda out, device, seed: result
    monkeypatch.setitem(sys.modules, "medkd.workflows.quickstart", module)
    assert main(["quickstart", "--out", str(tmp_path / "q")]) == 0
    page = capsys.readouterr().out
    for text in ("teacher", "1.9 M", "250× smaller", "r.html", "open r.html"):
        assert text in page
    assert main(["quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_dataset_that_may_not_be_downloaded_is_refused_with_what_to_do(tmp_path, capsys):
    assert main(["data", "fetch", "acdc", "--root", str(tmp_path)]) == 2
    assert "is not for medkd to download" in only_error(capsys)


def test_prepare_names_what_is_missing_and_writes_nothing(tmp_path, capsys):
    words = ["data", "prepare", "acdc", "--root", str(tmp_path / "gone"), "--out", str(tmp_path / "d.json")]
    assert main(words) == 2
    only_error(capsys)
    assert not (tmp_path / "d.json").exists()


def test_prepare_real_hippocampus(real_data, tmp_path, capsys):
    root = real_data / "msd_hippocampus"
    words = ["data", "prepare", "msd_hippocampus", "--root", str(root), "--labeled", "10", "--json"]
    assert main([*words, "--out", str(tmp_path / "d.json"), "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"]["training"] == 10


def test_report_of_a_run_folder_is_rebuilt(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("iteration,epoch,split,name,value\n1,1,train,loss,0.5\n")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def raising(error):
    def behave(*args, **kwargs):
        raise error

    return behave


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TrainingError("loss", "is not finite", "lower lr"), 4, "error: loss: is not finite; lower lr"),
        (TrainingPaused("run", "paused", "continue with --resume"), 75, "error: run: paused; continue with --resume"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError(), 2, "error: memory: .*roi_size.*"),
        (PermissionError(13, "Permission denied", "/locked/x"), 2, "error: /locked/x: Permission denied; .*"),
        (RuntimeError("secret\nlines"), 3, r"error: RuntimeError: a fault in medkd.* are in (\S+\.log)"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, line):
    fake_train(monkeypatch, raising(error))
    assert main(["train", "b"]) == code
    found = re.fullmatch(line, only_error(capsys))
    assert found
    if code == 3:
        text = Path(found[1]).read_text()
        assert "Traceback" in text
        assert "secret" in text
        os.unlink(found[1])


def test_log_of_a_fault_under_deidentify_names_no_file(monkeypatch, capsys):
    monkeypatch.setattr("medkd.workflows.predict.find_sources", raising(RuntimeError("/data/DOE^JANE.nii.gz")))
    assert main(["predict", "m", "/data/DOE^JANE.nii.gz", "--out", "o", "--deidentify"]) == 3
    path = re.search(r"\S+\.log", only_error(capsys))[0]
    assert "DOE" not in Path(path).read_text()
    os.unlink(path)


def test_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m medkd data list | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
