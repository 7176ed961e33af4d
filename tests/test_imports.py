"""What importing the package costs, and which way imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import axolotl_reft

PACKAGE = Path(axolotl_reft.__file__).parent
ORDER = [
    "wording",
    "adapter_numbers",
    "adapter_leaf",
    "positions",
    "editing",
    "joint_edit",
    "kernels",
    "launches",
    "turns",
    "chat_template",
    "rotation",
    "shared_rotations",
    "rotation_kernels",
    "rotation_launches",
    "fused",
    "peft_type",
    "pyreft_install",
    "foreign_names",
    "components",
    "format_version",
    "config_file",
    "config",
    "conversations",
    "adapter_rows",
    "prompts",
    "prompt_counts",
    "labelled_logits",
    "interventions",
    "lora",
    "adapter_directory",
    "input_gradients",
    "layer",
    "trained_modules",
    "model",
    "model_card",
    "registration",
    "pyreft_objects",
    "pyreft_format",
    "lm_eval",
    "edit_size",
    "token_view",
    "edit_log",
    "first_batch",
    "training_record",
    "inspection",
    "probe",
    "inspection_text",
    "inspection_plot",
    "inspection_page",
    "inspect_command",
    "plugin",
]


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )


def test_importing_the_package_brings_in_neither_axolotl_nor_pyreft():
    code = (
        "import axolotl_reft, sys\n"
        "heavy = ('axolotl', 'pyreft', 'pyvene', 'matplotlib', 'plotnine')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run(code).stdout.strip() == "[]"


def test_the_interventions_are_imported_in_silence():
    assert run("import axolotl_reft.interventions").stdout == ""


def test_importing_twice_registers_once():
    code = (
        "import axolotl_reft, sys\n"
        "from peft import PeftType\n"
        "for name in [n for n in sys.modules if n.startswith('axolotl_reft')]:\n"
        "    del sys.modules[name]\n"
        "import axolotl_reft\n"
        "print([t.value for t in PeftType].count('LOREFT'))"
    )
    assert run(code).stdout.strip() == "1"


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "axolotl_reft" and len(parts) > 1:
                yield parts[1]


def test_imports_point_one_way():
    assert {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py"} == {
        "__init__",
        *ORDER[:-1],
    }
    for index, part in enumerate(ORDER[:-1]):
        later = set(imported_parts(PACKAGE / f"{part}.py")) & set(ORDER[index:])
        assert not later, f"{part} imports {later}"


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("positions", {"torch", "axolotl_reft"}),
        ("editing", {"torch"}),
        ("joint_edit", {"torch"}),
        ("turns", {"torch", "axolotl_reft"}),
        ("rotation", {"torch"}),
        ("shared_rotations", {"torch", "axolotl_reft"}),
        ("kernels", {"triton"}),
        ("rotation_kernels", {"triton"}),
        ("rotation_launches", {"torch", "axolotl_reft"}),
        ("launches", {"torch", "axolotl_reft"}),
        ("fused", {"torch", "axolotl_reft"}),
    ],
)
def test_the_numerics_need_torch_alone(part, allowed):
    tree = ast.parse((PACKAGE / f"{part}.py").read_text())
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert roots - sys.stdlib_module_names == allowed


def test_axolotl_is_imported_by_the_plugin_alone():
    for path in PACKAGE.glob("*.py"):
        assert "import axolotl\n" not in path.read_text()
        assert "from axolotl." not in path.read_text()


def test_a_name_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(AttributeError, match="'LoReftPlugin'. Did you mean 'LoreftPl"):
        axolotl_reft.LoReftPlugin  # noqa: B018
    assert not hasattr(axolotl_reft, "__wrapped__")
