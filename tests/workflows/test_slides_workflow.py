from __future__ import annotations

import csv
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_slides import batch, draw_quickly, predict_unless_killer, tile_batch, vanish, write_slide

from medkd.errors import ConfigError, InputError
from medkd.workflows import slide_batch, slide_units
from medkd.workflows.slide_batch import SUMMARY_FILE
from medkd.workflows.slide_list import ListedSlide, list_slides, parse_shard, take_shard
from medkd.workflows.slide_units import Job
from medkd.workflows.slides import predict_slides, tile_slides

ENDINGS = (".csv", ".geojson", ".json", "_heatmap.ome.tiff", "_heatmap.png", "_overlay.png")


def outputs(out):
    """Everything a batch wrote, without what tells of time."""
    found = {}
    for path in sorted(Path(out).iterdir()):
        if path.name in (".state", SUMMARY_FILE, "failures.csv"):
            continue
        if path.is_dir():
            found.update({f"{path.name}/{image.name}": image.read_bytes() for image in sorted(path.iterdir())})
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.loads(content)
            content.pop("seconds"), content.pop("tiles_per_second")
        found[path.name] = content
    return found


def table(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def statuses(out):
    return {row["slide"]: row["status"] for row in table(Path(out) / SUMMARY_FILE)}


def litter(out):
    """What a finished batch should not have left."""
    state = Path(out) / ".state"
    return [
        path
        for path in [*Path(out).iterdir(), *(state / "slides").iterdir()]
        if "partial" in path.name or "work" in path.name
    ]


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    monkeypatch.setattr("medkd.wsi.export.write_picture", draw_quickly)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return [write_slide(folder / f"s{number}.tiff", seed=number) for number in range(3)]


# The list of slides


def test_slides_come_from_arguments_and_from_a_table_whose_paths_are_relative_to_it(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.svs", "deep/b.svs", "deep/c.svs"):
        (tmp_path / name).write_bytes(b"")
    table = tmp_path / "deep" / "slides.csv"
    table.write_text("\ufeffpatient,slide,mpp\np1,b.svs,0.25\n,../deep/c.svs,\n", encoding="utf-8")
    assert list_slides([tmp_path / "a.svs"], table, slide_mpp=0.5) == [
        ListedSlide(tmp_path / "a.svs", "a", 0.5),
        ListedSlide(tmp_path / "deep" / "b.svs", "b", 0.25, "p1"),
        ListedSlide(tmp_path / "deep" / "c.svs", "c", 0.5),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no column 'slide' .it has none"),
        ("name,mpp\na.svs,1\n", "has no column 'slide' .it has name, mpp"),
        ("slide,mpp\n", "lists no slide"),
        ("slide,mpp\n ,1\n", "row 2: names no slide"),
        ("slide,mpp\na.svs,half\n", "row 2: mpp 'half' is not a number"),
        ("slide,mpp\na.svs,0.5\nb.svs,-1\n", "row 3: -1 µm per pixel is outside"),
        ("slide,mpp\na.svs,nan\n", "row 2: nan µm per pixel"),
        ('slide,mpp\n"a.svs,1\n', "is not a CSV table"),
        (b"slide\n\xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, content, message):
    file = tmp_path / "slides.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        list_slides([], file)


def test_two_slides_of_one_name_are_refused_with_both_paths(tmp_path):
    paths = [tmp_path / "a" / "slide.svs", tmp_path / "b" / "slide.tiff"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        list_slides(paths)
    assert all(str(path) in str(caught.value) for path in paths)
    assert [slide.name for slide in list_slides(paths, deidentify=True)] == ["slide-0001", "slide-0002"]


@pytest.mark.parametrize("name", ["summary.svs", "failures.tiff", "datalist.svs"])
def test_a_slide_named_like_a_table_of_the_batch_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match="rename the slide"):
        list_slides([tmp_path / name])


def test_nothing_to_work_on_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="SLIDE: is missing"):
        list_slides([])
    with pytest.raises(InputError, match="does not exist, nor do the other 1"):
        list_slides([tmp_path / "a.svs", tmp_path / "b.svs"])
    with pytest.raises(InputError, match=r"^SLIDE: does not exist"):
        list_slides([tmp_path / "doe_jane.svs"], deidentify=True)
    with pytest.raises(InputError, match="99 µm per pixel is outside"):
        list_slides([tmp_path / "a.svs"], slide_mpp=99)


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_shards_are_disjoint_and_complete_and_do_not_depend_on_order(count):
    slides = [ListedSlide(Path(f"/{number}.svs"), str(number)) for number in range(11)]
    shards = [take_shard(slides, (number, count)) for number in range(1, count + 1)]
    assert sorted(slide.name for shard in shards for slide in shard) == sorted(slide.name for slide in slides)
    assert shards == [take_shard(slides[::-1], (number, count)) for number in range(1, count + 1)]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_shard_counts_from_one():
    assert parse_shard("2/8") == (2, 8)
    for text in ("0/8", "9/8", "8", "a/b", "1/0", "-1/2", ""):
        with pytest.raises(ConfigError, match="no share of the list"):
            parse_shard(text)


# One process


def test_a_batch_writes_outputs_and_tells_of_them(three, tmp_path):
    done = batch(three, tmp_path / "out")
    assert done.exit_code == 0
    assert sorted(outputs(tmp_path / "out")) == sorted(f"s{n}{ending}" for n in range(3) for ending in ENDINGS)
    assert statuses(tmp_path / "out") == {"s0": "done", "s1": "done", "s2": "done"}
    assert {path.name for path in done.written} == set(outputs(tmp_path / "out"))
    assert not (tmp_path / "out" / "failures.csv").exists()
    assert not litter(tmp_path / "out")


def test_resume_keeps_what_is_complete_and_makes_again_what_is_not(three, tmp_path):
    out = tmp_path / "out"
    batch(three, out)
    clean = outputs(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "s1.csv").unlink()
    (out / "s2_heatmap.png").write_bytes(b"")
    done = batch(three, out, resume=True)
    assert [record.reused for record in done.records] == [True, False, False]
    assert outputs(out) == clean
    kept = {name for name, at in times.items() if (out / name).stat().st_mtime_ns == at and name.startswith("s")}
    assert kept == {f"s0{ending}" for ending in ENDINGS}


def test_another_model_or_another_slide_is_never_served_old_outputs(three, tmp_path):
    out = tmp_path / "out"
    slides = [tmp_path / "x.tiff", tmp_path / "y.tiff"]
    for source, slide in zip(three, slides, strict=False):
        slide.write_bytes(source.read_bytes())
    batch(slides, out)
    before = outputs(out)
    assert not any(record.reused for record in batch(slides, out, resume=True, seed=1).records)
    assert outputs(out)["x.csv"] != before["x.csv"]
    slides[0].write_bytes(three[2].read_bytes())
    done = batch(slides, out, resume=True, seed=1)
    assert [record.reused for record in done.records] == [False, True]


def test_a_batch_of_another_model_that_is_stopped_leaves_no_mixture(three, tmp_path):
    out = tmp_path / "out"
    batch(three, out)

    class StopsAtOnce:
        def started(self, name):
            os.kill(os.getpid(), signal.SIGTERM)

        def progressed(self, name, done, total): ...
        def died(self, name, deaths): ...
        def ended(self, record): ...

    done = batch(three, out, resume=True, seed=1, view=StopsAtOnce())
    assert done.exit_code == 75
    assert statuses(out) == {}
    assert outputs(out) == {}


def test_an_output_folder_that_a_worker_does_not_see_is_a_failure_not_a_new_folder(three, tmp_path):
    job = Job(ListedSlide(three[0], "s0"), tmp_path / "elsewhere", "setup")
    record = slide_units.tile_unit(slide_units.TileUnit(job, {"size": 64, "mpp": 0.5}), lambda done, total: None)
    assert record.status == "failed"
    assert "is not seen by the worker" in record.reason
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_a_file_name_that_is_no_text_does_not_end_the_batch(three, tmp_path):
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/odd\xff.tiff"))
    odd.write_bytes(b"not a slide")
    done = batch([odd, three[0]], tmp_path / "out")
    assert [record.status for record in done.records] == ["unreadable", "done"]
    assert statuses(tmp_path / "out") == {"odd\\udcff": "unreadable", "s0": "done"}


def test_outputs_of_another_model_are_gone_even_if_the_slide_now_fails(three, tmp_path):
    out, slide = tmp_path / "out", tmp_path / "x.tiff"
    slide.write_bytes(three[0].read_bytes())
    paths = [slide, three[1]]
    batch(paths, out)
    slide.write_bytes(b"")
    same = batch(paths, out, resume=True)
    assert (out / "x.csv").exists(), "of the same model: kept, though it cannot be checked"
    assert same.records[0].status == "unreadable"
    other = batch(paths, out, resume=True, seed=1)
    assert other.exit_code == 1
    assert not list(out.glob("x*"))


def test_every_slide_ends_in_one_of_five_ways(three, tmp_path, caplog):
    slides = [
        three[0],
        write_slide(tmp_path / "blank.tiff", blank=True),
        write_slide(tmp_path / "silent.tiff", mpp=None),
        tmp_path / "empty.tiff",
        tmp_path / "missing.tiff",
        tmp_path / "text.svs",
    ]
    slides[3].write_bytes(b"")
    slides[5].write_text("no slide at all")
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO, "medkd"):
        done = batch(slides, out)
    assert done.exit_code == 1
    assert statuses(out) == {
        "s0": "done", "blank": "empty-tissue", "silent": "no-mpp", "empty": "unreadable", "missing": "unreadable",
        "text": "unreadable",
    }  # fmt: skip
    rows = table(out / "failures.csv")
    assert [row["case"] for row in rows] == ["silent", "empty", "missing", "text"]
    assert len({row["error"].split(": ", 2)[2] for row in rows}) == 4, "distinct messages"
    assert [record.levelname for record in caplog.records].count("ERROR") == 4, "one line each"
    assert json.loads((out / "blank.json").read_text())["counts"]["tiles"] == 0
    assert (out / "blank.csv").read_text().count("\n") == 1


def test_a_slide_of_which_no_tile_can_be_decoded_is_unreadable_not_without_tissue(three, tmp_path):
    content = bytearray(three[0].read_bytes())
    start = content.find(b"\xff\xd8\xff")
    for at in range(start, len(content) - 600):
        if content[at : at + 3] == b"\xff\xd8\xff":
            content[at : at + 400] = bytes(400)
    (tmp_path / "zeroed.tiff").write_bytes(content)
    done = batch([tmp_path / "zeroed.tiff"], tmp_path / "out")
    assert [record.status for record in done.records] == ["unreadable"]
    assert not list((tmp_path / "out").glob("zeroed*"))


def test_a_slide_that_vanishes_is_its_own_failure(three, tmp_path):
    doomed = tmp_path / "vanishing.tiff"
    doomed.write_bytes(three[0].read_bytes())
    done = batch([doomed, *three[1:]], tmp_path / "out", function=vanish)
    assert [record.status for record in done.records] == ["unreadable", "done", "done"]
    assert "does not exist" in done.failures[0].error


def test_a_fault_on_one_slide_stops_no_other(three, tmp_path, monkeypatch):
    real = slide_units._predict

    def breaks(unit, slide, folder, report):
        if slide.name == "s0":
            raise RuntimeError("unforeseen")
        return real(unit, slide, folder, report)

    monkeypatch.setattr(slide_units, "_predict", breaks)
    done = batch(three, tmp_path / "out")
    assert [record.status for record in done.records] == ["failed", "done", "done"]
    assert done.failures[0].error == "failed: RuntimeError: unforeseen"


def full_at(monkeypatch, names, *, folder_too):
    """The disk is full when one of the slides is moved to the output folder."""
    real = slide_units.publish

    def publish(staged, out, name):
        if name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / f"{name}.csv"))
        return real(staged, out, name)

    monkeypatch.setattr(slide_units, "publish", publish)
    if folder_too:
        monkeypatch.setattr(slide_batch, "_why_not_writable", lambda out: "No space left on device")


def test_a_disk_too_full_for_one_slide_stops_no_other(three, tmp_path, monkeypatch):
    full_at(monkeypatch, ["s1"], folder_too=False)
    done = batch(three, tmp_path / "out")
    assert [record.status for record in done.records] == ["done", "failed", "done"]
    assert "No space left on device" in done.failures[0].error
    assert not list((tmp_path / "out").glob("s1*"))
    assert not litter(tmp_path / "out")


def test_a_full_disk_stops_the_batch_which_then_resumes(three, tmp_path, monkeypatch):
    clean = tmp_path / "clean"
    batch(three, clean)
    full_at(monkeypatch, ["s1"], folder_too=True)
    done = batch(three, tmp_path / "out")
    assert [record.name for record in done.records] == ["s0", "s1"]
    assert done.blocked == "No space left on device"
    assert done.exit_code == 1
    monkeypatch.undo()
    done = batch(three, tmp_path / "out", resume=True)
    assert [record.reused for record in done.records] == [True, False, False]
    assert outputs(tmp_path / "out") == outputs(clean)


def test_a_slide_named_after_a_person_leaves_no_trace_when_deidentified(three, tmp_path, caplog, capsys):
    folder = tmp_path / "DOE^JANE 19700101"
    folder.mkdir()
    slides = [folder / "doe_jane_1.tiff", folder / "doe_jane_2.tiff"]
    slides[0].write_bytes(three[0].read_bytes())
    slides[1].write_bytes(b"not a slide")
    out = tmp_path / "out"
    with caplog.at_level(logging.DEBUG, "medkd"):
        batch(slides, out, deidentify=True)
    assert statuses(out) == {"slide-0001": "done", "slide-0002": "unreadable"}
    written = [path for path in out.rglob("*") if path.is_file()]
    everything = [path.read_bytes() for path in written] + [str(path.relative_to(out)).encode() for path in written]
    everything += [caplog.text.encode(), "".join(capsys.readouterr()).encode()]
    assert not [part for part in everything for word in (b"doe", b"jane", b"19700101") if word in part.lower()]


def test_shards_write_one_folder_and_one_summary(three, tmp_path):
    out = tmp_path / "out"
    batch(three, tmp_path / "clean")
    for number in (2, 1, 3):
        assert batch(three, out, shard=(number, 3)).exit_code == 0
    assert outputs(out) == outputs(tmp_path / "clean")
    assert statuses(out) == {"s0": "done", "s1": "done", "s2": "done"}
    with pytest.raises(ConfigError, match="--resume"):
        batch(three, out, shard=(2, 3))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_drops_the_slide_at_work_and_resume_goes_on(three, tmp_path, number, code):
    out = tmp_path / "out"

    class Signals:
        def __init__(self):
            self.count = 0

        def started(self, name):
            self.count += 1

        def progressed(self, name, done, total):
            if self.count == 2:
                os.kill(os.getpid(), number)

        def died(self, name, deaths): ...
        def ended(self, record): ...

    before = signal.getsignal(number)
    done = batch(three, out, view=Signals())
    assert signal.getsignal(number) is before
    assert (done.exit_code, [record.name for record in done.records]) == (code, ["s0"])
    assert not list(out.glob("s1*"))
    assert not litter(out)
    assert [record.reused for record in batch(three, out, resume=True).records] == [True, False, False]
    batch(three, tmp_path / "clean")
    assert outputs(out) == outputs(tmp_path / "clean")


# Tiles


def test_tiles_of_several_slides_become_one_datalist(three, tmp_path):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    ring = [[100, 100], [400, 100], [400, 400], [100, 400], [100, 100]]
    for number, name in enumerate(("tumor", "stroma", None)):
        features = [] if name is None else [
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
             "properties": {"classification": {"name": name}}},
        ]  # fmt: skip
        (annotations / f"s{number}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    listing = tmp_path / "slides.csv"
    listing.write_text("slide,patient\n" + "".join(f"{path},p{index // 2}\n" for index, path in enumerate(three)))
    done = tile_slides(
        [], tmp_path / "out", size=64, mpp=0.5, slides_csv=listing, annotations=annotations, save_images=True, workers=0
    )
    assert done.exit_code == 0
    datalist = json.loads((tmp_path / "out" / "datalist.json").read_text())
    assert datalist["labels"] == {"0": "background", "1": "stroma", "2": "tumor"}
    assert {(case["slide"], case["patient"]) for case in datalist["training"]} == {
        ("s0", "p0"), ("s1", "p0"), ("s2", "p1"),
    }  # fmt: skip
    assert all((tmp_path / "out" / case["image"]).is_file() for case in datalist["training"])
    assert str(tmp_path / "out" / ".state") not in (tmp_path / "out" / "datalist.json").read_text()
    again = tile_slides(
        [], tmp_path / "out", size=64, mpp=0.5, slides_csv=listing, annotations=annotations, save_images=True,
        workers=0, resume=True,
    )  # fmt: skip
    assert all(record.reused for record in again.records)
    (annotations / "s1.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    again = tile_slides(
        [], tmp_path / "out", size=64, mpp=0.5, slides_csv=listing, annotations=annotations, save_images=True,
        workers=0, resume=True,
    )  # fmt: skip
    assert not any(record.reused for record in again.records), "other classes, other labels"


def test_bad_parameters_of_tiling_are_refused_before_anything_is_written(three, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        ({"size": 64, "overlap": 64}, "make no tiles"),
        ({"size": 64, "mpp": float("nan")}, "make no tiles"),
        ({"size": 64, "min_tissue": 2}, "--min-tissue"),
        ({"size": 64, "masks": True}, "--masks"),
        ({"size": 64, "annotations": three[0]}, "one file for several slides"),
        ({"size": 64, "tissue": tmp_path}, "has no file for s0"),
    ):
        with pytest.raises(ConfigError, match=message):
            tile_slides(three, out, **{"mpp": 0.5, **options})
    assert not out.exists()


# Many processes


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """15 good slides, a blank one, three that are corrupt in different ways, and one that kills its reader."""
    folder = tmp_path_factory.mktemp("twenty")
    good = [write_slide(folder / f"good{number:02d}.tiff", seed=number) for number in range(15)]
    blank = write_slide(folder / "blank.tiff", blank=True)
    corrupt = [folder / f"corrupt{number}.tiff" for number in range(3)]
    content = good[0].read_bytes()
    corrupt[0].write_bytes(content[: len(content) // 3])
    corrupt[1].write_bytes(b"")
    corrupt[2].write_bytes(os.urandom(2000))
    killer = write_slide(folder / "killer.tiff", seed=99)
    return [corrupt[0], killer, *good[:8], blank, corrupt[1], *good[8:], corrupt[2]]


@pytest.fixture(scope="module")
def clean_run(twenty, tmp_path_factory):
    """The outputs of the 16 slides that can be worked on, made one after another in one process."""
    out = tmp_path_factory.mktemp("clean") / "out"
    done = batch([path for path in twenty if path.stem.startswith(("good", "blank"))], out)
    assert done.exit_code == 0
    return outputs(out)


def check_twenty(done, out, clean_run):
    assert done.exit_code == 1
    assert len(done.records) == done.total == 20
    found = statuses(out)
    assert len(found) == 20
    assert sum(status == "done" for status in found.values()) == 15
    assert found["blank"] == "empty-tissue"
    assert {name: status for name, status in found.items() if status not in ("done", "empty-tissue")} == {
        "corrupt0": "unreadable", "corrupt1": "unreadable", "corrupt2": "unreadable", "killer": "failed",
    }  # fmt: skip
    assert {row["case"] for row in table(out / "failures.csv")} == {"corrupt0", "corrupt1", "corrupt2", "killer"}
    (killer,) = [record for record in done.records if record.name == "killer"]
    assert killer.deaths == 3
    assert killer.reason == "3 worker processes died of it"
    assert outputs(out) == clean_run, "16 slides have outputs, the same as in a clean run"
    assert not litter(out)


def test_twenty_slides_with_four_bad_ones_on_two_workers(twenty, clean_run, tmp_path):
    out = tmp_path / "out"
    done = batch(twenty, out, function=predict_unless_killer, workers=2)
    check_twenty(done, out, clean_run)


SERVICE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import small_slides
if __name__ == "__main__":
    run, function = (getattr(small_slides, name) for name in sys.argv[2:4])
    slides = [Path(path) for path in sys.argv[6:]]
    sys.exit(run(slides, sys.argv[5], function=function, workers=int(sys.argv[4]), resume=True).exit_code)
"""


def run_service(names, slides, out, script, *, kill=False):
    """Run a batch in a process of its own; kill it as soon as it has one more slide."""
    records = out / ".state" / "slides"
    before = len(list(records.glob("*.json")))
    with subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent), *names, str(out), *map(str, slides)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as service:  # fmt: skip
        if kill:
            while service.poll() is None and len(list(records.glob("*.json"))) <= before:
                time.sleep(0.02)
            assert service.poll() is None, service.stderr.read().decode()
            workers = psutil.Process(service.pid).children(recursive=True)
            service.kill()
            psutil.wait_procs(workers, timeout=20)
        else:
            _, errors = service.communicate()
            assert service.returncode == 0, errors.decode()


def killed_and_restarted(names, slides, clean, tmp_path, *, kills):
    out, script = tmp_path / "out", tmp_path / "service.py"
    script.write_text(SERVICE)
    for _ in range(kills):
        run_service(names, slides, out, script, kill=True)
    run_service(names, slides, out, script)
    assert outputs(out) == clean, "one final file set per slide, identical"
    assert set(statuses(out).values()) == {"done"}
    assert not litter(out)


def test_a_service_killed_twice_and_restarted_gives_the_same_outputs(twenty, tmp_path):
    """In one process, which is quick to start."""
    slides = [path for path in twenty if path.stem.startswith("good")][:5]
    tile_batch(slides, tmp_path / "clean")
    names = ["tile_batch", "tile_slowly", "0"]
    killed_and_restarted(names, slides, outputs(tmp_path / "clean"), tmp_path, kills=2)


@pytest.mark.slow
def test_a_service_killed_ten_times_and_restarted_gives_the_same_outputs(twenty, clean_run, tmp_path):
    slides = [path for path in twenty if path.stem.startswith("good")]
    clean = {name: content for name, content in clean_run.items() if name.startswith("good")}
    killed_and_restarted(["batch", "predict_slowly", "2"], slides, clean, tmp_path, kills=10)


# Bundles


def test_a_bundle_that_is_not_for_slides_or_has_no_weights_is_refused(shared_bundle, three, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="has no entry 'slide'"):
        predict_slides(shared_bundle, three, out)
    with pytest.raises(ConfigError, match="does not exist"):
        predict_slides(tmp_path / "nothing", three, out)
    assert not out.exists()


def test_gpus_that_are_not_there_or_asked_for_twice_are_refused(shared_bundle, three, tmp_path):
    for options, message in (
        ({"devices": 99}, "asks for 99 GPUs"),
        ({"devices": 1, "cluster": "tcp://127.0.0.1:1"}, "does not go with --cluster"),
        ({"devices": 1, "workers": 2}, "does not go with --workers"),
        ({"devices": 1, "device": "cpu"}, "does not go with --device"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict_slides(shared_bundle, three, tmp_path / "out", **options)
