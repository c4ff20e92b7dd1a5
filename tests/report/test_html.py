from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medkd.errors import InputError
from medkd.metrics.cases import write_evaluation
from medkd.metrics.statistics import PairedResult
from medkd.report import cohort, write_comparison, write_report
from medkd.report.run_folder import read_evaluation

HOSTILE = "<script>alert('x')</script>\"'&--><img src=x onerror=alert(1)>"
DATA_URI = "data:image/png;base64,"


class Page(HTMLParser):
    """Collects the tags, the section ids and the visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.ids: list[str] = []
        self._section = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "section":
            self._section = attributes["id"]
            self.sections[self._section] = ""

    def handle_data(self, data):
        if self._section:
            self.sections[self._section] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.sections.values()).split())


def assert_self_contained(path: Path) -> None:
    source, page = path.read_text(encoding="utf-8"), Page(path)
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form", "video", "audio"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                assert value is not None
                assert value.startswith((DATA_URI, "#"))
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    assert "default-src 'none'" in source


def test_report_loads_and_runs_nothing(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert_self_contained(path)
    assert path.stat().st_size < 3_000_000


def test_every_section_is_there_when_its_files_are(run_dir):
    page = Page(write_report(run_dir))
    text = page.sections
    expected = ["results", "classes", "statement", "cases", "training", "run", "environment"]
    assert list(text) == expected
    assert "not measured" not in page.text
    assert "absent" not in page.text
    assert "Teacher" in text["results"]
    assert "124.387" in text["results"]
    assert re.search(r"0\.\d{3}\[0\.\d{3}, 0\.\d{3}\]", text["results"])
    assert "ACT-Net student − Supervised student" in text["results"]
    assert "n = 6 patients" in text["statement"]
    assert "Supervised student 1, ACT-Net student 0" in text["statement"]
    assert "One training seed" in text["statement"]
    assert "not a medical device" in text["statement"]
    for said in ("The MRI.", "The patients.", "Scored once.", "No E."):
        assert said in text["statement"]
    assert "supervised_loss" in text["training"]
    assert "1 point is not finite" in text["training"]
    for said in ("ACTNet", "brain.json", "medkd train 'x y'", "temperature", "20.0", "epoch 1 done"):
        assert said in text["run"]
    assert "@student" not in text["run"].split("Complete configuration")[0]
    assert "2.13.0" in text["environment"]
    assert sum(tag == "img" for tag, _ in page.tags) == 9
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 1 + 4


def test_ids_are_unique_over_the_page(run_dir):
    ids = Page(write_report(run_dir)).ids
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("gone", "section", "said"),
    [
        ("config.json", "run", "No config.json"),
        ("environment.json", "environment", "No environment.json"),
        ("metrics.csv", "training", "No training curves"),
        ("notes.json", "statement", "n = 6 patients"),
        ("log.txt", "run", "Complete configuration"),
        ("arms.json", "results", "act_net"),
    ],
)
def test_absent_file_leaves_its_section_out(run_dir, gone, section, said):
    (run_dir / gone).unlink()
    assert said in Page(write_report(run_dir)).sections[section]


def test_run_in_its_first_epoch_has_a_report(run_dir):
    shutil.rmtree(run_dir / "evaluation")
    (run_dir / "arms.json").unlink()
    (run_dir / "metrics.csv").write_text("iteration,epoch,split,name,value\n1,1,train,loss,0.5\n2,1,train,lo")
    page = Page(write_report(run_dir))
    assert next(iter(page.sections)) == "training"
    assert "Not evaluated yet" in page.sections["results"]
    assert "Nothing was evaluated yet" in page.sections["statement"]
    assert "1 iteration, 1 epoch recorded" in page.sections["training"]


def test_empty_folder_has_a_report(tmp_path):
    assert_self_contained(write_report(tmp_path))


def test_arms_without_evaluation_are_listed(run_dir):
    shutil.rmtree(run_dir / "evaluation")
    results = Page(write_report(run_dir)).sections["results"]
    assert "none was evaluated yet" in results
    assert "Supervised student––" in results.replace("\n", "")


def test_equal_files_give_equal_pages(run_dir):
    first = write_report(run_dir).read_bytes()
    figures = {path.name: path.read_bytes() for path in (run_dir / "figures").iterdir()}
    assert write_report(run_dir).read_bytes() == first
    assert {path.name: path.read_bytes() for path in (run_dir / "figures").iterdir()} == figures


def test_names_are_escaped_everywhere(run_dir, scores, picture):
    arm, metric = "evaluation/act_net", HOSTILE.replace(",", "").replace('"', "")
    named = scores(missed=("case_01",))
    hostile = [
        replace(s, case=HOSTILE + s.case, patient=HOSTILE + s.patient, class_name=HOSTILE + s.class_name) for s in named
    ]
    write_evaluation(run_dir / arm, hostile)
    write_evaluation(run_dir / "evaluation/supervised", hostile)
    arms = json.loads((run_dir / "arms.json").read_text())
    for number, entry in enumerate(arms):
        entry["title"] = f"{HOSTILE}{number}"
    (run_dir / "arms.json").write_text(json.dumps(arms))
    for name in ("notes.json", "config.json", "environment.json"):
        content = json.loads((run_dir / name).read_text())
        (run_dir / name).write_text(json.dumps({**content, "title": HOSTILE, HOSTILE: HOSTILE, "real": HOSTILE}))
    (run_dir / "metrics.csv").write_text(f"iteration,epoch,split,name,value\n1,1,{metric},{metric},0.5\n")
    (run_dir / "log.txt").write_text(HOSTILE)
    (run_dir / arm / "worst_cases" / "best_<b>'&.png").write_bytes(picture)
    path = write_report(run_dir)
    assert_self_contained(path)
    page = Page(path)
    assert "<script>alert('x')</script>" in page.text
    assert all(tag not in {"b", "script"} for tag, _ in page.tags)
    assert sum(tag == "img" for tag, _ in page.tags) == 10


def test_non_finite_scores_are_written_in_words(run_dir):
    page = Page(write_report(run_dir))
    assert "∞ (missed)" in page.sections["classes"]
    assert "∞ in 1 case" in page.sections["results"]
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", page.text.replace("val_hd95,inf", ""))


def test_case_without_any_structure_is_not_applicable(run_dir, scores):
    everything_empty = [s for s in scores(empty=("case_03",)) if not (s.case == "case_03" and s.class_index == 1)]
    write_evaluation(run_dir / "evaluation/act_net", everything_empty)
    assert "n/a (both empty)" in Page(write_report(run_dir)).sections["classes"]


def test_failed_cases_are_named_as_missing_from_the_numbers(run_dir):
    (run_dir / "evaluation/act_net/failures.csv").write_text("case,problem\ncase_99,truncated\n")
    statement = Page(write_report(run_dir)).sections["statement"]
    assert "Cases that failed and are in no number: Supervised student 0, ACT-Net student 1" in statement


def test_pictures_beyond_the_budget_are_named(run_dir, picture):
    folder = run_dir / "evaluation/act_net/worst_cases"
    (folder / "zz_huge.png").write_bytes(picture[:8] + bytes(1_500_000))
    (folder / "broken.png").write_bytes(b"not a picture")
    page = Page(write_report(run_dir))
    assert "ACT-Net student: broken.png, ACT-Net student: zz_huge.png" in page.sections["cases"]
    assert sum(tag == "img" for tag, _ in page.tags) == 9


def test_several_seeds_widen_what_the_page_claims(run_dir, scores):
    for seed in (0, 1, 2):
        write_evaluation(run_dir / f"evaluation/act_net/{seed}", scores(seed=seed))
    arms = json.loads((run_dir / "arms.json").read_text())
    arms[1]["evaluation"] = [f"evaluation/act_net/{seed}" for seed in (0, 1, 2)]
    (run_dir / "arms.json").write_text(json.dumps(arms))
    statement = Page(write_report(run_dir)).sections["statement"]
    assert "over patients and seeds" in statement
    assert "Training seeds per model: 1, 3." in statement


def test_damaged_file_is_named_and_the_old_report_stays(run_dir):
    before = write_report(run_dir).read_bytes()
    (run_dir / "arms.json").write_text("[{")
    with pytest.raises(InputError, match=r"arms\.json: is not valid JSON"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before


def test_comparison_shows_the_numbers_it_was_given(run_dir, tmp_path):
    result = PairedResult(0.1234, 0.05, 0.2, 0.0312, 0.0004, 6, 0, 6, 1, 0.95)
    a, b = run_dir / "evaluation/act_net", run_dir / "evaluation/supervised"
    path = write_comparison(a, b, {"dice": result, "volume": result}, tmp_path / "new" / "compare.html")
    assert_self_contained(path)
    page = Page(path)
    row = " ".join(page.sections["differences"].split())
    assert "act_net − supervised" in row
    assert "+0.123[+0.050, +0.200]60.031< 0.001better" in row
    assert "volume" in row
    assert "Differences by class" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert write_comparison(a, b, {"dice": result, "volume": result}, path).read_bytes() == path.read_bytes()


def test_comparison_names_folders_of_equal_name_apart(run_dir, tmp_path):
    a, b = run_dir / "evaluation/act_net", tmp_path / "other" / "act_net"
    shutil.copytree(a, b)
    evaluations = [[read_evaluation(folder)] for folder in (a, b)]
    result = cohort.paired(cohort.shared_values(*evaluations, cohort.DICE))
    path = write_comparison(a, b, result, tmp_path / "c.html")
    assert "evaluation/act_net − other/act_net" in Page(path).sections["differences"]
    assert "no difference shown" in Page(path).sections["differences"]
    titled = write_comparison(a, b, result, tmp_path / "c.html", title_a="ours", title_b="theirs")
    assert "ours − theirs" in Page(titled).sections["differences"]


def test_comparison_of_different_cases_is_refused(run_dir, tmp_path, scores):
    others = [replace(s, case="other_" + s.case) for s in scores()]
    write_evaluation(tmp_path / "others", others)
    result = PairedResult(0.0, 0.0, 0.0, 1.0, 1.0, 0, 0, 0, 1, 0.95)
    with pytest.raises(InputError, match="no case in common"):
        write_comparison(run_dir / "evaluation/act_net", tmp_path / "others", result, tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_arms_with_curves_of_their_own_are_told_apart(run_dir):
    arms = json.loads((run_dir / "arms.json").read_text())
    rows = "iteration,epoch,split,name,value\n1,1,train,loss,1\n2,1,train,loss,0.5\n"
    for arm in arms[:2]:
        arm["metrics"] = f"{arm['arm']}.csv"
        (run_dir / arm["metrics"]).write_text(rows)
    (run_dir / "arms.json").write_text(json.dumps(arms))
    training = Page(write_report(run_dir)).sections["training"]
    assert "This runSupervised studentACT-Net student" in "".join(training.split("\n"))


def test_data_without_spacing_are_reported_in_pixels(tmp_path, scores):
    in_pixels = [replace(s, unit="px", volume_ml_pred=None, volume_ml_ref=None) for s in scores(patients=2)]
    write_evaluation(tmp_path / "evaluation/only", in_pixels)
    page = Page(write_report(tmp_path))
    assert "HD95 px" in page.sections["results"]
    assert "distances are in pixels" in page.sections["statement"]
    assert "With so few patients" in page.sections["statement"]
    assert " mm" not in page.text.replace("not in mm", "")


def test_models_scored_on_different_cases_are_pointed_out(run_dir, scores):
    write_evaluation(run_dir / "evaluation/teacher", scores(patients=5))
    statement = Page(write_report(run_dir)).sections["statement"]
    assert "The models were not scored on the same cases" in statement
