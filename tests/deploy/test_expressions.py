"""Every form an expression, a name or a path may not have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medkd.deploy.allowlist import Refused, check_component_name, sensitive_parameters
from medkd.deploy.expressions import check_expression
from medkd.deploy.trust import inspect_config
from medkd.deploy.written_paths import check_written_path

ALIASES = {"os": "os", "glob": "glob", "medkd": "medkd"}

REFUSED = [
    "lambda: 1",
    "(yield)",
    "[*@x]",
    "{**__local_refs['x']}",
    "dict(**__local_refs['x'])",
    "__local_refs",
    "__local_refs[__local_refs['x']]",
    "__local_refs['m']",
    "__local_refs['x'].anything",
    "__local_refs['x'].anything()",
    "__local_refs['x']()",
    "__local_refs['x'][0]()",
    "(lambda f: f)(1)",
    "torch",
    "torch.nn",
    "torch.load",
    "torch.load('a')",
    "torch.nn.Module.register_forward_hook",
    "torch.pi()",
    "np.load('a')",
    "np.inf()",
    "os.environ",
    "os.environ['HOME']",
    "os.environ[__local_refs['x']]",
    "os.environ.get()",
    "os.environ.get('HOME')",
    "os.getcwd()",
    "os.path.expanduser('~')",
    "glob",
    "print(1)",
    "input()",
    "open('a')",
    "vars()",
    "getattr(torch, 'os')",
    "type(1)",
    "sorted([], key=__local_refs['x'])",
    "max([1], key=len)",
    "[i for os in [1] for i in [os]]",
    "[i for _ in [1] for i in [1]]",
    "[1 for __local_refs['x'] in [1]]",
    "(i := 1)",
    "1 @ 2",
    "1 << 2",
    "2 ** __local_refs['x']",
    "setattr(torch, 'x', True)",
    "setattr(torch.backends.cudnn, 'benchmark', __local_refs['x'])",
    "setattr(torch.backends.cudnn, 'version', True)",
    "torch.distributed.init_process_group('gloo')",
    "torch.distributed.init_process_group(backend=__local_refs['x'])",
    "torch.distributed.init_process_group(**{'backend': 'gloo'})",
    "monai.transforms.LoadImage()",
    "monai.transforms.SaveImage",
    "monai.data.PersistentDataset",
    "monai.losses.PerceptualLoss(2)",
    "monai.networks.nets.resnet.get_pretrained_resnet_medicalnet(10)",
    "monai.transforms.io.array.np.load",
    "monai.handlers.utils.os.makedirs('a')",
    "monai.handlers.write_metrics_reports('a')",
    "medkd.data.datalists.os",
    "medkd.data.fetch.fetch_dataset",
    "medkd.errors.MedkdError",
    "f'{open(1)}'",
    "f'{1:{open(1)}}'",
    "1 if open(1) else 2",
    "not open(1)",
    "1 < open(1)",
    "[1][open(1):]",
    "{open(1): 2}",
    "{1 for i in [1] if open(1)}",
    "{i: open(1) for i in [1]}",
    "",
    "a b",
    "1\n2",
]


@pytest.mark.parametrize("text", REFUSED)
def test_expression_is_refused(text):
    with pytest.raises(Refused):
        check_expression(text, ALIASES, frozenset({"m"}))


@pytest.mark.parametrize(
    "text",
    [
        "os.path.join(__local_refs['a'], 'b')",
        "os.environ['LOCAL_RANK']",
        "{1: [2, (3,), {4}]}",
        "-1 if 1 < 2 and not 3 else 4",
        "__local_refs['a'][1:2]",
        "{k: v for k, v in __local_refs['a'].items() if v > 1}",
        "{i for i in range(3)}",
        "torch.backends.cudnn.benchmark",
        "torch.nn.functional.relu",
        "f'{1:>{2}}'",
        "max([1, 2], default=0)",
        "dict(a=1)",
    ],
)
def test_expression_is_allowed(text):
    check_expression(text, ALIASES, frozenset())


@given(st.text(max_size=40))
def test_any_text_is_either_allowed_or_refused(text):
    config = {"a": 1, "x": f"${text}", "y": {"_target_": text, "b": text}}
    for code in inspect_config(config, "c"):
        assert code.problem is None or isinstance(code.problem, str)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("monai.transforms.Nothing", "does not exist"),
        ("monai.transforms.nothing.Nothing", "does not exist"),
        ("monai.transforms.Compose.inverse", "reaches into an object"),
        ("monai.networks.layers.Act", "neither a class"),
        ("monai.transforms.io.array.nib", "leads to the module|neither"),
        ("monai.transforms.io.array.optional_import", "outside the allowed modules"),
        ("monai.handlers.MLFlowHandler", "network"),
        ("monai.transforms.TorchVisiond", "code it is given by name"),
        ("medkd.metrics.cases.write_evaluation", "writes files"),
        ("monai.transforms.__doc__", "public name"),
        ("os.system", "outside"),
    ],
)
def test_name_is_refused_for_its_reason(name, match):
    with pytest.raises(Refused, match=match):
        check_component_name(name)


def test_enum_members_and_constants_are_allowed():
    assert check_component_name("ignite.engine.Events.EPOCH_COMPLETED").value == "epoch_completed"
    assert check_component_name("numpy.pi") > 3
    assert check_component_name("torch.bfloat16").itemsize == 2


def test_sensitive_parameters_are_those_of_the_signature():
    load = check_component_name("monai.transforms.LoadImaged")
    assert sensitive_parameters(load) == {"reader"}
    assert sensitive_parameters(check_component_name("glob.glob")) == frozenset()


@pytest.mark.parametrize(
    ("component", "problem"),
    [
        ({"_target_": "monai.networks.nets.EfficientNetBN", "model_name": "efficientnet-b0"}, "downloads"),
        ({"_target_": "monai.networks.nets.EfficientNetBN", "pretrained": False}, None),
        ({"_target_": "monai.networks.nets.resnet18", "pretrained": True}, "downloads"),
        ({"_target_": "monai.transforms.LoadImage", "reader": "@r"}, "written out"),
        ({"_target_": "monai.transforms.LoadImage", "reader": ["ITKReader", "NumpyReader"]}, "NumpyReader"),
        ({"_target_": "monai.transforms.LoadImage", "reader": "evil.ITKReader"}, "evil"),
        ({"_target_": "monai.transforms.LoadImage", "reader": ["ITKReader", "monai.data.PILReader"]}, None),
        ({"_target_": "monai.inferers.PatchInferer", "merger_cls": "evil.Merger"}, "evil"),
        ({"_target_": "monai.inferers.PatchInferer", "merger_cls": "AvgMerger"}, None),
        ({"_target_": "monai.handlers.CheckpointLoader", "weights_only": False}, "weights_only"),
        ({"_target_": "monai.transforms.Identity", "pickle_module": "dill"}, "pickles"),
        ({"_target_": "monai.transforms.Identity", "_mode_": "callable"}, None),
        ({"_target_": "NoSuchThing"}, "not a MONAI component"),
        ({"_target_": 3}, "computed"),
    ],
)
def test_arguments_that_name_code_are_checked(component, problem):
    found = [code.problem for code in inspect_config({"x": component}, "c") if code.kind == "target"]
    assert (found[0] is None) if problem is None else (problem in found[0])


ITEMS = {
    "bundle_root": ".",
    "inside": "$@bundle_root + '/eval'",
    "outside": "/tmp/x",
    "above": "$@bundle_root + '/..'",
    "home": "~/x",
    "round": "$@other + '/a'",
    "other": "$@round + '/b'",
    "number": 3,
}


@pytest.mark.parametrize(
    "value",
    [
        "eval", "@inside", "$@inside + '/deeper'", "$str(@bundle_root) + '/x'", "$f'{@bundle_root}/fold{@number}'",
        "$os.path.join(@bundle_root, 'eval', @inside)", "$@inside if @number else None", "$@round", None, "./a/b",
    ],
)  # fmt: skip
def test_path_inside_the_bundle_is_allowed(value):
    if isinstance(value, str):
        value = value.replace("f'{@bundle_root}/fold{@number}'", 'f"{@bundle_root}/fold{@number}"')
    check_written_path("output_dir", value, ITEMS)


@pytest.mark.parametrize(
    "value",
    [
        "/tmp", "~/x", "../x", "a/../../x", "C:\\x", "http://x", "@outside", "@above", "@home", "$'/tmp'",
        "$'/' + 'tmp'",
        "$@bundle_root + '/../x'", "$os.path.join(@bundle_root, '/tmp')", "$os.path.dirname(@bundle_root)",
        "$@bundle_root / '/tmp'", "$@inside if @number else '/tmp'", "$chr(47) + 'tmp'", "$@outside + '/a'", ["/tmp"],
        "$a b", "$f'/{@number}'",
    ],
)  # fmt: skip
def test_path_that_can_lead_outside_is_refused(value):
    with pytest.raises(Refused, match="outside"):
        check_written_path("output_dir", value, ITEMS)
