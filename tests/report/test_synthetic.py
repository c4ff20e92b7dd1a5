"""The report's pictures of generated images."""

from __future__ import annotations

import numpy as np
import pytest

from medkd.data.picture_grid import picture_grid
from medkd.errors import InputError
from medkd.report import write_report


def test_the_last_sheet_and_the_ranked_pool_are_shown(tmp_path):
    assert 'id="synthetic"' not in write_report(tmp_path).read_text()
    sheets = [picture_grid([np.full((1, 8, 8, 3), shade, np.uint8)]) for shade in (0, 100, 200)]
    for name, content in zip(
        ("samples/epoch-0001.png", "samples/epoch-0002.png", "pool/contact_sheet.png"), sheets, strict=True
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Samples, epoch 0002" in page
    assert "framed in green: kept" in page


def test_a_sheet_that_is_no_picture_is_refused(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "epoch-0001.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="is not a PNG"):
        write_report(tmp_path)
