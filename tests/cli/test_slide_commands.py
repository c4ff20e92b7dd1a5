from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import TRAIN_CONFIG, make_bundle
from PIL import Image

from medkd.__main__ import main

sys.path.insert(0, str(Path(__file__).parents[1] / "workflows"))
from small_slides import draw_quickly, write_slide

COMMANDS = [["slide"], *(["slide", name] for name in ("info", "tile", "predict", "evaluate", "view"))]
ENDINGS = (".csv", ".geojson", ".json", "_heatmap.ome.tiff", "_heatmap.png", "_overlay.png")


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    monkeypatch.setattr("medkd.wsi.export.write_picture", draw_quickly)


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [write_slide(folder / f"s{number}.tiff", seed=number) for number in range(2)]


@pytest.fixture(scope="module")
def slide_bundle(tmp_path_factory) -> Path:
    """A segmentation of tiles, with random weights."""
    network = {**TRAIN_CONFIG["network_def"], "spatial_dims": 2, "in_channels": 3, "out_channels": 2}
    config = {**TRAIN_CONFIG, "labels": {"0": "background", "1": "tumor"}, "network_def": network}
    bundle = make_bundle(tmp_path_factory.mktemp("bundle") / "tissue_regions", train_config=config)
    file = bundle / "configs" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["slide"] = {
        "task": "segmentation", "size": 64, "mpp": 1.0, "overlap": 16, "mean": [0.6, 0.5, 0.7], "std": [0.2, 0.2, 0.2],
        "classes": ["background", "tumor"],
    }  # fmt: skip
    file.write_text(json.dumps(metadata))
    return bundle


def run(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def only_error(capsys, *words) -> str:
    """The one line of a command that refuses to start."""
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    return err


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_slide_command_has_a_help_page_that_fits_a_terminal(words, capsys):
    code, page, _ = run(capsys, *words, "--help")
    assert code == 0
    assert page.startswith(f"Usage: medkd {' '.join(words)}")
    assert max(len(line) for line in page.splitlines()) <= 80
    assert "<path>" not in page


def test_slide_commands_start_without_the_heavy_libraries():
    code = (
        "import sys, medkd.__main__ as m; m.main(['slide', 'predict', '--help']);"
        "heavy = {'torch', 'monai', 'numpy', 'openslide', 'distributed', 'dask', 'cv2', 'rich.progress'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_info_needs_no_torch(slides):
    code = (
        f"import sys, medkd.__main__ as m; m.main(['slide', 'info', {str(slides[0])!r}]);"
        "sys.exit(', '.join({'torch', 'monai', 'distributed'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "512 × 512 px" in done.stdout


def test_info_says_size_levels_and_resolution(slides, capsys, tmp_path):
    code, out, err = run(capsys, "slide", "info", slides[0])
    assert (code, err) == (0, "")
    assert "0.5 (TIFF resolution)" in out
    assert "256" in out
    code, out, _ = run(capsys, "slide", "info", slides[0], "--json", "--slide-mpp", 0.25)
    facts = json.loads(out)
    assert (facts["width"], facts["mpp"], facts["mpp_source"], len(facts["levels"])) == (512, 0.25, "user", 2)
    code, out, _ = run(capsys, "slide", "info", slides[0], "--thumbnail", tmp_path / "small.png")
    assert code == 0
    assert np.asarray(Image.open(tmp_path / "small.png")).std() > 10


def test_info_shows_a_slide_that_does_not_say_its_resolution(tmp_path, capsys):
    code, out, _ = run(capsys, "slide", "info", write_slide(tmp_path / "silent.tiff", mpp=None))
    assert code == 0
    assert "unknown: the file says nowhere how many µm a pixel is wide" in out


def test_info_of_what_is_no_slide_is_one_line(tmp_path, capsys):
    (tmp_path / "text.svs").write_text("no slide")
    assert "text.svs: is a text file" in only_error(capsys, "slide", "info", tmp_path / "text.svs")
    assert "does not exist" in only_error(capsys, "slide", "info", tmp_path / "gone.svs")
    slide = write_slide(tmp_path / "s.tiff")
    for thumbnail in ("small.jpg", "no/folder.png"):
        assert "--thumbnail" in only_error(capsys, "slide", "info", slide, "--thumbnail", tmp_path / thumbnail)


def test_tile_writes_a_grid_per_slide_and_a_summary(slides, capsys, tmp_path):
    out = tmp_path / "tiles"
    words = ["slide", "tile", *slides, "--out", out, "--size", 64, "--mpp", 0.5, "--workers", 0]
    code, shown, log = run(capsys, *words)
    assert code == 0
    assert "2 of 2 slides" in shown
    assert "1/2 s0: done" in log
    assert {f"{slide.stem}{ending}" for slide in slides for ending in (".h5", "_overview.png")} <= {
        path.name for path in out.iterdir()
    }
    assert "is not empty; pass --resume" in only_error(capsys, *words)
    code, shown, _ = run(capsys, *words, "--resume", "--json")
    assert [slide["reused"] for slide in json.loads(shown)["slides"]] == [True, True]


def test_predict_runs_a_bundle_over_slides_and_tells_of_the_bad_one(slide_bundle, slides, capsys, tmp_path):
    out, bad = tmp_path / "out", tmp_path / "bad.tiff"
    bad.write_bytes(slides[0].read_bytes()[:3000])
    words = ["slide", "predict", slide_bundle, slides[0], bad, "--out", out, "--workers", 0, "--device", "cpu"]
    code, shown, log = run(capsys, *words)
    assert code == 1
    assert [line for line in log.splitlines() if line.startswith("bad: unreadable: ")]
    assert "2 of 2 slides" in shown
    assert {path.name for path in out.iterdir()} == {
        *(f"s0{ending}" for ending in ENDINGS), ".state", "summary.csv", "failures.csv",
    }  # fmt: skip
    with (out / "summary.csv").open(newline="") as file:
        assert [(row["slide"], row["status"]) for row in csv.DictReader(file)] == [
            ("s0", "done"),
            ("bad", "unreadable"),
        ]
    summary = json.loads((out / "s0.json").read_text())
    assert (summary["model"], summary["mpp"], summary["classes"]) == ("tissue_regions", 1.0, ["background", "tumor"])
    assert "is not empty" in only_error(capsys, *words)
    code, shown, _ = run(capsys, *words, "--resume")
    assert (code, "1 of them done before" in shown) == (1, True)
    code, shown, _ = run(capsys, *words, "--resume", "--mpp", 2, "--json")
    assert not any(slide["reused"] for slide in json.loads(shown)["slides"])
    assert json.loads((out / "s0.json").read_text())["mpp"] == 2.0


def test_predict_refuses_bad_usage_in_one_line_and_writes_nothing(
    slide_bundle, shared_bundle, slides, capsys, tmp_path
):
    def refused(*words):
        return only_error(capsys, "slide", "predict", *words, "--out", tmp_path / "out")

    assert "SLIDE: is missing" in refused(slide_bundle)
    assert "has no entry 'slide'" in refused(shared_bundle, slides[0])
    assert "no such bundle: does not exist" in refused("no such bundle", slides[0])
    assert "does not exist" in refused(slide_bundle, tmp_path / "gone.svs")
    assert "'3/2' is no share" in refused(slide_bundle, slides[0], "--shard", "3/2")
    assert "--min-tissue" in refused(slide_bundle, slides[0], "--min-tissue", 2)
    assert "is no address of a scheduler" in refused(slide_bundle, *slides, "--cluster", "localhost")
    assert "outside 0.05 to 20" in refused(slide_bundle, slides[0], "--slide-mpp", 100)
    assert "exclude each other" in refused(slide_bundle, slides[0], "--resume", "--overwrite")
    assert not (tmp_path / "out").exists()


def test_evaluate_scores_predictions_against_annotations(slide_bundle, slides, capsys, tmp_path):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    ring = [[150, 150], [350, 150], [350, 350], [150, 350], [150, 150]]
    feature = {
        "type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": "tumor"}},
    }  # fmt: skip
    (annotations / "s0.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    run(capsys, "slide", "predict", slide_bundle, *slides, "--out", tmp_path / "pred", "--workers", 0)
    words = ["slide", "evaluate", tmp_path / "pred", "--annotations", annotations, "--out", tmp_path / "scores"]
    code, shown, _ = run(capsys, *words, "--normal", "s1")
    assert code == 0
    assert "tile" in shown
    assert (tmp_path / "scores" / "summary.csv").is_file()
    assert "is not empty" in only_error(capsys, *words, "--normal", "s1")


def test_view_shows_its_address_until_it_is_interrupted(slides):
    words = [sys.executable, "-m", "medkd", "slide", "view", str(slides[0]), "--port", "0"]
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores SIGINT
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, preexec_fn=heeds, **pipes) as viewer:
        address = viewer.stdout.readline()
        viewer.send_signal(signal.SIGINT)
        try:
            _, errors = viewer.communicate(timeout=60)
        finally:
            viewer.kill()
    assert address.startswith("http://127.0.0.1:"), errors
    assert viewer.returncode == 0, errors


def test_a_terminal_shows_a_bar_for_each_slide_at_work(monkeypatch):
    import io
    import logging

    from medkd.cli import output
    from medkd.cli.slide_progress import watching
    from medkd.wsi.slide_state import SlideRecord

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    output.start_logging()
    with watching() as view:
        view.started("s\x1b0")
        view.progressed("s\x1b0", 7, 30)
        logging.getLogger("medkd").info("a line of the log")
        view.progress.refresh()
        view.died("s\x1b0", 1)
        view.started("s1")
        view.ended(SlideRecord("s1", "done"))
        assert view.bars == {}
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "7/30 tiles" in shown
    assert "s\\x1b0" in shown
    assert "a line of the log" in shown
    with watching(quiet=True) as view:
        assert view is None


def test_no_bars_are_shown_where_nobody_looks(capsys):
    from medkd.cli.slide_progress import watching

    with watching() as view:
        assert view is None


@pytest.mark.slow
def test_the_command_is_stopped_by_a_signal_and_goes_on(slide_bundle, tmp_path):
    """The whole of it in processes of its own, on two workers."""
    slides = [write_slide(tmp_path / f"s{number}.tiff", seed=number, side=2048) for number in range(6)]
    out = tmp_path / "out"
    words = [sys.executable, "-m", "medkd", "slide", "predict", slide_bundle, *slides, "--out", out, "--workers", 2]
    words = [str(word) for word in words]
    records = out / ".state" / "slides"
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as service:
        while not list(records.glob("*.json")):
            time.sleep(0.05)
            assert service.poll() is None
        os.killpg(service.pid, signal.SIGTERM)
        _, log = service.communicate()
    assert service.returncode == 75, log
    assert log.splitlines()[-1].startswith(f"error: {out}: stopped after ")
    assert not [path for path in records.iterdir() if "work" in path.name]
    done = subprocess.run([*words, "--resume", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["slides"]
    assert [slide["status"] for slide in found] == ["done"] * 6
    assert any(slide["reused"] for slide in found)
