"""`data prepare` of datasets of several modalities: MM-WHS, CHAOS, and paired data made unpaired."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medkd.data import chaos, tf_slices
from medkd.data.cards import load_card
from medkd.data.datalists import read_datalist, write_datalist
from medkd.data.prepare import prepare_dataset
from medkd.data.tf_slices import read_tf_slice
from medkd.data.volumes import check_pair, read_label, read_volume
from medkd.errors import ConfigError, InputError


def volume(path: Path, shape: tuple[int, ...] = (3, 4, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)


# MM-WHS, the challenge's volumes


@pytest.fixture
def hearts(tmp_path: Path) -> Path:
    for kind in ("ct", "mr"):
        for number in range(1001, 1011):
            for what in ("image", "label"):
                volume(tmp_path / f"{kind}_train" / f"{kind}_train_{number}_{what}.nii.gz")
        volume(tmp_path / "deeper" / f"{kind}_test" / f"{kind}_test_2001_image.nii.gz")
    return tmp_path


def test_mm_whs_volumes_have_a_domain_and_a_split_by_patient_that_is_even_over_domains(hearts: Path) -> None:
    datalist = prepare_dataset(load_card("mm_whs"), hearts)
    assert {name: len(who) for name, who in datalist.patients.items()} == {
        "training": 14, "unlabeled": 2, "validation": 2, "test": 4,
    }  # fmt: skip
    assert Counter(case.domain for case in datalist.test) == {"CT": 2, "MR": 2}
    first = datalist.training[0]
    assert first.label == first.image.replace("_image", "_label")
    assert first.patient.startswith(f"{str(first.domain).lower()}_train_1")
    assert datalist.label_names[205] == "left ventricular myocardium"
    write_datalist(datalist, hearts / "list.json")
    assert read_datalist(hearts / "list.json", unpaired=True).domains == ["CT", "MR"]


def test_mm_whs_of_one_modality(hearts: Path) -> None:
    assert prepare_dataset(load_card("mm_whs"), hearts, modality="MR", labeled=2).domains == ["MR"]
    with pytest.raises(ConfigError, match=r"--modality: there is no image of PET; choose from CT, MR"):
        prepare_dataset(load_card("mm_whs"), hearts, modality="PET")


def test_mm_whs_needs_no_unpairing(hearts: Path) -> None:
    with pytest.raises(ConfigError, match="one modality already"):
        prepare_dataset(load_card("mm_whs"), hearts, unpaired="CT")


def test_mm_whs_without_a_label_or_without_anything_is_refused(hearts: Path, tmp_path_factory) -> None:
    (hearts / "ct_train" / "ct_train_1003_label.nii.gz").unlink()
    with pytest.raises(InputError, match=r"ct_train_1003_image\.nii\.gz: has no label"):
        prepare_dataset(load_card("mm_whs"), hearts)
    with pytest.raises(InputError, match="holds neither a file like ct_train_1001"):
        prepare_dataset(load_card("mm_whs"), tmp_path_factory.mktemp("empty"))


# MM-WHS, the slices of PnP-AdaNet


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def tf_record(image: np.ndarray, label: np.ndarray, **changes: bytes | None) -> bytes:
    """A TFRecord file as TensorFlow writes one, from the published description of both formats."""
    values = {
        "data_vol": field(1, field(1, image.astype("<f4").tobytes())),
        "dsize_dim0": field(3, field(1, varint(256))),
        "label_vol": field(1, field(1, label.astype("<f4").tobytes())),
    } | changes
    entries = [field(1, field(1, name.encode()) + field(2, v)) for name, v in values.items() if v is not None]
    example = field(1, b"".join(entries))
    length = struct.pack("<Q", len(example))
    return length + struct.pack("<I", tf_slices._masked_crc32c(length)) + example + b"\0\0\0\0"


def slice_content(number: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(number)
    label = np.zeros((256, 256, 3))
    label[10:40, 50:90, 1] = 1 + number % 5
    label[:, :, 0] = 4  # a neighbor, which must not be read
    return generator.normal(size=(256, 256, 3)), label


@pytest.fixture
def records(tmp_path: Path) -> Path:
    for name, count in (("mr_train", 3), ("mr_val", 1), ("ct_train", 2), ("ct_val", 1)):
        (tmp_path / f"{name}_tfs").mkdir()
        for number in range(count):
            path = tmp_path / f"{name}_tfs" / f"{name}_slice{9 + number}.tfrecords"
            path.write_bytes(tf_record(*slice_content(number)))
    return tmp_path


def test_the_checksum_is_crc_32c() -> None:
    crc = 0xE3069283  # of b"123456789", the published check value
    assert tf_slices._masked_crc32c(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_released_slices_become_stacks_in_the_order_of_their_numbers(records: Path) -> None:
    datalist = prepare_dataset(load_card("mm_whs"), records)
    assert [case.domain for case in datalist.training] == ["CT", "MR"]
    assert [case.patient for case in datalist.validation] == ["all of ct_val", "all of mr_val"]
    assert datalist.label_names[4] == "ascending aorta"
    case = datalist.training[1]
    image, label = read_volume(datalist.resolve(case.image)), read_label(datalist.resolve(str(case.label)))
    check_pair(image, label)
    for number in range(3):  # slice9 before slice10
        pixels, labels = slice_content(number)
        np.testing.assert_allclose(image.array[:, :, number].T, pixels[:, :, 1], rtol=1e-6)
        np.testing.assert_array_equal(label.array[:, :, number].T, labels[:, :, 1])
    assert prepare_dataset(load_card("mm_whs"), records, modality="MR").domains == ["MR"]


def test_stacks_are_made_once(records: Path) -> None:
    first = prepare_dataset(load_card("mm_whs"), records)
    for path in records.glob("*_tfs/*"):
        path.write_bytes(b"")
    assert prepare_dataset(load_card("mm_whs"), records).sha256 == first.sha256


def test_sifas_folders_are_known_too(tmp_path: Path) -> None:
    for folder in ("training_ct", "validation_mr"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "image_01.tfrecords").write_bytes(tf_record(*slice_content(1)))
    datalist = prepare_dataset(load_card("mm_whs"), tmp_path)
    assert ([c.domain for c in datalist.training], [c.domain for c in datalist.validation]) == (["CT"], ["MR"])


@pytest.mark.parametrize("choice", [{"labeled": 2}, {"split": "random"}, {"unpaired": "CT"}])
def test_released_slices_allow_no_other_split_because_they_name_no_patient(records: Path, choice: dict) -> None:
    with pytest.raises(ConfigError, match="do not say which patient"):
        prepare_dataset(load_card("mm_whs"), records, **choice)


GOOD = tf_record(*slice_content(0))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not a slice"),
        (GOOD[:-1], "its record has"),
        (GOOD + b"\0", "its record has"),
        (b"\1" + GOOD[1:], "checksum of its length"),
        (tf_record(*slice_content(0), label_vol=None), "has no label_vol"),
        (tf_record(*slice_content(0), data_vol=field(1, field(1, bytes(12)))), "a slice has 12 bytes"),
        (tf_record(np.full((256, 256, 3), np.nan), np.zeros((256, 256, 3))), "not finite"),
        (tf_record(np.zeros((256, 256, 3)), np.full((256, 256, 3), 0.5)), "no integers"),
        (GOOD[:13] + b"\xff" * 40 + GOOD[53:], "is not a slice"),
    ],
    ids=["empty", "short", "long", "length", "no-label", "small", "nan", "half-label", "garbage"],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "slice.tfrecords"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        read_tf_slice(path)
    assert str(path) in str(caught.value)


# CHAOS


def dicom(path: Path, pixels: np.ndarray, position: float, series: str) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.PatientID = series, "anonymous"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelSpacing, dataset.SliceThickness = [0.7, 0.8], 3.2
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-10.0, -20.0, position]
    dataset.PixelData = pixels.astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def organ(rank: int) -> np.ndarray:
    """A region that says which slice it is in; 6 rows, 5 columns."""
    region = np.zeros((6, 5), bool)
    region[rank, : rank + 1] = True
    return region


def series(folder: Path, ground: Path | None, names: list[str], pictures: list[str], values: list[int]) -> None:
    """Slices whose pixels are bright where the label is; positions fall while names rise, as in CHAOS's CT."""
    uid = generate_uid()
    for rank, name in enumerate(names):
        dicom(folder / name, 100 + 900 * organ(rank).astype(int), 50 - 2.0 * rank, uid)
        if ground is not None:
            ground.mkdir(parents=True, exist_ok=True)
            Image.fromarray((organ(rank) * values[rank]).astype(np.uint8)).save(ground / pictures[rank])


def ct(root: Path, patient: int, *, labels: bool = True) -> None:
    base = root / "CT" / str(patient)
    names = [f"i{k:04},0000b.dcm" for k in range(4)]
    pictures = [f"liver_GT_{k:03}.png" for k in range(4)]
    series(base / "DICOM_anon", base / "Ground" if labels else None, names, pictures, [255] * 4)


def mr(root: Path, patient: int, *, labels: bool = True) -> None:
    base = root / "MR" / str(patient)
    greys = [63, 126, 189, 252]
    ground = base / "T2SPIR" / "Ground" if labels else None
    names = [f"IMG-0002-{k:05}.dcm" for k in range(1, 5)]
    series(base / "T2SPIR" / "DICOM_anon", ground, names, [n.replace(".dcm", ".png") for n in names], greys)
    ground = base / "T1DUAL" / "Ground" if labels else None
    inside = [f"IMG-0004-{k:05}.dcm" for k in range(2, 10, 2)]
    outside = [f"IMG-0004-{k:05}.dcm" for k in range(1, 9, 2)]
    pictures = [name.replace(".dcm", ".png") for name in inside]
    series(base / "T1DUAL" / "DICOM_anon" / "InPhase", ground, inside, pictures, greys)
    series(base / "T1DUAL" / "DICOM_anon" / "OutPhase", None, outside, [], [])


@pytest.fixture
def abdomens(tmp_path: Path) -> Path:
    for patient in (1, 2, 5, 10):
        ct(tmp_path / "Train_Sets", patient)
        mr(tmp_path / "Train_Sets", patient)
    ct(tmp_path / "Test_Sets", 3, labels=False)
    return tmp_path


def test_chaos_of_mr_has_four_organs_where_the_slices_show_them(abdomens: Path) -> None:
    datalist = prepare_dataset(load_card("chaos"), abdomens, modality="MR_T2SPIR,MR_T1DUAL_in,MR_T1DUAL_out")
    assert datalist.label_names == chaos.ORGANS
    assert {len([c for c in datalist.training if c.patient == who]) for who in datalist.patients["training"]} == {3}
    for case in datalist.training:
        image, label = read_volume(datalist.resolve(case.image)), read_label(datalist.resolve(str(case.label)))
        check_pair(image, label)
        np.testing.assert_array_equal(label.array > 0, image.array > 500)
        assert [int(label.array[:, :, z].max()) for z in range(4)] == [4, 3, 2, 1]  # positions fall while names rise


def test_chaos_with_ct_knows_the_liver_alone_and_keeps_patients_of_one_number_apart(abdomens: Path) -> None:
    datalist = prepare_dataset(load_card("chaos"), abdomens, modality="CT,MR_T2SPIR")
    assert datalist.label_names == chaos.LIVER
    patients = set().union(*datalist.patients.values())
    assert patients == {f"{kind}_{n}" for kind in ("CT", "MR") for n in (1, 2, 5, 10)} | {"CT_3"}
    assert [case.patient for case in datalist.unlabeled] == ["CT_3"]
    for case in (*datalist.training, *datalist.validation, *datalist.test):
        label = read_label(datalist.resolve(str(case.label)), labels=datalist.label_names).array
        assert label.sum() == (1 + 2 + 3 + 4 if case.domain == "CT" else 1)
    write_datalist(datalist, abdomens / "list.json")
    assert read_datalist(abdomens / "list.json", unpaired=True).domains == ["CT", "MR_T2SPIR"]


def test_chaos_labels_are_converted_once(abdomens: Path) -> None:
    first = prepare_dataset(load_card("chaos"), abdomens)
    for picture in abdomens.rglob("*.png"):
        picture.write_bytes(b"")
    assert prepare_dataset(load_card("chaos"), abdomens).sha256 == first.sha256


def test_the_two_sequences_of_a_chaos_patient_can_be_unpaired(abdomens: Path) -> None:
    datalist = prepare_dataset(load_card("chaos"), abdomens, modality="MR_T2SPIR,MR_T1DUAL_in", unpaired="MR_T2SPIR")
    assert {case.domain for case in (*datalist.validation, *datalist.test)} == {"MR_T2SPIR"}
    assert sorted(Counter(case.patient for case in datalist.training).values()) == [1, 1]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda g: (g / "liver_GT_002.png").unlink(), "holds 3 PNGs for 4 DICOM slices"),
        (lambda g: (g / "liver_GT_002.png").write_bytes(b"PNG"), "cannot be read as PNG"),
        (lambda g: Image.fromarray(np.zeros((5, 6), np.uint8)).save(g / "liver_GT_002.png"), r"shape \(5, 6\)"),
    ],
    ids=["missing", "broken", "turned"],
)
def test_chaos_pictures_that_do_not_fit_are_refused(tmp_path: Path, damage, problem: str) -> None:
    ct(tmp_path, 1)
    damage(tmp_path / "CT" / "1" / "Ground")
    with pytest.raises(InputError, match=problem):
        prepare_dataset(load_card("chaos"), tmp_path)


def test_a_grey_value_of_no_organ_is_refused(tmp_path: Path) -> None:
    mr(tmp_path, 1)
    picture = tmp_path / "MR" / "1" / "T2SPIR" / "Ground" / "IMG-0002-00003.png"
    Image.fromarray((organ(2) * 100).astype(np.uint8)).save(picture)
    with pytest.raises(InputError, match=r"IMG-0002-00003\.png: has the grey value 100"):
        prepare_dataset(load_card("chaos"), tmp_path, modality="MR_T2SPIR")


def test_a_folder_without_chaos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no folder like CT/1/DICOM_anon"):
        prepare_dataset(load_card("chaos"), tmp_path)


# Paired data made unpaired


@pytest.fixture
def sarcomas(tmp_path: Path) -> Path:
    for number in range(1, 25):
        for modality in ("CT", "MR_T1"):
            for kind in ("image", "mask"):
                volume(tmp_path / f"STS_{number:03}" / f"{modality}_{kind}.nii.gz")
    return tmp_path


def test_unpaired_patients_keep_one_modality_and_are_tested_on_the_named_one(sarcomas: Path) -> None:
    datalist = prepare_dataset(load_card("ibsi_sts"), sarcomas, unpaired="CT")
    paired = prepare_dataset(load_card("ibsi_sts"), sarcomas)
    assert datalist.patients == paired.patients
    assert Counter(case.domain for case in datalist.training) in ({"CT": 8, "MR_T1": 9}, {"CT": 9, "MR_T1": 8})
    assert max(Counter(case.patient for case in datalist.training).values()) == 1
    assert {case.domain for case in (*datalist.validation, *datalist.test)} == {"CT"}
    write_datalist(datalist, sarcomas / "list.json")
    read_datalist(sarcomas / "list.json", unpaired=True)


def test_patients_with_and_without_labels_are_each_divided_evenly(sarcomas: Path) -> None:
    datalist = prepare_dataset(load_card("ibsi_sts"), sarcomas, unpaired="MR_T1", labeled=6)
    assert Counter(case.domain for case in datalist.training) == {"CT": 3, "MR_T1": 3}
    assert set(Counter(case.domain for case in datalist.unlabeled).values()) == {5, 6}
    assert {case.domain for case in datalist.test} == {"MR_T1"}


def test_unpairing_is_a_function_of_the_seed(sarcomas: Path) -> None:
    hashes = [prepare_dataset(load_card("ibsi_sts"), sarcomas, unpaired="CT", seed=s).sha256 for s in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_unpairing_for_an_absent_modality_is_refused(sarcomas: Path) -> None:
    with pytest.raises(ConfigError, match=r"--unpaired: there is no image of PET; choose from CT, MR_T1"):
        prepare_dataset(load_card("ibsi_sts"), sarcomas, unpaired="PET")
