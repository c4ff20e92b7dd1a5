from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import jsonschema
import pytest
import torch
from bundle_factory import LABELS, TRAIN_CONFIG, make_bundle
from malicious_configs import ATTACKS, MARK
from safetensors.torch import save_file

from medkd.deploy.bundle import load_bundle, write_bundle
from medkd.deploy.metadata import SCHEMA, check_metadata, license_text, segmentation_metadata
from medkd.deploy.trust import bundle_sha256, list_code
from medkd.errors import ConfigError, InputError, MedkdError


@pytest.fixture
def bundle(shared_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(shared_bundle, tmp_path / "copy_segmentation"))


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def forget_hash(bundle: Path) -> None:
    edit(bundle / "configs" / "metadata.json", weights_sha256={})


def test_bundle_has_the_files_of_the_model_zoo(shared_bundle):
    for name in ("configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md", "LICENSE"):
        assert (shared_bundle / name).is_file()
    assert "Apache License" in (shared_bundle / "LICENSE").read_text()


def test_written_bundle_needs_no_trust(shared_bundle):
    assert [code for code in list_code(shared_bundle) if code.problem] == []


def test_loaded_network_has_the_written_weights(shared_bundle):
    bundle = load_bundle(shared_bundle)
    stored = torch.load(shared_bundle / "models" / "model.pt", weights_only=True)
    state = bundle.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert bundle.labels == {int(key): name for key, name in LABELS.items()}
    assert not bundle.network.training
    assert bundle.name == "small_segmentation"


def test_run_folder_stands_for_its_bundle(shared_bundle, tmp_path):
    shutil.copytree(shared_bundle, tmp_path / "run" / "bundle")
    assert load_bundle(tmp_path / "run").name == "run"


def test_safetensors_are_read(bundle):
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    (bundle / "models" / "model.pt").unlink()
    save_file(state, bundle / "models" / "model.safetensors")
    assert load_bundle(bundle).weights.name == "model.safetensors"


def test_bundle_without_weights_is_refused(bundle):
    (bundle / "models" / "model.pt").unlink()
    with pytest.raises(ConfigError, match=r"no models/model\.pt; train it first"):
        load_bundle(bundle)


@pytest.mark.parametrize("missing", ["network_def", "inferer", "preprocessing"])
def test_missing_id_is_named(bundle, missing):
    file = bundle / "configs" / "inference.json"
    content = json.loads(file.read_text())
    del content[missing]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=missing):
        load_bundle(bundle)


def test_weights_of_another_network_are_named(bundle):
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    first = next(iter(state))
    state["other"] = state.pop(first)
    torch.save(state, bundle / "models" / "model.pt")
    forget_hash(bundle)
    with pytest.raises(ConfigError, match=f"lacks {first}, has the unknown other"):
        load_bundle(bundle)


def test_weights_that_are_not_finite_are_refused(bundle):
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    state[next(iter(state))].view(-1)[0] = float("nan")
    torch.save(state, bundle / "models" / "model.pt")
    forget_hash(bundle)
    with pytest.raises(InputError, match="not finite"):
        load_bundle(bundle)


def test_every_flipped_bit_of_the_weights_is_refused(bundle):
    file = bundle / "models" / "model.pt"
    content = file.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 40)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        with pytest.raises(MedkdError):
            load_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04"])
def test_file_that_is_no_weights_is_refused_in_one_line(bundle, content):
    (bundle / "models" / "model.pt").write_bytes(content)
    forget_hash(bundle)
    with pytest.raises(ConfigError, match=r"model\.pt") as caught:
        load_bundle(bundle)
    assert "\n" not in str(caught.value)


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["torch", "raw"])
def test_pickle_in_the_weights_does_not_run(bundle, kind, tmp_path):
    mark = tmp_path / "mark"
    file = bundle / "models" / "model.pt"
    if kind == "torch":
        torch.save({"a": _Payload(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": _Payload(mark)}))
    forget_hash(bundle)
    with pytest.raises(ConfigError):
        load_bundle(bundle)
    assert not mark.exists()


def test_weights_that_unpack_to_far_more_are_refused(bundle):
    file = bundle / "models" / "model.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/0", b"\0" * 20_000_000)
    forget_hash(bundle)
    with pytest.raises(ConfigError, match="unpacks"):
        load_bundle(bundle)


def test_torchscript_needs_trust(bundle):
    network = torch.jit.script(load_bundle(bundle).network)
    (bundle / "models" / "model.pt").unlink()
    torch.jit.save(network, bundle / "models" / "model.ts")
    with pytest.raises(ConfigError, match="--trust"):
        load_bundle(bundle)
    assert load_bundle(bundle, trust=bundle_sha256(bundle)).weights.name == "model.ts"


@pytest.mark.parametrize("name", ["dunder_import", "target_os_system", "key_becomes_code", "reader_by_name"])
def test_attack_in_the_inference_config_does_not_run(bundle, name, tmp_path):
    mark = tmp_path / "mark"
    config = json.loads(json.dumps(ATTACKS[name][0]).replace(MARK, str(mark)))
    edit(bundle / "configs" / "inference.json", **config)
    with pytest.raises(ConfigError, match="bundle check"):
        load_bundle(bundle)
    assert not mark.exists()


def test_code_in_a_script_needs_trust_and_then_runs(bundle):
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "__init__.py").write_text("")
    (bundle / "scripts" / "own_inferer.py").write_text(
        "from monai.inferers import SimpleInferer\nclass OwnInferer(SimpleInferer):\n    pass\n"
    )
    edit(bundle / "configs" / "inference.json", inferer={"_target_": "scripts.own_inferer.OwnInferer"})
    with pytest.raises(ConfigError, match="allow-list"):
        load_bundle(bundle)
    assert type(load_bundle(bundle, trust=bundle_sha256(bundle)).inferer).__name__ == "OwnInferer"


def test_writing_refuses_a_folder_with_files_and_leaves_it_alone(tmp_path):
    out = tmp_path / "x_segmentation"
    out.mkdir()
    (out / "note.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        make_bundle(out)
    assert [path.name for path in tmp_path.rglob("*")] == ["x_segmentation", "note.txt"]


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="required property"):
        write_bundle(tmp_path / "x", train_config=TRAIN_CONFIG, weights={}, metadata={"schema": "x"}, readme="")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_the_whole_bundle(tmp_path):
    out = make_bundle(tmp_path / "x")
    (out / "extra.txt").write_text("old")
    weights = torch.load(out / "models" / "model.pt", weights_only=True)
    metadata = json.loads((out / "configs" / "metadata.json").read_text())
    write_bundle(out, train_config=TRAIN_CONFIG, weights=weights, metadata=metadata, readme="new", overwrite=True)
    assert not (out / "extra.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_schema_is_a_valid_schema_and_refuses_what_the_official_one_does():
    jsonschema.Draft201909Validator.check_schema(SCHEMA)
    good = segmentation_metadata(name="n", task="t", description="d", labels=LABELS, spatial_shape=["16*n", 16])
    check_metadata(good, "m")
    for name in SCHEMA["required"]:
        with pytest.raises(ConfigError, match=name):
            check_metadata({key: value for key, value in good.items() if key != name}, "m")
    with pytest.raises(ConfigError, match="authors"):
        check_metadata({**good, "authors": ["a"]}, "m")


def test_licence_is_apache():
    assert "Version 2.0, January 2004" in license_text()
