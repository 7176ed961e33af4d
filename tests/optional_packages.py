"""Optional packages that a test module imports, read from its source."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).parent
# By what is imported at the top of a module, the package that this needs.
_PACKAGES = {
    "axolotl_reft.plugin": "axolotl",
    "axolotl_reft.exchange": "pyreft",
    "axolotl_reft.from_pyreft": "pyreft",
    "axolotl_reft.to_pyreft": "pyreft",
    "axolotl_reft.inspect": "rich",
    "axolotl_reft.lm_eval": "lm_eval",
    "axolotl_reft.serving.frontend": "vllm",
    "axolotl_reft.serving.patches": "vllm",
    "axolotl_reft.serving.wrapped_engine": "vllm",
    "axolotl_reft.serving.wrapped_worker": "vllm",
    **{
        name: name
        for name in (
            "axolotl", "bitsandbytes", "datasets", "liger_kernel", "lm_eval",
            "matplotlib", "openai", "pyreft", "rich", "triton", "trl", "vllm",
        )
    },
}  # fmt: skip
_FOLDERS = {"plugin": "axolotl", "exchange": "pyreft"}


@cache
def needed(path: Path) -> frozenset[str]:
    """Return the optional packages that a test module needs, also through helpers."""
    packages = {_FOLDERS[path.parent.name]} if path.parent.name in _FOLDERS else set()
    for name in _imported(ast.parse(path.read_text())):
        helper = TESTS / f"{name.split('.')[0]}.py"
        if helper.exists() and helper.stem != "conftest":
            packages |= needed(helper)
        packages |= {
            package
            for prefix, package in _PACKAGES.items()
            if f"{name}.".startswith(f"{prefix}.")
        }
    return frozenset(packages)


@cache
def missing(path: Path) -> frozenset[str]:
    """Return those of :func:`needed` that are not installed."""
    return frozenset(name for name in needed(path) if find_spec(name) is None)


def _imported(module: ast.Module) -> set[str]:
    names = set()
    for node in module.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names
