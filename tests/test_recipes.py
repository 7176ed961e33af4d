"""Every recipe in examples/ is valid, loses no key in axolotl, and is as counted."""

import re
from pathlib import Path

import pytest
import yaml
from documents import ROOT, dropped, validated
from shapes import build_on_meta, count_parameters, weight_bytes

from axolotl_reft.plugin.sweep_file import read_sweep

SWEEP = ROOT / "examples" / "real" / "sweep.yml"
# Not sweeps, nor what was written for a run.
RECIPES = sorted(
    path
    for path in (ROOT / "examples").rglob("*.yml")
    if "out" not in path.parts and "base_model" in yaml.safe_load(path.read_text())
)
TABLE = (ROOT / "examples" / "README.md").read_text()
ROWS = {
    cells[0]: cells
    for line in TABLE.splitlines()
    if (match := re.match(r"\| \[(\S+\.yml)\]\(\1\) \|(.*)\|$", line))
    for cells in [[match[1], *(cell.strip() for cell in match[2].split("|"))]]
}


@pytest.fixture(params=RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def recipe(request) -> Path:
    return request.param


def header_of(path: Path) -> str:
    """The comment before the first key, in one line."""
    lines = path.read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    return " ".join(line.removeprefix("#").strip() for line in lines)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "examples").as_posix()


def adapter_of(settings: dict) -> str:
    """The table's words for an adapter."""
    if settings["adapter"] == "lora":
        return f"LoRA r {settings['lora_r']}, all linear layers"
    block = settings["loreft"]
    two_sided = "+" in block["positions"]
    words = [
        block.get("intervention", "loreft"),
        f"rank {block['rank']}",
        f"layers {', '.join(map(str, block['layers']))}"
        if isinstance(block["layers"], list)
        else "all layers",
        "every token" if block["positions"] == "all" else block["positions"],
    ]
    if two_sided and not block["tied_weights"]:
        words.append("untied")
    if lora := block.get("lora"):
        words.append(f"LoRA r {lora['r']}")
    return ", ".join(words)


def test_axolotl_takes_it_and_drops_nothing_of_it(recipe):
    given = yaml.safe_load(recipe.read_text())
    cfg = validated(given)
    assert cfg.adapter == given["adapter"]
    assert list(dropped(given, cfg)) == []


def test_what_axolotl_would_drop_is_found():
    given = yaml.safe_load(RECIPES[0].read_text())
    assert "learning_rate" in given
    source = given["datasets"][0]
    changed = given | {"learning_rat": 1, "datasets": [source | {"fild": "text"}]}
    found = list(dropped(changed, validated(changed)))
    assert found == ["datasets.0.fild", "learning_rat"]


def test_its_header_says_what_on_what_and_how(recipe):
    header = header_of(recipe)
    assert f"axolotl train {recipe.relative_to(ROOT).as_posix()}" in header
    for part in ("What: ", "Hardware: ", "Run, from the root"):
        assert part in header


def test_every_setting_of_the_adapter_has_its_trade_off_beside_it(recipe):
    lines = recipe.read_text().splitlines()
    (start,) = (
        n for n, line in enumerate(lines) if line in ("loreft:", "adapter: lora")
    )
    for before, line in zip(lines[start:], lines[start + 1 :], strict=False):
        if not line.strip():
            break
        if not line.strip().startswith(("#", "lora:")):
            assert before.strip().startswith("#"), line


def test_its_numbers_are_those_of_a_model_of_its_shape(recipe):
    settings = yaml.safe_load(recipe.read_text())
    reward = bool(settings.get("reward_model"))
    base = build_on_meta(settings["base_model"], reward)
    size = weight_bytes(base, bool(settings.get("load_in_4bit"))) / 1e9
    count, total = count_parameters(base, reward, settings)
    header = header_of(recipe)
    share = f"{100 * count / total:.4f} % of the base"
    assert f"Trainable parameters: {count:,}, {share}" in header
    row = ROWS[name_of(recipe)]
    assert row[4] == f"{count:,}"
    if settings["base_model"].startswith("examples/"):
        return
    assert f"weights of the base {size:.1f} GB" in header
    assert f"{size:.1f} GB" in row[5]


def test_its_row_in_the_table_is_its_settings(recipe):
    settings = yaml.safe_load(recipe.read_text())
    _, base, data, adapter, _, _ = ROWS[name_of(recipe)]
    folder = f"{recipe.parent.relative_to(ROOT).as_posix()}/"
    assert base == settings["base_model"].removeprefix(folder)
    path = settings["datasets"][0]["path"].removeprefix(folder)
    assert data == (Path(path).name if path.startswith("https:") else path)
    assert adapter == adapter_of(settings)


def test_the_table_has_no_other_rows():
    assert sorted(ROWS) == [name_of(path) for path in RECIPES]


def test_each_run_of_the_sweep_is_valid():
    runs = read_sweep(str(SWEEP.parent / "smollm2-loreft.yml"), str(SWEEP))
    assert len({run.directory for run in runs}) == len(runs) == 12
    assert {run.config["loreft"]["positions"] for run in runs} == {"l1", "l7", "f7+l7"}
    for run in runs:
        assert list(dropped(run.config, validated(run.config))) == []
    command = "axolotl reft sweep examples/real/smollm2-loreft.yml examples/real/sweep"
    assert command in header_of(SWEEP)
    assert command in (ROOT / "docs" / "choosing.md").read_text()
