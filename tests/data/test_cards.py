"""Dataset cards: those that ship say what they must, and nothing but a plain card is read."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from medkd.data import cards
from medkd.data.cards import Card, list_cards, load_card, read_card
from medkd.data.shipped import shipped_folder
from medkd.errors import ConfigError, InputError

EXPECTED = [
    "acdc",
    "mnms",
    "mm_whs",
    "chaos",
    "msd_hippocampus",
    "msd_spleen",
    "msd_lung",
    "msd_heart",
    "btcv",
    "nsclc_radiomics",
    "ibsi_sts",
    "camelyon16",
    "patch_camelyon",
    "bcss",
    "breakhis",
    "edd2020",
    "kvasir_seg",
    "eyepacs",
    "messidor2",
    "idrid",
    "mednist",
    "cifar10",
    "cifar100",
    "mni152_demo",
]

CARD = """\
name: toy
title: Toy
modality: MR
task: segmentation
licence: CC0
licence_verified: false
citation: none
home_page: https://example.org
access: direct
how_to_get: ask
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_card(more: str = "", base: str = CARD, name: str = "toy") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(base + more)
        return path

    return write_card


def test_every_promised_dataset_has_a_card() -> None:
    found = list_cards()
    assert sorted(card.name for card in found) == sorted(EXPECTED)
    for card in found:
        assert load_card(card.name) == card


@pytest.mark.parametrize("name", EXPECTED)
def test_no_card_claims_what_nobody_saw(name: str) -> None:
    card = load_card(name)
    assert card.licence_verified is False or card.licence_source
    for file in card.files:
        assert not (card.download_allowed and file.url) or file.sha256 or file.md5
        assert file.url is None or file.url.startswith("https://")
        if file.url:
            assert file.sha256 is None, "a SHA-256 is only for files we have seen, and none was downloaded"


def test_the_acdc_split_is_seventy_ten_twenty_with_seven_labelled() -> None:
    split = load_card("acdc").published_split
    assert split is not None
    sizes = len(split.training), len(split.validation), len(split.test), len(split.labeled)
    assert sizes == (70, 10, 20, 7)
    assert {*split.training, *split.validation, *split.test} == {f"patient{n:03}" for n in range(1, 101)}


def test_the_nearest_card_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean msd_hippocampus"):
        load_card("msd-hippocampos")
    with pytest.raises(ConfigError, match="data list"):
        load_card("../../etc/passwd")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("licence_verified: true\n", "twice near line"),
        ("colour: red\n", "colour: Extra inputs are not permitted"),
        ("labels: {0: background, 0: again}\n", "twice"),
        ("labels: {one: x}\n", "labels"),
        ("counts: {images: '3'}\n", "counts.images"),
        ("layout_tested: yes\n", "layout_tested needs a layout"),
        ("layout: acdc\n", "needs patient_key and labels"),
        ("download_allowed: true\n", "needs a file with a url"),
        ("patient_key: '(a)(b)'\n", "not exactly one group"),
        ("patient_key: '('\n", "not a regular expression"),
        ("files: [{path: ../x}]\n", "leaves the dataset's folder"),
        ("files: [{path: /x}]\n", r"files\[0\].path"),
        ("files: [{path: a, sha256: abc}]\n", r"files\[0\].sha256"),
        (f"files: [{{path: a, md5: {'a' * 32}}}]\n", "md5 and checksum_source belong together"),
        ("files: [{path: a, unpack: tar}]\n", "unpack and unpacks_to belong together"),
        ("files: [{path: a, url: 'file:///etc/passwd'}]\n", r"files\[0\].url"),
        ("published_split: {source: s, training: [p1], test: [p1]}\n", "listed twice"),
        ("published_split: {source: s, training: [p1], labeled: [p2]}\n", "not in training"),
        ("notes: !!python/object/apply:os.system ['true']\n", "not plain YAML"),
        ("notes: !include other.yaml\n", "not plain YAML"),
        ("notes: [&a x, *a]\n", "aliases are not allowed"),
        ("notes: [\n", "not plain YAML"),
        ("notes: " + "[" * 5000 + "\n", "not plain YAML"),
        ("notes: [2019-01-01]\n", "notes"),
        ("# " + "x" * 300_000 + "\n", "is larger than 256 KiB"),
    ],
)
def test_what_is_not_a_card_is_refused_in_one_line(write, more: str, message: str) -> None:
    path = write(more)
    with pytest.raises(InputError, match=message) as caught:
        read_card(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_is_refused_at_once(write) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    with pytest.raises(InputError, match="aliases are not allowed"):
        read_card(write(bomb))


def test_a_card_must_carry_the_name_of_its_file(write) -> None:
    with pytest.raises(InputError, match="names itself toy"):
        read_card(write(name="other"))
    with pytest.raises(InputError, match="is not a card"):
        read_card(write(base="- a\n"))
    with pytest.raises(InputError, match="cannot be read"):
        read_card("/nowhere/toy.yaml")
    with pytest.raises(InputError, match="title: Field required"):
        read_card(write(base=CARD.replace("title: Toy\n", "")))


def test_a_plain_card_is_read(write) -> None:
    card = read_card(write("labels: {0: background, 7: thing}\n"))
    assert isinstance(card, Card)
    assert card.labels == {0: "background", 7: "thing"}


def test_an_installation_without_cards_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped_folder("data_manifests").is_dir()
    with pytest.raises(ConfigError, match="install medkd again"):
        shipped_folder("nothing_of_this_name")
    monkeypatch.setattr(cards, "shipped_folder", lambda name: Path("/nowhere"))
    assert list_cards() == []


def test_the_wheel_lists_every_package_and_both_shipped_folders() -> None:
    root = Path(__file__).resolve().parents[2]
    tables = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {".".join(path.parent.relative_to(root).parts) for path in (root / "medkd").rglob("__init__.py")}
    assert set(tables["packages"]) == packages | {"medkd.bundles", "medkd.data_manifests"}
    assert tables["package-dir"] == {"medkd.bundles": "bundles", "medkd.data_manifests": "data_manifests"}
