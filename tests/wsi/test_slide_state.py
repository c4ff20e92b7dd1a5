from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medkd.errors import ConfigError
from medkd.wsi.slide_state import (
    SlideRecord,
    alone,
    discard_unfinished,
    forget,
    hold,
    is_complete,
    prepare_out,
    publish,
    read_record,
    setup_hash,
    slide_key,
    staging,
    write_record,
)

DONE = SlideRecord("a", "done", setup="s", key="k", files={"a.csv": 3}, tiles=7, failed_tiles=1, mpp=0.5, seconds=2.5)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    prepare_out(folder, {}, ["a"], resume=False, overwrite=False, shared=False)
    return folder


def everything(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(out, **choices):
    with pytest.raises(ConfigError) as caught:
        prepare_out(
            out, **{"identity": {}, "names": ["a"], "resume": False, "overwrite": False, "shared": False} | choices
        )
    return str(caught.value)


def test_a_record_comes_back_without_what_is_only_for_the_log(out):
    write_record(out, replace(DONE, reused=True, disk_is_full=True, notes=("note",), details="traceback"))
    assert read_record(out, "a") == DONE
    assert read_record(out, "b") is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format_version": 99}', '{"format_version": 1, "name": "b", "status": "done"}',
     '{"format_version": 1, "name": "a", "status": "fine"}',
     '{"format_version": 1, "name": "a", "status": "done", "files": {"../../etc/passwd": 1}}',
     '{"format_version": 1, "name": "a", "status": "done", "files": []}',
     '{"format_version": 1, "name": "a", "status": "done", "unknown": 1}'],
)  # fmt: skip
def test_a_damaged_or_foreign_record_is_none(out, content):
    (out / ".state" / "slides" / "a.json").write_text(content)
    assert read_record(out, "a") is None
    forget(out, "a")


def test_outputs_are_complete_only_under_their_key_with_all_files_in_their_size(out):
    (out / "a.csv").write_text("x,y")
    assert is_complete(out, DONE, "k")
    assert not is_complete(out, DONE, "another")
    assert not is_complete(out, replace(DONE, status="failed"), "k")
    assert not is_complete(out, None, "k")
    (out / "a.csv").write_text("x")
    assert not is_complete(out, DONE, "k"), "cut short"
    (out / "a.csv").unlink()
    assert not is_complete(out, DONE, "k"), "gone"


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()))
def test_the_setup_depends_on_its_content_and_not_on_its_order(parameters):
    turned = dict(reversed(list(parameters.items())))
    assert setup_hash("model", parameters) == setup_hash("model", turned)
    assert setup_hash("model", parameters) != setup_hash("other", parameters)
    assert setup_hash("model", parameters) != setup_hash("model", {**parameters, "one more": 1})


def test_the_key_depends_on_slide_model_parameters_and_version(monkeypatch):
    def key(slide="slide", model="model", mpp=0.5):
        return slide_key(slide, setup_hash(model, {"mpp": mpp}))

    assert len({key(), key(slide="other"), key(model="other"), key(mpp=0.25)}) == 4
    before = key()
    monkeypatch.setattr("medkd.wsi.slide_state.__version__", "99")
    assert key() != before


def test_what_is_staged_appears_whole_with_the_summary_last(out, monkeypatch):
    order = []
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(os.path.basename(b)), rename(a, b)))
    with staging(out, "a") as folder:
        (folder / "a.json").write_text("{}")
        (folder / "a.csv").write_text("x,y")
        (folder / "a_tiles").mkdir()
        (folder / "a_tiles" / "1.png").write_text("")
        files = publish(folder, out, "a")
    assert files == {"a.csv": 3, "a.json": 2, "a_tiles": 1}
    assert [name for name in order if name != "a.files"] == ["a.csv", "a_tiles", "a.json"]
    assert not folder.exists()


def test_forgetting_removes_files_that_only_the_list_tells_of(out):
    """A process killed while it published left files, but no record."""
    with staging(out, "a") as folder:
        (folder / "a.csv").write_text("x,y")
        (folder / "a_tiles").mkdir()
        publish(folder, out, "a")
    assert read_record(out, "a") is None
    (out / "b.csv").write_text("of another slide")
    forget(out, "a")
    assert set(everything(out)) == {"b.csv", ".state/run.json"}
    assert not (out / "a_tiles").exists()


def test_unfinished_work_of_one_slide_is_told_from_that_of_others(out):
    folder = out / ".state" / "slides"
    for name in ("a.work-0123abcd", "a.work-b.work-0123abcd", "ab.work-0123abcd"):
        (folder / name).mkdir()
    for name in (".a.json.x1.partial", ".a.files.x1.partial", ".a.b.json.x1.partial"):
        (folder / name).write_text("")
    discard_unfinished(out, "a")
    assert {path.name for path in folder.iterdir()} == {
        "a.work-b.work-0123abcd", "ab.work-0123abcd", ".a.b.json.x1.partial",
    }  # fmt: skip


def test_a_folder_is_used_only_when_it_is_new_or_the_user_says_so(tmp_path):
    out = tmp_path / "out"
    new = {"names": ["a"], "overwrite": False, "shared": False}
    prepare_out(out, {}, **new, resume=False)
    prepare_out(out, {}, **new, resume=False)  # nothing was done there
    write_record(out, DONE)
    (out / "a.csv").write_text("x,y")
    assert "pass --resume to go on with it, or --overwrite" in refusal(out)
    prepare_out(out, {"other": 1}, **new, resume=True)
    assert read_record(out, "a") == DONE
    prepare_out(out, {}, names=["a"], resume=False, overwrite=True, shared=False)
    assert set(everything(out)) == {".state/run.json"}


def test_a_folder_of_something_else_is_refused_even_to_resume(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    assert "is not empty; choose another folder, or pass --overwrite" in refusal(tmp_path)
    assert "holds no run to resume" in refusal(tmp_path, resume=True)
    assert "exclude each other" in refusal(tmp_path, resume=True, overwrite=True)
    assert "is a file" in refusal(tmp_path / "thesis.tex")
    assert everything(tmp_path) == {"thesis.tex": b""}


def test_shards_of_one_run_share_a_folder_that_others_may_not_enter(tmp_path):
    run = {"slides": "list", "shards": 2}
    prepare_out(tmp_path, run, ["a"], resume=False, overwrite=False, shared=True)
    write_record(tmp_path, DONE)
    prepare_out(tmp_path, run, ["b"], resume=False, overwrite=False, shared=True)
    assert "is not empty" in refusal(tmp_path, identity=run, names=["a"], shared=True)
    assert "is not empty" in refusal(tmp_path, identity={"slides": "another"}, names=["b"], shared=True)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medkd.wsi.slide_state.atomic_write", full)
    message = refusal(tmp_path / "out")
    assert message.endswith("cannot be written to (No space left on device); choose another folder, or free some space")


HOLDS = """
import sys
from pathlib import Path
from medkd.wsi.slide_state import hold
with hold(Path(sys.argv[1]), eval(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        (None, None, False),
        (None, (1, 2), False),
        ((1, 2), None, False),
        ((1, 2), (1, 2), False),
        ((1, 2), (2, 2), True),
    ],
)
def test_two_processes_share_a_folder_only_as_different_shards(out, first, second, fits):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(out), repr(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        if fits:
            with hold(out, second), alone(out):
                pass
        else:
            with pytest.raises(ConfigError, match="another process is at work there"), hold(out, second):
                pass
        other.kill()
    with hold(out, second):  # a lock ends with its process
        pass


def test_the_record_is_plain_json(out):
    write_record(out, DONE)
    content = json.loads((out / ".state" / "slides" / "a.json").read_text())
    assert content["status"] == "done"
    assert "details" not in content
