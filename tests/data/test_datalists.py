"""Datalists: what is accepted, what is refused, and what a run gets from them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import load_decathlon_datalist

from medkd.data import volumes
from medkd.data.datalists import FRAME_MARK, Case, Datalist, read_datalist, write_datalist
from medkd.errors import ConfigError, InputError

LABELS = {"0": "background", "1": "lesion"}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def labeled(name: str, patient: str | None = None, **extra: Any) -> dict[str, Any]:
    entry = {"image": f"{name}.nii.gz", "label": f"{name}_seg.nii.gz"} | extra
    return entry if patient is None else entry | {"patient": patient}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    touch(tmp_path, *(f"{name}{kind}.nii.gz" for name in "abcdef" for kind in ("", "_seg")))
    return tmp_path


def save(folder: Path, **content: Any) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps({"labels": LABELS} | content))
    return path


def refusal(path: Path, dataset_dir: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_datalist(path, dataset_dir)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_a_decathlon_file_is_read(folder: Path) -> None:
    path = save(
        folder,
        name="Task",
        modality={"0": "FLAIR", "1": "T1w"},
        numTraining=1,
        training=[labeled("a", "p1", domain="A", age=61)],
        unlabeled=["b.nii.gz"],
    )
    datalist = read_datalist(path)
    assert datalist.modality == "FLAIR, T1w"
    assert datalist.label_names == {0: "background", 1: "lesion"}
    assert datalist.section("training") == [
        {
            "image": str(folder / "a.nii.gz"),
            "label": str(folder / "a_seg.nii.gz"),
            "case": "a",
            "patient": "p1",
            "domain": "A",
            "age": 61,
        }
    ]
    assert datalist.section("unlabeled") == [{"image": str(folder / "b.nii.gz"), "case": "b", "patient": "b"}]


def test_unlabeled_items_never_carry_a_label(folder: Path) -> None:
    datalist = read_datalist(
        save(folder, training=[labeled("a")], unlabeled=[{"image": "b.nii.gz", "label": "gone.nii"}])
    )
    assert all("label" not in item for item in datalist.section("unlabeled"))


def test_monai_reads_what_is_written(folder: Path) -> None:
    out = folder / "out.json"
    write_datalist(read_datalist(save(folder, training=[labeled("a", "p")], test=[labeled("b", "q")])), out)
    for section in ("training", "test"):
        items = load_decathlon_datalist(str(out), data_list_key=section)
        expected = read_datalist(out).section(section)  # type: ignore[arg-type]
        assert [(item["image"], item["label"]) for item in items] == [(e["image"], e["label"]) for e in expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no case"),
        ({"training": [], "test": []}, "has no case"),
        ({"training": "a.nii.gz"}, "training: .*valid list"),
        ({"training": [{"image": "a.nii.gz"}]}, r"training\[0\]: a.nii.gz has no label; .*unlabeled"),
        ({"training": [{"label": "a_seg.nii.gz"}]}, r"training\[0\].image: Field required"),
        ({"training": [labeled("a"), labeled("a")]}, r"training\[1\]: a.nii.gz is already training\[0\]"),
        ({"training": [labeled("a")], "unlabeled": ["./a.nii.gz"]}, r"unlabeled\[0\]: ./a.nii.gz is already training"),
        ({"training": [labeled("a")], "unlabeled": ["x/../a.nii.gz"]}, r"already training\[0\]"),
        ({"training": [labeled("a")], "unlabeled": [{"image": "a.nii.gz", "frame": 2}]}, r"already training\[0\]"),
        ({"training": [{"image": "a.nii.gz", "label": "./a.nii.gz"}]}, "is its own label"),
        ({"training": [labeled("a")], "unlabeled": ["../a.nii.gz"]}, r"unlabeled\[0\]: image ../a.nii.gz lies outside"),
        ({"training": [labeled("a")], "unlabeled": ["/etc/hosts"]}, "lies outside"),
        ({"training": [{"image": "a.nii.gz", "label": "x/../../a.nii.gz"}]}, "label .* lies outside"),
        ({"unlabeled": ["a\0.nii.gz"]}, "null character"),
        ({"unlabeled": [""]}, r"unlabeled\[0\].image"),
        ({"unlabeled": [{"image": ["a.nii.gz", "b.nii.gz"]}]}, "several files"),
        ({"unlabeled": ["a.nii.gz", "y.nii.gz", "z.nii.gz"]}, r"unlabeled\[1\]: y.nii.gz .* \(and 1 more\)"),
        ({"training": [labeled("a")], "test": [labeled("b", "p")]}, r"training\[0\]: a.nii.gz has no patient"),
        ({"training": [labeled("a", "p")], "test": [labeled("b", " ")]}, r"test\[0\]: b.nii.gz has no patient"),
        ({"training": [labeled("a", fold=0)]}, "has no patient"),
        ({"training": [labeled("a", "p")], "validation": [labeled("b", " p ")]}, r"also in training\[0\] \(leakage\)"),
        ({"unlabeled": [{"image": "a.nii.gz", "patient": 7}], "test": [labeled("b", "7")]}, "leakage"),
        ({"validation": [labeled("a", "p")], "test": [labeled("b", "p")]}, "leakage"),
        ({"training": [labeled("a", "p", fold=0), labeled("b", "p", fold=1)]}, "in folds 0 and 1"),
        ({"training": [labeled("a", "p", fold=0), labeled("b", "p")]}, "in folds 0 and None"),
        ({"training": [labeled("a", "p", fold=-1)]}, r"training\[0\].fold"),
        ({"training": [labeled("a", "p", fold="1")]}, r"training\[0\].fold"),
        ({"training": [labeled("a", frame=True)]}, r"training\[0\].frame"),
        ({"training": [labeled("a")], "unlabelled": [{"image": "b.nii.gz"}]}, 'did you mean "unlabeled"'),
        ({"training": [labeled("a")], "labels": {}}, 'labels: has no "0"'),
        ({"training": [labeled("a")], "labels": {"1": "x"}}, 'labels: has no "0"'),
        ({"training": [labeled("a")], "labels": {"0": "b", "01": "x"}}, '"01" is not a label'),
        ({"training": [labeled("a")], "labels": {"0": "b", "-1": "x"}}, '"-1" is not a label'),
        ({"training": [labeled("a")], "labels": {"0": "b", "²": "x"}}, "is not a label"),
        ({"training": [labeled("a")], "labels": {"background": 0}}, "labels.background"),
        ({"training": [labeled("a")], "labels": {"0": "b", "1": "x", "2": "x"}}, 'two labels are named "x"'),
        ({"training": [labeled("a")], "labels": {"0": "b", "1": ""}}, 'label "1" has no name'),
        ({"training": [labeled("a")], "dataset_dir": "/"}, "dataset_dir"),
        ({"training": [labeled("a")], "path": "/etc"}, "path"),
    ],
)  # fmt: skip
def test_unusable_content_is_refused_naming_the_entry(folder: Path, content: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(save(folder, **content)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON datalist"),
        ('{"training": [', "not a JSON datalist"),
        ("[1, 2]", "not a JSON object"),
        ('{"labels": {"0": "a", "0": "b"}}', 'the key "0" appears twice'),
        ('{"x": NaN}', "NaN is not valid JSON"),
        ('{"x": ' + "[" * 100_000, "nested too deeply"),
        ("\udcff", "not a JSON datalist"),
    ],
)
def test_a_file_that_is_no_datalist_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert message in refusal(path)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.json")
    assert "is a folder" in refusal(tmp_path)


def test_a_link_to_an_image_of_another_section_is_the_same_image(folder: Path) -> None:
    os.symlink(folder / "a.nii.gz", folder / "alias.nii.gz")
    os.link(folder / "a.nii.gz", folder / "hard.nii.gz")
    for alias in ("alias", "hard"):
        assert "already" in refusal(save(folder, training=[labeled("a")], unlabeled=[f"{alias}.nii.gz"]))


def test_frames_of_one_file_are_different_images(folder: Path) -> None:
    entries = [{"image": "a.nii.gz", "frame": k, "patient": "p"} for k in range(3)]
    items = read_datalist(save(folder, unlabeled=entries)).section("unlabeled")
    assert [item["case"] for item in items] == ["a_frame0", "a_frame1", "a_frame2"]
    assert [item["frame"] for item in items] == [0, 1, 2]
    assert items[2]["image"] == f"{folder / 'a.nii.gz'}{FRAME_MARK}2"
    assert FRAME_MARK == volumes.FRAME_MARK


def test_paths_start_from_dataset_dir_or_else_from_the_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lists = tmp_path_factory.mktemp("lists")
    path = save(lists, training=[labeled("a")])
    assert "does not exist" in refusal(path)
    assert read_datalist(path, folder).section("training")[0]["image"] == str(folder / "a.nii.gz")
    beside = save(folder, training=[labeled("a")])
    assert read_datalist(beside, lists).dataset_dir == folder
    touch(lists, "a.nii.gz", "a_seg.nii.gz")
    assert read_datalist(beside, lists).dataset_dir == lists
    with pytest.raises(InputError, match="not a folder"):
        read_datalist(path, folder / "nowhere")


def test_files_need_not_exist_when_not_asked(tmp_path: Path) -> None:
    assert read_datalist(save(tmp_path, training=[labeled("zz")]), check_files=False).training[0].image == "zz.nii.gz"


def test_a_written_datalist_is_found_from_its_own_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "data" / "set"
    touch(root, "a.nii.gz", "a_seg.nii.gz")
    source = Datalist(labels=LABELS, training=[Case(**labeled("a", "p"))], dataset_dir=root)
    write_datalist(source, tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text())["training"][0]["image"] == "data/set/a.nii.gz"
    assert read_datalist(tmp_path / "up.json").section("training") == source.section("training")
    (tmp_path / "lists").mkdir()
    with caplog.at_level("INFO"):
        write_datalist(source, tmp_path / "lists" / "aside.json")
    assert str(root) in caplog.text
    assert read_datalist(tmp_path / "lists" / "aside.json", root).section("training") == source.section("training")
    with pytest.raises(InputError, match="does not exist"):
        write_datalist(source, tmp_path / "no" / "where.json")


def test_further_fields_survive_writing_and_reach_items_only_when_common(folder: Path) -> None:
    path = save(folder, licence="CC0", training=[labeled("a", site="x", sex="F"), labeled("b", site="y")])
    write_datalist(read_datalist(path), folder / "again.json")
    again = read_datalist(folder / "again.json")
    assert again.model_extra == {"licence": "CC0"}
    assert again.training[0].model_extra == {"site": "x", "sex": "F"}
    assert [set(item) & {"site", "sex"} for item in again.section("training")] == [{"site"}, {"site"}]


def test_domain_is_in_every_item_once_one_case_has_it(folder: Path) -> None:
    items = read_datalist(save(folder, training=[labeled("a", domain="MR"), labeled("b")])).section("training")
    assert [item["domain"] for item in items] == ["MR", ""]


def test_case_names_are_unique_with_parents_only_where_needed(tmp_path: Path) -> None:
    names = [
        "s1/CT.nii.gz",
        "s2/CT.nii.gz",
        "s2/MR.nii.gz",
        "x/deep/T.nii",
        "y/deep/T.nii",
        "q/scan.nii",
        "q/scan.nii.gz",
        "1.2.84",
    ]
    touch(tmp_path, *names)
    cases = [item["case"] for item in read_datalist(save(tmp_path, unlabeled=names)).section("unlabeled")]
    assert cases[:5] == ["s1_CT", "s2_CT", "MR", "x_deep_T", "y_deep_T"]
    assert cases[7] == "1.2.84"
    assert len(set(cases)) == len(names)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "a_b", "A", "b_a"]), min_size=1, max_size=4), min_size=1, unique_by=tuple
    )
)
def test_case_names_never_clash(parts: list[list[str]]) -> None:
    paths = ["/".join([*part[:-1], part[-1] + ".nii"]) for part in parts]
    datalist = Datalist(unlabeled=[Case(image=path) for path in paths], dataset_dir=Path("/nowhere"))
    cases = [item["case"].casefold() for item in datalist.section("unlabeled")]
    assert len(set(cases)) == len(cases)
    assert not any("/" in case for case in cases)


@pytest.fixture
def folded(folder: Path) -> Datalist:
    return read_datalist(
        save(
            folder,
            training=[labeled("a", "p0", fold=0), labeled("b", "p1", fold=1), labeled("c", "p2")],
            unlabeled=[{"image": "d.nii.gz", "patient": "p0"}, {"image": "e.nii.gz", "patient": "p9"}],
            test=[labeled("f", "pt")],
        )
    )


def test_a_fold_is_validated_on_and_its_patients_leave_training(folded: Datalist) -> None:
    def patients(section: Any, **options: Any) -> list[str]:
        return [item["patient"] for item in folded.section(section, **options)]

    assert folded.folds == [0, 1]
    assert patients("validation", fold=0) == ["p0"]
    assert patients("training", fold=0) == ["p1", "p2"]
    assert patients("unlabeled", fold=0) == ["p9"]
    assert patients("unlabeled", fold=1) == ["p0", "p9"]
    assert patients("unlabeled", fold=0, for_training=False) == ["p0", "p9"]
    assert patients("test", fold=0) == ["pt"]
    assert patients("training") == ["p0", "p1", "p2"]
    assert patients("validation") == []


def test_unknown_folds_and_sections_are_refused(folded: Datalist, folder: Path) -> None:
    with pytest.raises(InputError, match=r"no fold 5: its folds are \[0, 1\]"):
        folded.section("training", fold=5)
    with pytest.raises(InputError, match="its training cases have none"):
        read_datalist(save(folder, training=[labeled("a")])).section("training", fold=0)
    with pytest.raises(ConfigError, match="section train: does not exist"):
        folded.section("train")  # type: ignore[arg-type]


def test_the_hash_follows_content_not_spelling_or_place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    one = read_datalist(save(folder, name="x", training=[labeled("a", "p")], unlabeled=["./b.nii.gz"]))
    other = tmp_path_factory.mktemp("copy")
    touch(other, "a.nii.gz", "a_seg.nii.gz", "b.nii.gz")
    two = read_datalist(save(other, name="y", training=[labeled("a", "p")], unlabeled=[{"image": "b.nii.gz"}]))
    assert one.sha256 == two.sha256
    assert one.difference(two) == ""


def test_the_difference_names_what_changed(folder: Path) -> None:
    one = read_datalist(save(folder, training=[labeled("a", "p"), labeled("b", "q")], unlabeled=["c.nii.gz"]))
    two = read_datalist(save(folder, training=[labeled("a", "z"), labeled("d", "q")], unlabeled=["c.nii.gz"]))
    assert one.sha256 != two.sha256
    assert one.difference(two) == ("training: 1 removed (b.nii.gz), 1 added (d.nii.gz), 1 changed (a.nii.gz)")
    three = read_datalist(save(folder, training=[labeled("b", "q"), labeled("a", "p")], unlabeled=["c.nii.gz"]))
    assert one.difference(three) == "training: other order"
    four = one.model_copy(update={"labels": {"0": "bg", "1": "lesion"}})
    assert one.difference(four).startswith("labels")


def test_a_changed_copy_is_checked_like_a_new_datalist(folded: Datalist) -> None:
    folded.section("training")
    renamed = folded.model_copy(update={"test": [], "unlabeled": [Case(image="q.nii.gz", patient="p7")]})
    assert renamed.section("unlabeled")[0]["case"] == "q"
    with pytest.raises(InputError, match="leakage"):
        folded.model_copy(update={"test": [Case(image="q.nii.gz", patient="p0")]})


def test_section_of_one_domain_holds_its_cases_only(folder):
    cases = [labeled("a", "1", domain="CT"), labeled("b", "2", domain="MR"), labeled("c", "3", domain="MR")]
    listed = read_datalist(save(folder, labels=LABELS, training=cases), unpaired=True)
    assert [item["case"] for item in listed.section("training", domain="MR")] == ["b", "c"]
    assert listed.section("test", domain="MR") == []
    with pytest.raises(InputError, match="has no domain 'PET'"):
        listed.section("training", domain="PET")


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (labeled("b", "1", domain="MR"), "patient 1 is in domain CT and in domain MR"),
        (labeled("b", "2"), r"training\[1\]: has no domain"),
    ],
)
def test_pairs_are_refused_where_a_method_must_not_see_any(folder, second, problem):
    path = save(folder, labels=LABELS, training=[labeled("a", "1", domain="CT"), second])
    read_datalist(path)
    with pytest.raises(InputError, match=problem):
        read_datalist(path, unpaired=True)
