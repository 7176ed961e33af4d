"""What importing the package costs, and which way imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import axolotl_reft

PACKAGE = Path(axolotl_reft.__file__).parent
# From bottom to top, each with what it imports of others: rooms, then packages.
ROOMS = {
    "errors": ((), ()),
    "core": ((), ("torch", "transformers")),
    "prompts": (("errors", "core"), ("torch",)),
    "settings": (("errors", "core", "prompts"), ("torch", "transformers")),
    "kernels": (("core",), ("torch", "triton")),
    "tuner": (
        ("errors", "core", "prompts", "settings", "kernels"),
        ("torch", "transformers", "peft", "packaging"),
    ),
    "saved": (
        ("core", "prompts", "settings", "tuner"),
        ("torch", "peft", "safetensors", "huggingface_hub"),
    ),
    "serving": (
        ("core", "settings", "kernels", "tuner", "saved"),
        ("torch", "numpy", "packaging", "peft", "vllm"),
    ),
    "exchange": (
        ("core", "prompts", "settings", "tuner", "saved"),
        ("torch", "transformers", "peft", "pyreft", "pyvene"),
    ),
    "lm_eval": (
        ("saved", "tuner"),
        ("torch", "transformers", "peft", "lm_eval", "tqdm"),
    ),
    "inspect": (
        ("core", "prompts", "saved", "tuner"),
        ("torch", "transformers", "peft", "rich", "matplotlib"),
    ),
    "training": (
        ("core", "inspect", "prompts", "settings", "tuner"),
        ("accelerate", "psutil", "torch", "transformers", "trl"),
    ),
    "compare": (
        ("errors", "inspect", "training", "tuner"),
        ("peft", "safetensors", "transformers", "rich", "matplotlib"),
    ),
    "plugin": (
        (
            "errors",
            "core",
            "prompts",
            "settings",
            "tuner",
            "saved",
            "exchange",
            "lm_eval",
            "inspect",
            "training",
            "compare",
        ),
        (
            "axolotl",
            "click",
            "datasets",
            "lm_eval",
            "packaging",
            "peft",
            "pydantic",
            "torch",
            "tqdm",
            "transformers",
            "trl",
            "yaml",
        ),
    ),
}


@pytest.fixture(scope="module")
def printed():
    """The lines that a process prints which makes an adapter, and then imports the
    package once more."""
    code = (
        "import sys, peft\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1, vocab_size=8)\n"
        "base = LlamaForCausalLM(LlamaConfig(**sizes))\n"
        "before = set(sys.modules)\n"
        "print('before')\n"
        "import axolotl_reft, axolotl_reft.core.interventions\n"
        "config = axolotl_reft.LoreftConfig(task_type='CAUSAL_LM', rank=2)\n"
        "peft.get_peft_model(base, config)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'axolotl', 'pyreft', 'pyvene', 'matplotlib', 'pandas', 'pyarrow',"
        " 'datasets', 'rich', 'triton', 'trl'}\n"
        "print(sorted(new & heavy))\n"
        "for name in [n for n in sys.modules if n.startswith('axolotl_reft')]:\n"
        "    del sys.modules[name]\n"
        "import axolotl_reft\n"
        "print([t.value for t in peft.PeftType].count('LOREFT'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_making_an_adapter_brings_in_nothing_heavy(printed):
    """Of ours: what transformers and PEFT import themselves is imported before."""
    assert "[]" in printed


def test_the_package_is_imported_in_silence(printed):
    assert len(printed[printed.index("before") :]) == 3


def test_importing_twice_registers_once(printed):
    assert printed[-1] == "1"


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield f"{node.module}.{node.names[0].name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def files_of(room):
    folder = PACKAGE / room
    return folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_rooms_below_it_and_packages_that_it_is_for(room):
    rooms, packages = ROOMS[room]
    names = list(ROOMS)
    assert all(names.index(below) < names.index(room) for below in rooms)
    found_rooms, found_packages = set(), set()
    for path in files_of(room):
        for name in imported_names(path):
            first, second, *_ = *name.split("."), ""
            if first == "axolotl_reft":
                found_rooms.add(second)
            elif first not in sys.stdlib_module_names:
                found_packages.add(first)
    assert found_rooms - {room} <= set(rooms)
    assert found_packages <= set(packages)


def test_what_serving_computes_needs_no_vllm():
    importing = {
        path.name
        for path in files_of("serving")
        for name in imported_names(path)
        if name.split(".")[0] == "vllm"
    }
    assert importing == {
        "__init__.py", "frontend.py", "wrapped_engine.py", "wrapped_worker.py"
    }  # fmt: skip


def test_every_file_is_in_a_room():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room == "__init__" or room in ROOMS


def test_a_name_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(AttributeError, match="'LoReftPlugin'. Did you mean 'LoreftPl"):
        axolotl_reft.LoReftPlugin  # noqa: B018
    assert not hasattr(axolotl_reft, "__wrapped__")
