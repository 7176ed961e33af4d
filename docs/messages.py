"""Writes docs/messages.md: every error message, as the source code has it.

    python docs/messages.py

Values that a message is given are shown as …; reasons that are kept in tables in the
code are listed under the setting they are for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "axolotl_reft"
PAGE = ROOT / "docs" / "messages.md"

# Title, what such messages have in common, and the modules they are in.
SECTIONS = [
    (
        "The `loreft:` block",
        "A setting of the adapter is unknown, out of range, or without effect. Nothing "
        "was loaded yet; change the block and start again.",
        "plugin/args config positions turns components trained_modules lora rotation "
        "interventions",
    ),
    (
        "Settings beside the block",
        "Another setting of the config contradicts the adapter: it would do nothing, "
        "or something that is not saved with it, or leave no prompt to edit. Nothing "
        "was loaded yet.",
        "plugin/checks plugin/preference_checks plugin/parallel plugin/plugin",
    ),
    (
        "Quantised bases",
        "The base would not be quantised as the config asks, or could not be trained "
        "through.",
        "plugin/quantised input_gradients",
    ),
    (
        "Commands",
        "An axolotl command cannot serve an adapter that edits hidden states, or its "
        "options are not complete. Nothing was written.",
        "plugin/running plugin/commands plugin/evaluation lm_eval inspect_command "
        "inspection inspection_page probe",
    ),
    (
        "Installation",
        "A package is missing that axolotl's own pins keep pip from installing.",
        "pyreft_install",
    ),
    (
        "Reading an adapter",
        "A directory holds no adapter, one of another base model, or damaged files. "
        "Nothing is filled up with random numbers.",
        "adapter_directory adapter_numbers adapter_leaf config_file format_version",
    ),
    (
        "pyreft's format",
        "What `axolotl reft import` and `export` cannot carry over, since one format "
        "has no place for it or does not say it.",
        "pyreft_format pyreft_objects",
    ),
    (
        "Models and adapters in plain Python",
        "The model is of a kind that is not supported, or is asked for something that "
        "edits of hidden states cannot do.",
        "model layer adapter_rows chat_template labelled_logits",
    ),
    (
        "In a forward",
        "The batch or the cache does not say which tokens are the prompt. Nothing is "
        "guessed: an edit at other tokens than in training would be a silent mistake.",
        "prompts plugin/labels plugin/preference",
    ),
]


_TABLES = ("_REFUSED", "_BESIDE", "_SIZES", "_ENVIRONMENT", "_DEEPSPEED")


def messages(file: Path) -> Iterator[str]:
    """Those of a module, in their order there, and its tables of reasons."""
    tree = ast.parse(file.read_text())
    constants: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            name = getattr(node.targets[0], "id", "")
            if isinstance(node.value, ast.Dict) and name.startswith(_TABLES):
                yield from _reasons(node.value, constants)
            constants[name] = _text(node.value, constants)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            text = " ".join(_text(node.args[0], {}).split())
            is_error = getattr(node.func, "id", "").endswith("Error")
            if is_error and text.strip("…:; "):
                yield text


def _reasons(table: ast.Dict, constants: dict[str, str]) -> Iterator[str]:
    for key, value in zip(table.keys, table.values, strict=True):
        assert key is not None
        setting, reason = _text(key, {}), _text(value, constants)
        # A command's reasons are whole messages; its key is the module it is in.
        yield reason if setting.startswith("axolotl.") else f"{setting}: … {reason}"


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name):
        return constants.get(node.id, "…")
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp):
        return _text(node.value.body, constants)
    if isinstance(node, ast.BinOp):
        return _text(node.left, constants) + _text(node.right, constants)
    return "…"


def page() -> str:
    """The page's text.

    Raises:
        ValueError: a module has messages and is in no section.
    """
    placed = {f"{name}.py" for *_, names in SECTIONS for name in names.split()}
    lines = [
        "# Every error message",
        "",
        "Made from the source by `docs/messages.py`. A message says what was wrong, "
        "what was got, and what to write instead; … stands for the value it was given. "
        "[Troubleshooting](troubleshooting.md) has what they do not say themselves.",
    ]
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        if name not in placed | {"__init__.py"} and any(messages(file)):
            raise ValueError(f"{name} has messages; name it in SECTIONS")
    for title, meaning, names in SECTIONS:
        found = [
            message
            for name in names.split()
            for message in messages(SOURCE / f"{name}.py")
        ]
        lines += ["", f"## {title}", "", meaning, ""]
        lines += [f"- `{message}`" for message in dict.fromkeys(found)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
