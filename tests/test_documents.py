"""What the documents show works: every YAML block of theirs is validated.

A block without a base model is part of a config and stands in the place of the README's
first one's keys. A block that begins with ``# refused`` shows what is refused.
"""

import re
import runpy
import shutil
from collections import Counter

import pytest
import yaml
from documents import ROOT, dropped, validated

from axolotl_reft.exchange.objects import INSTALL_COMMAND
from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.plugin.sweep_file import read_sweep

README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
REFUSED = "# refused"


def yaml_blocks(text):
    """The fenced ones, at any indentation."""
    found = re.findall(r"(?ms)^( *)```ya?ml[^\n]*\n(.*?)^\1```", text)
    return [re.sub(f"(?m)^{indent}", "", block) for indent, block in found]


FIRST = yaml_blocks(README)[0]
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(yaml_blocks(path.read_text()))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_documents_yaml(block, tmp_path):
    settings = yaml.safe_load(block)
    if any(key.startswith("loreft.") for key in settings):
        for run in swept(block, tmp_path):
            assert list(dropped(run.config, validated(run.config))) == []
        return
    if "base_model" not in settings:
        settings = yaml.safe_load(FIRST) | settings
    if block.startswith(REFUSED):
        with pytest.raises(ValueError):
            validated(settings)
        return
    assert list(dropped(settings, validated(settings))) == []


def swept(block, directory):
    """The runs of a file of settings to try."""
    config, sweep = directory / "config.yml", directory / "sweep.yml"
    config.write_text(FIRST)
    sweep.write_text(block)
    return read_sweep(str(config), str(sweep))


def test_blocks_are_found_whole():
    text = 'a\n```yaml\nx: 1\n```\n- b\n  ```yaml title="y"\n  y:\n    z: 2\n  ```\n'
    assert yaml_blocks(text) == ["x: 1\n", "y:\n  z: 2\n"]


def test_the_first_config_is_short():
    assert len(FIRST.splitlines()) == 12


def test_the_install_command_is_one_everywhere():
    assert INSTALL_COMMAND in README
    assert (
        INSTALL_COMMAND.removeprefix("pip ").split("==")[1]
        in (ROOT / "Makefile").read_text()
    )


def test_the_table_of_settings_is_the_blocks():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", README, re.MULTILINE)
    defaults = LoreftBlock().model_dump()
    assert {key: yaml.safe_load(value) for key, value in rows} == defaults


TESTS = re.compile(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`")


@pytest.mark.parametrize("page", ["support.md", "commands.md"])
def test_every_row_of_the_support_tables_has_a_test(page):
    text = (ROOT / "docs" / page).read_text()
    rows = [
        line
        for line in re.findall(r"^\| .*", text, re.MULTILINE)
        if not re.match(r"\| (what|command) \|", line)
    ]
    assert rows
    for row in rows:
        named = TESTS.findall(row)
        assert named, row
        for file, test in named:
            source = (ROOT / "tests" / file).read_text()
            assert f"def {test}(" in source, f"{file}::{test}"


REPOSITORY = "https://github.com/axolotl-reft/axolotl-reft/"
LINK = re.compile(r"(?:\]\(\s*|^\[[^]]+\]: )([^)\s#]+)", re.MULTILINE)


def test_every_patch_of_another_library_is_listed():
    page = (ROOT / "docs" / "how-it-works.md").read_text().split("## Patches")[1]
    listed = Counter(re.findall(r"^\| `([\w/]+\.py)` \|", page, re.MULTILINE))
    package = ROOT / "src" / "axolotl_reft"
    marked = {
        path.relative_to(package).as_posix(): path.read_text().count("# Patch:")
        for path in package.rglob("*.py")
    }
    assert listed == Counter({path: n for path, n in marked.items() if n})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    """Relative links, within the site in its pages, and absolute links to our files."""
    inside = ROOT / "docs" if path.is_relative_to(ROOT / "docs") else ROOT
    for target in LINK.findall(path.read_text()):
        if target.startswith(REPOSITORY):
            kind, branch, name = target.removeprefix(REPOSITORY).split("/", 2)
            # Pictures, as they are.
            assert kind == ("raw" if name.endswith(".png") else "blob"), target
            assert branch == "main", target
            assert (ROOT / name).is_file(), target
        elif ":" not in target:
            file = (path.parent / target).resolve()
            assert file.exists() and file.is_relative_to(inside), target


def test_links_of_the_readme_work_on_the_package_index():
    """A relative link has no file there."""
    targets = LINK.findall(README)
    assert f"{REPOSITORY}blob/main/docs/getting-started.md" in targets
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_figures_are_drawn_anew(tmp_path):
    """By a copy of the script, which draws beside itself."""
    figures = ROOT / "docs" / "figures"
    script = shutil.copy(figures / "positions.py", tmp_path)
    runpy.run_path(script, run_name="__main__")
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in figures.glob("*.png")}
