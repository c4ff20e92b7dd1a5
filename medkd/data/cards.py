"""Dataset cards: what a public dataset holds, what its licence allows and how to get it.

A card is a small YAML file in data_manifests/. It never holds data. A SHA-256 is given only for files we have seen;
an MD5 only where its publisher, named beside it, states one.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medkd.data.datalists import describe_validation_error
from medkd.data.shipped import shipped_folder
from medkd.errors import ConfigError, InputError

_MAX_BYTES = 2**18  # the longest card is a few kilobytes
_NAME = r"[a-z][a-z0-9_]*"

Text = Annotated[str, Field(min_length=1)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
RelativePath = Annotated[str, Field(pattern=r"^[^/\\\s][^\\\x00]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CardFile(_Strict):
    """A file of the dataset, as it is offered for download.

    Attributes:
        path: where it goes, relative to the dataset's folder.
        url: where it is offered; ``None`` where only a person can get it.
        sha256: of the file, if we have seen it.
        md5: as published by ``checksum_source``.
        checksum_source: who states the MD5.
        size_bytes: if known.
        unpack: what kind of archive it is, if it is one.
        unpacks_to: the file or folder that unpacking leaves, relative to the dataset's folder.
    """

    path: RelativePath
    url: Url | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    checksum_source: Text | None = None
    size_bytes: Annotated[int, Field(gt=0)] | None = None
    unpack: Literal["tar", "zip", "gz"] | None = None
    unpacks_to: RelativePath | None = None

    @field_validator("path", "unpacks_to")
    @classmethod
    def _stay_inside(cls, path: str | None) -> str | None:
        if path is not None and ".." in path.split("/"):
            raise ValueError("leaves the dataset's folder")
        return path

    @model_validator(mode="after")
    def _refuse_half_facts(self) -> CardFile:
        if (self.md5 is None) != (self.checksum_source is None):
            raise ValueError("md5 and checksum_source belong together")
        if (self.unpack is None) != (self.unpacks_to is None):
            raise ValueError("unpack and unpacks_to belong together")
        return self


class PublishedSplit(_Strict):
    """A split by patient that the literature uses.

    Attributes:
        source: who published it.
        training: patients.
        validation: patients.
        test: patients.
        labeled: the training patients whose labels are used where few are.
    """

    source: Text
    training: list[Text] = []
    validation: list[Text] = []
    test: list[Text] = []
    labeled: list[Text] = []

    @model_validator(mode="after")
    def _refuse_overlap(self) -> PublishedSplit:
        patients = [*self.training, *self.validation, *self.test]
        if len(set(patients)) != len(patients):
            raise ValueError("a patient is listed twice")
        if not set(self.labeled) <= set(self.training):
            raise ValueError("a labeled patient is not in training")
        return self


class Card(_Strict):
    """What is known of a public dataset.

    Attributes:
        name: as in ``medkd data show NAME``, and of the file.
        title: the dataset's full name.
        modality: for example ``"cine MR"``.
        task: what its labels are for.
        licence: as exactly as we know it.
        licence_verified: whether we read it in ``licence_source``.
        licence_source: where.
        citation: what to cite.
        home_page: the provider's.
        access: ``direct`` download, ``registration``, ``application`` for each user, or ``packaged`` with a dependency.
        how_to_get: what to do, in words.
        download_allowed: whether the terms let a program download it for the user who asks.
        files: what is downloaded.
        counts: how many patients, images and so on there are.
        layout: which reader of ``medkd data prepare`` knows its folders.
        layout_patterns: what lies where, as shell patterns.
        layout_tested: whether a test of ours builds that layout and prepares it.
        patient_key: regular expression with one group that finds the patient in a path.
        labels: integer label to name; for tasks other than segmentation, class to name.
        intensities: modality to the window that images are scaled with before training, where that is not obvious.
        published_split: if there is one by patient.
        notes: what a user should know.
    """

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    title: Text
    modality: Text
    task: Literal["segmentation", "classification", "detection"]
    licence: Text
    licence_verified: bool
    licence_source: Text | None = None
    citation: Text
    home_page: Url
    access: Literal["direct", "registration", "application", "packaged"]
    how_to_get: Text
    download_allowed: bool = False
    files: list[CardFile] = []
    counts: dict[Text, Annotated[int, Field(gt=0)]] = {}
    layout: Literal["acdc", "chaos", "ibsi_sts", "idrid", "mm_whs", "msd"] | None = None
    layout_patterns: dict[Text, Text] = {}
    layout_tested: bool = False
    patient_key: str | None = None
    labels: dict[int, Text] = {}
    intensities: dict[Text, Text] = {}
    published_split: PublishedSplit | None = None
    notes: list[Text] = []

    @field_validator("patient_key")
    @classmethod
    def _one_group(cls, expression: str | None) -> str | None:
        try:
            if expression is not None and re.compile(expression).groups != 1:
                raise ValueError("has not exactly one group")
        except re.error as error:
            raise ValueError(f"is not a regular expression ({error})") from None
        return expression

    @model_validator(mode="after")
    def _refuse_empty_claims(self) -> Card:
        if self.licence_verified and self.licence_source is None:
            raise ValueError("licence_verified needs a licence_source")
        if self.layout_tested and self.layout is None:
            raise ValueError("layout_tested needs a layout")
        if self.layout is not None and (self.patient_key is None or not self.labels):
            raise ValueError("a layout needs patient_key and labels")
        if self.download_allowed and not any(file.url for file in self.files):
            raise ValueError("download_allowed needs a file with a url")
        return self


def list_cards() -> list[Card]:
    """All cards that ship with medkd, by name.

    Raises:
        InputError: a card that is not as it should be.
    """
    return [read_card(path) for path in sorted(shipped_folder("data_manifests").glob("*.yaml"))]


def load_card(name: str) -> Card:
    """The card of a dataset.

    Raises:
        ConfigError: there is none of that name (the nearest is suggested).
    """
    paths = {path.stem: path for path in shipped_folder("data_manifests").glob("*.yaml")}
    if name not in paths:
        near = get_close_matches(name.lower().replace("-", "_"), paths, n=1)
        remedy = f"did you mean {near[0]}?" if near else "`medkd data list` shows all"
        raise ConfigError(f"dataset {name}", "has no card", remedy)
    return read_card(paths[name])


def read_card(path: str | Path) -> Card:
    """Read and check one card.

    Raises:
        InputError: naming the file and the key, for anything but plain, strict YAML of a card.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(path, f"is larger than {_MAX_BYTES >> 10} KiB", "a card is a short description")
        content = yaml.load(path.read_text(encoding="utf-8"), _CardLoader)  # a SafeLoader
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(path, f"is not plain YAML ({_first_line(error)})", "correct it") from None
    if not isinstance(content, dict):
        raise InputError(path, "is not a card", "write key: value lines")
    try:
        card = Card.model_validate(content)
    except ValidationError as error:
        where, problem = describe_validation_error(error)
        raise InputError(f"{path}: {where}", problem, "correct that entry") from None
    if card.name != path.stem:
        raise InputError(path, f"names itself {card.name}", "give the file and the card one name")
    return card


class _CardLoader(yaml.SafeLoader):
    """Plain data only: no tags, no aliases (which can multiply without end), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError(f"a key appears twice near line {node.start_mark.line + 1}")
        return mapping


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or str(error)
    return text.splitlines()[0] + (f", line {mark.line + 1}" if mark else "") if text else type(error).__name__
