"""Datalists: which images, labels and patients a run trains on, validates on and is tested on.

The file is MONAI's Decathlon JSON with a patient for every case::

    {"name": "…", "modality": "MR", "labels": {"0": "background", "1": "anterior"},
     "training":   [{"image": "a.nii.gz", "label": "a_seg.nii.gz", "patient": "p1", "domain": "A", "fold": 0}],
     "unlabeled":  ["b.nii.gz", {"image": "cine.nii.gz", "patient": "p2", "frame": 3}],
     "validation": [...], "test": [...]}

Everything that would make a result wrong in silence is refused here, at the door: a patient on both sides of a split,
one image under two names, a path that leaves the dataset folder, a misspelt section.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medkd.data.atomic import atomic_write
from medkd.data.case_names import unique_case_names
from medkd.data.datalist_rules import (
    SECTIONS,
    TRAIN_SIDE,
    Section,
    refuse_missing_files,
    refuse_pairs,
    refuse_unusable,
)
from medkd.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

FRAME_MARK = "#frame="  # what VolumeReader understands behind the path of a 4-D file
_MAX_BYTES = 256 * 2**20  # a million cases fit; a file beyond this is not a datalist
_FORBIDDEN_KEYS = ("path", "dataset_dir")  # a file must not choose which folder it may read from

Index = Annotated[int, Field(ge=0, strict=True)]


class Case(BaseModel):
    """One image of a datalist; further fields are kept as they are.

    Attributes:
        image: file, or folder of a DICOM series, relative to the datalist's folder or to ``dataset_dir``.
        label: file with the integer label map, or the class of the whole image as an integer (classification); ``None``
            where there is none.
        patient: whose image it is. Empty only in a datalist without any split.
        domain: scanner, site or modality, where a method asks for one.
        fold: the cross-validation fold in which this case is held out.
        frame: which frame of a 4-D file, counted from 0.
    """

    model_config = ConfigDict(extra="allow", frozen=True, coerce_numbers_to_str=True)

    image: Annotated[str, Field(min_length=1)]
    label: Annotated[str, Field(min_length=1)] | Index | None = None
    patient: str = ""
    domain: str | None = None
    fold: Index | None = None
    frame: Index | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_plain_path(cls, entry: Any) -> Any:
        """Decathlon lists images without a label as bare strings."""
        return {"image": entry} if isinstance(entry, str) else entry

    @field_validator("image", "label", mode="before")
    @classmethod
    def _refuse_several_files(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("several files for one image are not supported: name the one to use")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a path with a null character")
        return value

    @field_validator("patient")
    @classmethod
    def _strip(cls, patient: str) -> str:
        return patient.strip()


class Datalist(BaseModel):
    """A checked datalist. Constructing one refuses what would leak or repeat data.

    Attributes:
        name: the dataset's name.
        modality: for example ``"MR"``; Decathlon's ``{"0": "MRI"}`` is accepted.
        labels: integer label (as a string, Decathlon's way) to its name.
        training: cases with a label.
        unlabeled: images whose labels, if any exist, are never loaded.
        validation: cases for choosing among models.
        test: cases scored once.
        path: the file it was read from.
        dataset_dir: the absolute folder that relative paths start from.

    Raises:
        InputError: naming the file and the entry.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = ""
    modality: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    training: list[Case] = Field(default_factory=list)
    unlabeled: list[Case] = Field(default_factory=list)
    validation: list[Case] = Field(default_factory=list)
    test: list[Case] = Field(default_factory=list)
    path: Path | None = Field(default=None, exclude=True)
    dataset_dir: Path = Field(default_factory=Path.cwd, exclude=True)

    @field_validator("modality", mode="before")
    @classmethod
    def _join_channels(cls, modality: Any) -> Any:
        return ", ".join(str(name) for name in modality.values()) if isinstance(modality, Mapping) else modality

    @field_validator("dataset_dir")
    @classmethod
    def _absolute(cls, folder: Path) -> Path:
        return Path(os.path.abspath(folder))

    @model_validator(mode="after")
    def _refuse_unusable(self) -> Datalist:
        refuse_unusable(self)
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced, checked like a new datalist (so ``deep`` makes no difference)."""
        return type(self).model_validate(dict(self) | dict(update or {}))

    @property
    def where(self) -> str:
        """How messages name this datalist."""
        return str(self.path) if self.path else f"datalist {self.name or '(unnamed)'}"

    @property
    def label_names(self) -> dict[int, str]:
        """Integer label to name, in increasing order."""
        return {int(key): self.labels[key] for key in sorted(self.labels, key=int)}

    @property
    def classifies(self) -> bool:
        """Whether its labels are classes of whole images rather than label maps."""
        return any(isinstance(case.label, int) for _, _, case in self.entries())

    @property
    def folds(self) -> list[int]:
        """The folds that ``training`` is divided into; empty when it is not."""
        return sorted({case.fold for case in self.training if case.fold is not None})

    @property
    def domains(self) -> list[str]:
        """The modalities, scanners or sites that its cases name."""
        return sorted({case.domain for _, _, case in self.entries() if case.domain is not None})

    @property
    def patients(self) -> dict[Section, set[str]]:
        """The patients of every section."""
        return {section: {case.patient for case in self.cases(section)} for section in SECTIONS}

    def cases(self, section: Section) -> list[Case]:
        """The cases of one section as they stand in the file."""
        return getattr(self, section)

    def entries(self) -> Iterator[tuple[Section, int, Case]]:
        """Every case with its section and its index there."""
        for section in SECTIONS:
            for index, case in enumerate(self.cases(section)):
                yield section, index, case

    def resolve(self, path: str) -> Path:
        """The absolute form of an entry's path (nothing on disk is looked at)."""
        return Path(os.path.normpath(os.path.join(self.dataset_dir, path)))

    def case_id(self, case: Case) -> str:
        """The name of a case in outputs: its file name, with parent folders only where that is ambiguous."""
        return self._case_ids[case.image, case.frame]

    @cached_property
    def _case_ids(self) -> dict[tuple[str, int | None], str]:
        keys = [(case.image, case.frame) for _, _, case in self.entries()]
        files = [(self.resolve(image).relative_to(self.dataset_dir), frame) for image, frame in keys]
        return dict(zip(keys, unique_case_names(files), strict=True))

    def section(
        self, name: Section, fold: int | None = None, for_training: bool = True, *, domain: str | None = None
    ) -> list[dict[str, Any]]:
        """Items for MONAI's datasets.

        With ``fold=k``, the ``training`` cases of fold k are that fold's ``validation`` (as are ``unlabeled`` entries
        of fold k that come with a label: theirs is used there and only there), and neither they nor any unlabeled
        image of their patients are in that fold's ``training`` and ``unlabeled``. A fixed ``validation`` section then
        stays unused; ``test`` is the same in every fold.

        Args:
            name: training, unlabeled, validation or test.
            fold: the fold held out; ``None`` for the sections as they stand.
            for_training: ``False`` keeps the images of held-out patients in ``training`` and ``unlabeled``, for
                looking at data rather than learning from it.
            domain: only the cases of this modality, scanner or site.

        Returns:
            dicts of ``image`` and ``label`` (absolute paths; a class stays an integer), ``patient``, ``case`` and,
            where given, ``domain``, ``frame`` and the entry's further fields. ``label`` is absent where there is none
            and always in ``unlabeled``. All items of a section have the same keys besides ``label`` and ``frame``:
            ``domain`` is ``""`` where only others have one, a further field is left out unless every case has it. The
            ``image`` of a case with a ``frame`` ends in ``#frame=<k>``, by which ``VolumeReader`` loads that frame of
            the 4-D file.

        Raises:
            ConfigError: no such section.
            InputError: no such fold; no case of that domain anywhere in the datalist.
        """
        if name not in SECTIONS:
            raise ConfigError(f"section {name}", "does not exist", f"use one of {', '.join(SECTIONS)}")
        cases = self.cases(name)
        if fold is not None:
            if fold not in self.folds:
                has = f"its folds are {self.folds}" if self.folds else "its training cases have none"
                raise InputError(self.where, f"has no fold {fold}: {has}", "choose one, or run `medkd data split`")
            if name == "validation":
                cases = [
                    case for case in (*self.training, *self.unlabeled) if case.fold == fold and case.label is not None
                ]
            elif name in TRAIN_SIDE and for_training:
                held_out = {case.patient for case in (*self.training, *self.unlabeled) if case.fold == fold}
                cases = [case for case in cases if case.patient not in held_out]
        items = self._items(cases, with_label=name != "unlabeled")
        if domain is None:
            return items
        if domain not in self.domains:
            has = f"its domains are {self.domains}" if self.domains else "its cases name none"
            raise InputError(self.where, f"has no domain {domain!r}: {has}", 'name one, or give the cases a "domain"')
        return [item for item in items if item.get("domain") == domain]

    def _items(self, cases: Sequence[Case], *, with_label: bool) -> list[dict[str, Any]]:
        have_domain = any(case.domain is not None for case in cases)
        shared = set.intersection(*(set(case.model_extra or {}) for case in cases)) if cases else set()
        items = []
        for case in cases:
            extra = case.model_extra or {}
            item: dict[str, Any] = {key: extra[key] for key in sorted(shared)}
            item["image"] = str(self.resolve(case.image)) + ("" if case.frame is None else f"{FRAME_MARK}{case.frame}")
            if with_label and case.label is not None:
                item["label"] = case.label if isinstance(case.label, int) else str(self.resolve(case.label))
            item["case"] = self.case_id(case)
            item["patient"] = case.patient or item["case"]
            if have_domain:
                item["domain"] = case.domain or ""
            if case.frame is not None:
                item["frame"] = case.frame
            items.append(item)
        return items

    @cached_property
    def sha256(self) -> str:
        """Hash of what a run reads: label names and cases in their order, not the dataset's name or its place."""
        content = {"labels": self.label_names} | {
            section: [_canonical(case) for case in self.cases(section)] for section in SECTIONS
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def difference(self, other: Datalist) -> str:
        """What separates this datalist from ``other``, in one line; empty when their hashes agree."""
        if self.sha256 == other.sha256:
            return ""
        parts = []
        if self.label_names != other.label_names:
            parts.append(f"labels {self.label_names} became {other.label_names}")
        for section in SECTIONS:
            parts += _section_difference(section, self.cases(section), other.cases(section))
        return "; ".join(parts)


def read_datalist(
    path: str | Path, dataset_dir: str | Path | None = None, *, check_files: bool = True, unpaired: bool = False
) -> Datalist:
    """Read and check a datalist.

    Args:
        path: the JSON file.
        dataset_dir: the folder that relative paths start from. Without it they start from the file's folder; with it,
            they still do if ``dataset_dir`` lacks the first image and the file's folder has it.
        check_files: refuse a datalist that names a file or folder that is not there.
        unpaired: refuse a patient who is in two domains: methods that claim to need no pairs must not see any.

    Raises:
        InputError: naming the file and the entry, for anything that cannot be used.
    """
    path = Path(path)
    content = _read_json(path)
    for key in _FORBIDDEN_KEYS:
        if key in content:
            raise InputError(path, f'holds "{key}", which a file may not choose', "remove it; give dataset_dir instead")
    base = _choose_base(path, dataset_dir, content)
    try:
        datalist = Datalist.model_validate(content | {"path": path, "dataset_dir": base})
    except ValidationError as error:
        where, problem = describe_validation_error(error)
        raise InputError(f"{path}: {where}", problem, "correct that entry") from None
    if unpaired:
        refuse_pairs(datalist)
    if check_files:
        refuse_missing_files(datalist)
    return datalist


def write_datalist(datalist: Datalist, path: str | Path) -> None:
    """Write a datalist so that :func:`read_datalist` finds its images.

    Paths are written relative to the file's folder when ``dataset_dir`` lies in it, so that the file alone is enough;
    otherwise relative to ``dataset_dir``, which must then be given when reading, and a message says so.

    Raises:
        InputError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    folder = Path(os.path.abspath(path.parent))
    if not folder.is_dir():
        raise InputError(path, "cannot be written: its folder does not exist", f"create {path.parent}")
    base = folder if datalist.dataset_dir.is_relative_to(folder) else datalist.dataset_dir
    content = datalist.model_dump(mode="json", exclude={str(section) for section in SECTIONS})
    for section in SECTIONS:
        if datalist.cases(section):
            content[section] = [_relative_entry(datalist, case, base) for case in datalist.cases(section)]
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
    if base != folder:
        logger.info("%s: its paths start from %s: give that as dataset_dir", path, base)


def describe_validation_error(error: ValidationError) -> tuple[str, str]:
    """The place (``training[3].image``) and the text of the first problem pydantic found."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return where or "content", first["msg"].removeprefix("Value error, ")


def _read_json(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise InputError(path, "is a folder, not a datalist", "give the JSON file (`medkd data make` writes one)")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(path, f"is larger than {_MAX_BYTES >> 20} MiB", "give a datalist in JSON")
        content = json.loads(
            path.read_bytes().decode("utf-8-sig"),
            object_pairs_hook=_refuse_repeated_keys,
            parse_constant=_refuse_constant,
        )
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the path, or write one with `medkd data make`") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from None
    except RecursionError:
        raise InputError(path, "is nested too deeply for a datalist", "give a datalist in JSON") from None
    except ValueError as error:  # undecodable text, malformed JSON, repeated keys
        raise InputError(path, f"is not a JSON datalist ({error})", "correct the file") from None
    if not isinstance(content, dict):
        raise InputError(path, "is not a JSON object", 'write {"labels": {…}, "training": […]}')
    return content


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(key for key in keys if keys.count(key) > 1)}" appears twice')
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _choose_base(path: Path, dataset_dir: str | Path | None, content: Mapping[str, Any]) -> Path:
    folder = Path(os.path.abspath(path.parent))
    if dataset_dir is None:
        return folder
    base = Path(os.path.abspath(dataset_dir))
    if not base.is_dir():
        raise InputError(base, "is not a folder", "set dataset_dir to the folder the datalist's paths start from")
    for section in SECTIONS:
        for entry in content.get(section) or []:
            image = entry.get("image") if isinstance(entry, dict) else entry
            if not isinstance(image, str) or "\0" in image:
                return base
            return folder if not (base / image).exists() and (folder / image).exists() else base
    return base


def _canonical(case: Case) -> dict[str, Any]:
    entry = case.model_dump(mode="json", exclude_none=True)
    for key in ("image", "label"):
        if isinstance(entry.get(key), str):
            entry[key] = posixpath.normpath(entry[key].replace(os.sep, "/"))
    return entry


def _relative_entry(datalist: Datalist, case: Case, base: Path) -> dict[str, Any]:
    entry = case.model_dump(mode="json", exclude_none=True)
    for key in ("image", "label"):
        if isinstance(entry.get(key), str):
            entry[key] = datalist.resolve(entry[key]).relative_to(base).as_posix()
    if not case.patient:
        del entry["patient"]
    return entry


def _section_difference(section: str, before: Sequence[Case], after: Sequence[Case]) -> list[str]:
    old = {(entry["image"], entry.get("frame")): entry for entry in map(_canonical, before)}
    new = {(entry["image"], entry.get("frame")): entry for entry in map(_canonical, after)}
    if list(old.values()) == list(new.values()):
        return []
    parts = [
        f"{len(keys)} {verb} ({_some(image for image, _ in keys)})"
        for verb, keys in (
            ("removed", [key for key in old if key not in new]),
            ("added", [key for key in new if key not in old]),
            ("changed", [key for key in old if key in new and old[key] != new[key]]),
        )
        if keys
    ]
    return [f"{section}: {', '.join(parts) or 'other order'}"]


def _some(names: Iterable[str], limit: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (", …" if len(listed) > limit else "")
