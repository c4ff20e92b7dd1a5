from __future__ import annotations

import json
import math

import pytest

from medkd.errors import InputError
from medkd.report.facts import environment_facts, method_settings, run_command, run_facts
from medkd.report.run_folder import read_metrics, read_run_folder


def test_line_that_is_still_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("iteration,epoch,split,name,value\r\n1,1,train,loss,0.5\r\n2,1,train,loss,nan\r\n3,1,tra")
    points = read_metrics(path)
    assert [point.iteration for point in points] == [1, 2]
    assert math.isnan(points[1].value)
    path.write_text("iteration,ep")
    assert read_metrics(path) == []


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "iteration,epoch,split,name,value\nx,1,train,loss,1\n", "\xff"])
def test_damaged_metrics_are_refused(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=r"metrics\.csv"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"arm": "a"}, "must be a list"),
        ([{"title": "a"}], "must be a list"),
        ([{"arm": "a"}, {"arm": "a"}], "names an arm twice"),
        ([{"arm": "a", "compare_with": "b"}], "is to be compared with b"),
        ([{"arm": "a", "compare_with": ["a"]}], "is to be compared with a"),
        ([{"arm": "a", "evaluation": "../other"}], "points outside"),
        ([{"arm": "a", "evaluation": [3]}], "where a path is needed"),
        ([{"arm": "a", "metrics": "/etc/passwd"}], "points outside"),
        ([{"arm": "a", "parameters": -1}], "parameters must be a number"),
        ([{"arm": "a", "latency_ms": "4"}], "latency_ms must be a number"),
        ([{"arm": "a", "macs": True}], "macs must be a number"),
    ],
)
def test_bad_arms_are_refused(tmp_path, arms, said):
    (tmp_path / "arms.json").write_text(json.dumps(arms))
    with pytest.raises(InputError, match=said):
        read_run_folder(tmp_path)


def test_link_out_of_the_run_folder_is_refused(tmp_path, run_dir):
    (run_dir / "evaluation" / "linked").symlink_to(tmp_path)
    (run_dir / "arms.json").write_text('[{"arm": "a", "evaluation": "evaluation/linked"}]')
    with pytest.raises(InputError, match="points outside"):
        read_run_folder(run_dir)


def test_folder_that_is_absent_or_holds_a_list_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        read_run_folder(tmp_path / "none")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        read_run_folder(tmp_path)


def test_arms_are_found_without_a_list_of_them(run_dir):
    (run_dir / "arms.json").unlink()
    assert [arm.name for arm in read_run_folder(run_dir).arms] == ["act_net", "supervised", "teacher"]


def test_arms_can_have_curves_of_their_own(run_dir):
    (run_dir / "arms.json").write_text('[{"arm": "a", "metrics": "metrics.csv"}]')
    assert len(read_run_folder(run_dir).arms[0].metrics) == 2 * 599 + 2


def test_only_the_end_of_a_long_log_is_read(run_dir):
    (run_dir / "log.txt").write_text("\n".join(f"line {i} " + "ä" * 50 for i in range(5000)))
    log = read_run_folder(run_dir).log
    assert len(log) <= 40
    assert log[-1].startswith("line 4999")


def test_notes_win_over_the_configuration(run_dir):
    facts = run_facts(read_run_folder(run_dir))
    assert facts["Method"] == "ACTNet"
    assert facts["Seed"] == "3"
    assert facts["Labeled patients"] == "4"
    assert facts["Datalist"] == "brain.json"
    (run_dir / "notes.json").write_text(
        '{"run": {"method": "ours", "seeds": [1, 2], "command": "medkd x", "my_key": null}}'
    )
    run = read_run_folder(run_dir)
    facts = run_facts(run)
    assert facts["Method"] == "ours"
    assert facts["Seeds"] == "1, 2"
    assert "Seed" not in facts
    assert facts["My key"] == "none"
    assert run_command(run) == "medkd x"


def test_expressions_are_not_taken_for_values(run_dir):
    (run_dir / "config.json").write_text('{"seed": "$1+1", "datalist": "@x", "train": {"seed": 5}}')
    facts = run_facts(read_run_folder(run_dir))
    assert facts["Seed"] == "5"
    assert "Datalist" not in facts


def test_settings_of_nested_methods_and_objects():
    loss = {"_target_": "monai.losses.DiceLoss", "sigmoid": True, "_disabled_": False}
    config = {"i2i": {"method": {"_target_": "medkd.methods.unit.UNIT", "loss": loss, "weights": [1, 2.5]}}}
    assert method_settings(config) == [("loss", "DiceLoss(sigmoid=yes)"), ("weights", "1, 2.5")]
    two = {**config, "b": {"_target_": "medkd.methods.kd.KD", "temperature": 4.0}}
    assert ("KD temperature", "4.0") in method_settings(two)


def test_environment_is_flattened_without_the_command():
    found = environment_facts({"a_b": {"c": 1, "d": None}, "command": ["x"], "ok": True})
    assert found == [("a b · c", "1"), ("a b · d", "none"), ("ok", "yes")]


def test_patients_are_counted_in_the_fold_that_was_trained(run_dir):
    cases = [
        {"image": f"p{n}_{k}.nii.gz", "label": f"p{n}_{k}_seg.nii.gz", "patient": f"p{n}", "fold": n % 3}
        for n in range(6)
        for k in range(2)
    ]
    unlabeled = [{"image": f"u{n}.nii.gz", "patient": f"u{n}"} for n in range(5)]
    datalist = {"name": "brain", "labels": {"0": "background", "1": "a"}, "training": cases, "unlabeled": unlabeled}
    (run_dir / "datalist.json").write_text(json.dumps(datalist))
    (run_dir / "notes.json").unlink()
    facts = run_facts(read_run_folder(run_dir))
    assert (facts["Datalist"], facts["Labeled patients"], facts["Unlabeled patients"]) == ("brain", "6", "5")
    (run_dir / "config.json").write_text('{"fold": 1}')
    facts = run_facts(read_run_folder(run_dir))
    assert (facts["Labeled patients"], facts["Validation patients"]) == ("4", "2")


def test_only_methods_of_stages_that_run_are_named():
    other, mine = ({"_target_": f"medkd.methods.{name}"} for name in ("dacs.DACS", "fda.FDA"))
    config = {
        "dacs": other,
        "fda": {**mine, "beta": 0.05},
        "translator": {"method": {"_target_": "medkd.methods.cyclegan.CycleGAN"}},
        "train": {"method": "@fda"},
        "run": ["$@train#trainer.run()"],
    }
    assert method_settings(config) == [("beta", "0.05")]
    assert [name for name, _ in method_settings({"train": {"method": other | {"decay": 0.9}}})] == ["decay"]
