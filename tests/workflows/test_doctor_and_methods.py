from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil

import pytest

import medkd.methods
from medkd.engine.method import Method
from medkd.errors import ConfigError
from medkd.workflows import doctor
from medkd.workflows.cost import pareto_front, profile_models
from medkd.workflows.devices import choose_device
from medkd.workflows.doctor import examine
from medkd.workflows.methods import find_method, list_methods


def test_every_method_of_the_package_is_listed():
    expected = set()
    for info in pkgutil.iter_modules(medkd.methods.__path__):
        module = __import__(f"medkd.methods.{info.name}", fromlist=["x"])
        expected |= {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
        }
    cards = list_methods()
    assert {card.class_name for card in cards} == expected
    assert "ACTNet" in expected
    assert all(card.paper and card.streams and card.roles and card.summary for card in cards)


def test_deviations_are_read_from_the_module_card():
    (card,) = find_method("act_net")
    source = inspect.getdoc(__import__("medkd.methods.act_net", fromlist=["x"])) or ""
    assert len(card.differs) == source.count("Differs:")
    assert all("\n" not in text for text in card.differs)


def test_method_is_found_by_its_printed_name_and_a_typo_is_answered():
    assert find_method("ACTNet")[0].name == "act_net"
    with pytest.raises(ConfigError, match="did you mean act_net"):
        find_method("act_nett")


def test_doctor_shows_versions_and_devices():
    facts = {(fact.group, fact.name): fact for fact in examine()}
    assert facts["versions", "torch"].value == importlib.metadata.version("torch")
    assert facts["devices", "cpu"].state == "ok"
    assert facts["installation", "licence"].state == "ok"


def test_missing_requirement_is_a_finding_with_the_command(monkeypatch):
    genuine = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("nibabel", "highdicom") else genuine(name))
    facts = {fact.name: fact for fact in examine()}
    assert facts["nibabel"].state == "finding"
    assert facts["nibabel"].remedy.startswith("pip install 'nibabel")
    assert facts["dicom-seg"].state == "note"
    assert facts["dicom-seg"].remedy == "pip install 'medkd[dicom-seg]'"


def test_outdated_requirement_is_a_finding(monkeypatch):
    genuine = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "2.0.0" if name == "torch" else genuine(name))
    (fact,) = [fact for fact in examine() if fact.name == "torch"]
    assert fact.state == "finding"
    assert "needs >=2.10" in fact.value


def test_device_names():
    assert str(choose_device("cpu")) == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:x", "cuda:99"):
        with pytest.raises(ConfigError, match="--device"):
            choose_device(name)


def test_profile_draws_a_picture(shared_bundle, tmp_path):
    from bundle_factory import write_image

    image = write_image(tmp_path / "a.nii.gz")
    (cost,) = profile_models([shared_bundle], image=image, out=tmp_path / "p.png", rounds=1, device="cpu")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert pareto_front([cost]) == [cost]
