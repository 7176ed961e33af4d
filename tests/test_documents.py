"""What the documents show works: every YAML in them and in examples/ is validated."""

import re
from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from axolotl_reft.plugin.args import LoreftBlock
from axolotl_reft.pyreft_install import INSTALL_COMMAND

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").rglob("*.yml"))


def validated(text):
    cfg = DictDefault(yaml.safe_load(text))
    prepare_plugins(cfg)
    return validate_config(cfg)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_readmes_yaml(block):
    """Whole configs, and parts that stand in the first one's place."""
    settings = yaml.safe_load(BLOCKS[0]) | yaml.safe_load(block)
    assert validated(yaml.safe_dump(settings)).adapter == "loreft"


def test_the_first_config_is_short():
    assert len(BLOCKS[0].splitlines()) == 12


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_examples_yaml(path):
    text = path.read_text()
    assert validated(text).adapter == "loreft"
    header = text.split("\n\n")[0]
    assert f"axolotl train {path.relative_to(ROOT).as_posix()}" in header


def test_there_is_something_to_test():
    assert BLOCKS and EXAMPLES


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


TESTS = re.compile(r"`((?:plugin/)?test_\w+\.py)::(test_\w+)`")


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
