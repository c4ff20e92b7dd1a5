"""Pictures of a translator in the report."""

from __future__ import annotations

import io
import json

import matplotlib.image
import numpy as np
import pytest

from medkd.errors import InputError
from medkd.report.html import write_report
from medkd.report.translations import TRANSLATIONS_FILE, draw_translations, read_translations


def write(path, **change):
    images = np.stack([np.full((20, 10), value, np.float16) for value in (-1, 0, 1)])
    content = {
        "domains": np.array(["M<R", "CT"]),
        "cases_to_target": np.array(["a", "b"]),
        "cases_to_source": np.array([], dtype=np.str_),
        "to_target_0": images,
        "to_target_1": images[:, :12],
        **change,
    }
    np.savez_compressed(path, **{key: value for key, value in content.items() if value is not None})
    return path


def test_columns_are_the_image_its_translation_and_the_way_back(tmp_path):
    (translated,) = read_translations(write(tmp_path / TRANSLATIONS_FILE))
    assert (translated.source, translated.target) == ("M<R", "CT")
    assert [sample.case for sample in translated.samples] == ["a", "b"]
    picture = draw_translations(translated)
    assert picture == draw_translations(translated)
    pixels = matplotlib.image.imread(io.BytesIO(picture))[..., 0]
    row = pixels[len(pixels) // 2]
    thirds = np.array_split(row, 3)
    assert [round(float(np.median(third)), 1) for third in thirds] == [0.0, 0.5, 1.0]


def test_report_shows_the_pictures_and_no_empty_sections_about_dice(tmp_path):
    write(tmp_path / TRANSLATIONS_FILE)
    (tmp_path / "config.json").write_text(json.dumps({"task": "translation"}))
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "M&lt;R to CT" in page
    assert "M<R" not in page
    assert "Not evaluated yet" not in page
    assert "worst_cases" not in page


def test_without_the_file_the_report_is_as_before(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    page = write_report(tmp_path).read_text()
    assert 'id="translations"' not in page
    assert "Not evaluated yet" in page


@pytest.mark.parametrize("change", [{"domains": None}, {"to_target_1": np.zeros((2, 4, 4))}, {"to_target_0": None}])
def test_a_file_of_something_else_is_refused(tmp_path, change):
    with pytest.raises(InputError, match=r"translations\.npz: cannot be read"):
        read_translations(write(tmp_path / TRANSLATIONS_FILE, **change))


def test_pickled_content_is_never_loaded(tmp_path):
    with pytest.raises(InputError):
        read_translations(write(tmp_path / TRANSLATIONS_FILE, domains=np.array([{}, {}], dtype=object)))
