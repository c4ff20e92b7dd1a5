from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from malicious_configs import ATTACKS, MARK
from monai.bundle import ConfigParser

from medkd.deploy.trust import bundle_sha256, inspect_config, list_code, read_config, require_trust
from medkd.errors import ConfigError


def placed(config: Any, mark: Path) -> Any:
    return json.loads(json.dumps(config).replace(MARK, str(mark)))


def test_there_are_enough_attacks():
    assert len(ATTACKS) >= 25


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_and_nothing_runs(name, tmp_path):
    mark = tmp_path / "mark"
    config, _ = ATTACKS[name]
    file = tmp_path / "inference.json"
    file.write_text(json.dumps(placed(config, mark)))
    with pytest.raises(ConfigError, match="allow-list"):
        require_trust(tmp_path, read_config(file), source="inference.json")
    assert not mark.exists()


@pytest.mark.parametrize("name", [name for name, (_, item) in ATTACKS.items() if item])
def test_attack_would_work_in_bare_monai(name, tmp_path):
    """Keeps the attacks honest: each of these really runs when MONAI evaluates the configuration."""
    mark = tmp_path / "mark"
    config, item = ATTACKS[name]
    file = tmp_path / "inference.json"
    file.write_text(json.dumps(placed(config, mark)))
    parser = ConfigParser(read_config(file))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):
            parser.get_parsed_content(placed(item, mark))
    assert mark.exists()


HARMLESS = [
    "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "$@bundle_root + '/models/model.pt'",
    "$sorted(glob.glob(@dataset_dir + '/*.nii.gz'))",
    "$[{'image': i, 'label': l} for i, l in zip(@images, @labels)]",
    "$monai.handlers.from_engine(['pred', 'label'])",
    "$monai.data.load_decathlon_datalist(@datalist, is_segmentation=True, data_list_key='training')",
    "$os.path.join(@bundle_root, 'eval')",
    "$int(os.environ.get('LOCAL_RANK', 0))",
    "$torch.distributed.init_process_group(backend='nccl' if torch.cuda.is_available() else 'gloo')",
    "$@network_def.to(@device)",
    "$@trainer.run()",
    "$@trainer.state.epoch",
    "$setattr(torch.backends.cudnn, 'benchmark', True)",
    "$np.uint8",
    "$torch.float32",
    "$not @use_amp",
    "$medkd.losses.segmentation.dice_ce_loss",
    "$@method.role_parameters('student')",
    "$f'fold {1 + 1}'",
    "$@x[0]['a'] * 2 ** 3 - 1",
]


@pytest.mark.parametrize("expression", HARMLESS)
def test_ordinary_expression_is_allowed(expression):
    config = {"imports": ["$import glob", "$import os", "$import medkd"], "x": expression}
    assert [code for code in inspect_config(config, "c") if code.problem] == []


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import torch.nn.functional as F", True),
        ("from torch.optim.lr_scheduler import PolynomialLR", True),
        ("import monai.transforms as transforms", True),
        ("from pathlib import Path", True),
        ("import sys", False),
        ("import monai.bundle", False),
        ("import monai.apps.nnunet", False),
        ("import torch.hub as hub", False),
        ("import monai.transforms._private", False),
        ("import medkd.data.fetch as f", False),
        ("import math as torch", False),
        ("from monai.utils import set_determinism as len", False),
        ("from . import x", False),
        ("import glob; import os", False),
    ],
)
def test_imports_are_limited_to_the_list(statement, allowed):
    problems = [code for code in inspect_config({"imports": [f"${statement}"]}, "c") if code.problem]
    assert (problems == []) == allowed


def test_function_by_an_imported_module_is_checked_under_its_full_name():
    config = {
        "imports": ["$import torch.nn.functional as F", "$import monai.transforms as t"],
        "x": "$t.LoadImage('a')",
    }
    assert [code.where for code in inspect_config(config, "c") if code.problem] == ["c x"]


def test_medkd_reader_is_allowed():
    config = {
        "a": {
            "_target_": "monai.transforms.LoadImaged",
            "keys": ["image", "label"],
            "reader": "$VolumeReader",
        },
        "imports": "$from medkd.data.volumes import VolumeReader",
        "b": {"_target_": "LoadImaged", "keys": "image", "reader": {"_target_": "medkd.data.volumes.VolumeReader"}},
        "c": {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader"},
    }
    assert [code for code in inspect_config(config, "c") if code.problem] == []


def test_hash_covers_names_and_contents(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.json").write_text("{}")
    first = bundle_sha256(tmp_path)
    (tmp_path / "configs" / "a.json").rename(tmp_path / "configs" / "b.json")
    second = bundle_sha256(tmp_path)
    (tmp_path / "configs" / "b.json").write_text("{ }")
    assert len({first, second, bundle_sha256(tmp_path)}) == 3


def test_hash_of_the_files_gives_trust_and_another_does_not(tmp_path):
    (tmp_path / "a.json").write_text('{"x": "$print(1)"}')
    config = read_config(tmp_path / "a.json")
    assert require_trust(tmp_path, config, source="a.json", trust=bundle_sha256(tmp_path))
    with pytest.raises(ConfigError, match="is not the hash"):
        require_trust(tmp_path, config, source="a.json", trust="0" * 64)


def test_link_in_a_bundle_cannot_be_hashed(tmp_path):
    (tmp_path / "a").symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match="link"):
        bundle_sha256(tmp_path)


def test_every_piece_of_code_is_listed(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "scripts" / "net.py").write_text("")
    (tmp_path / "models" / "model.ts").write_bytes(b"")
    (tmp_path / "configs" / "logging.conf").write_text("")
    content = {"imports": ["$import glob"], "x": {"_target_": "monai.networks.nets.UNet", "a": "$1 + 1"}}
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(content))
    found = {(code.kind, code.text): code.problem for code in list_code(tmp_path)}
    assert {("import", "import glob"), ("target", "monai.networks.nets.UNet"), ("expression", "$1 + 1")} <= set(found)
    assert {kind for (kind, _), problem in found.items() if problem} == {"file"}
    assert sum(kind == "file" for kind, _ in found) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tag.yaml", "x: !!python/object/apply:os.system ['true']"),
        ("bomb.yaml", "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]"),
        ("deep.json", "[" * 100_000),
        ("list.json", "[1]"),
        ("text.txt", "{}"),
        ("nan.json", "<html>"),
    ],
)
def test_hostile_file_is_refused_in_one_line(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
