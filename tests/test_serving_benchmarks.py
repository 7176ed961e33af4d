"""Benchmarks of serving (benchmarks/serving/), without vLLM."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.harness import Result, Series, middle_half
from benchmarks.serving import speed
from benchmarks.serving.__main__ import report
from benchmarks.serving.engine import TARGETS, Times
from benchmarks.serving.memory import memory
from benchmarks.serving.models import LOREFT, TOY, adapters, base
from benchmarks.serving.speed import (
    CONTESTANTS,
    PAIRS,
    PREFIX_CONTESTANTS,
    PREFIX_PAIRS,
)

SIZES = {"batch": 2, "length": 5, "steps": 3, "prefix": 7}


class Engine:
    """Takes a turn's number for its time, and keeps what it was given."""

    def __init__(
        self, base, targets, directories, compiled, clock, prefix_caching=False
    ):
        self.targets, self.compiled, self.clock = targets, compiled, clock
        self.prefix_caching, self.given, self.count = prefix_caching, [], 0
        self.made.append(self)

    def prompts(self, count, length):
        self.count += 1
        return [[self.count] * length] * count

    def turn(self, prompts, steps, adapter):
        self.given.append((prompts, steps, adapter))
        number = len(self.given)
        return Times(float(number), number / 2, number)


@pytest.fixture
def engines(monkeypatch, tmp_path):
    """The engines that a measurement made."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2})
    )
    Engine.made = []
    monkeypatch.setattr(speed, "Engine", Engine)
    monkeypatch.setattr(speed, "base", lambda name: tmp_path)
    monkeypatch.setattr(speed, "adapters", lambda base: {})
    return Engine.made


def test_every_contestant_has_its_turn_in_its_engine(engines):
    found = speed.speed("tiny", "compiled", SIZES, 3, "cpu")
    assert all(engine.compiled and engine.clock == "cpu" for engine in engines)
    *of_latency, of_prefix = engines
    assert [engine.targets for engine in of_latency] == list(TARGETS)
    for engine in of_latency:
        adapters = [adapter for _, _, adapter in engine.given]
        own = [a for targets, a in CONTESTANTS.values() if targets == engine.targets]
        assert sorted(map(str, adapters)) == sorted(4 * [str(a) for a in own])
        prompts = [prompts for prompts, _, _ in engine.given]
        assert all(prompts.count(sent) == 1 for sent in prompts)
        assert {(len(p), len(p[0]), steps) for p, steps, _ in engine.given} == {
            (2, 5, 3)
        }
    assert of_prefix.prefix_caching and not of_latency[0].prefix_caching
    for name in ("serving-prefill", "serving-decode"):
        series = found[name]
        assert {len(values) for values in series.values.values()} == {3}
        assert series.setting["mode"] == "compiled" and series.setting["layers"] == 2
    prefill, decode = found["serving-prefill"].values, found["serving-decode"].values
    assert decode == {name: [v / 2 for v in of] for name, of in prefill.items()}


def test_the_last_request_for_a_prompt_is_timed(engines):
    series = speed.speed("tiny", "eager", SIZES, rounds=2)["serving-first-token"]
    given = engines[-1].given
    for name, sequence in PREFIX_CONTESTANTS.items():
        for time in series.values[name]:
            turns = given[int(time) - len(sequence) : int(time)]
            assert tuple(adapter for _, _, adapter in turns) == sequence
            (prompts,) = {str(prompts) for prompts, _, _ in turns}
            assert [p for p, _, _ in given].count(json.loads(prompts)) == len(sequence)
        assert series.setting["cached"][name] == min(series.values[name])


def test_those_that_are_compared_are_measured():
    assert {name for pair in PAIRS for name in pair} == set(CONTESTANTS)
    assert {name for pair in PREFIX_PAIRS for name in pair} == set(PREFIX_CONTESTANTS)
    measured = {adapter for _, adapter in CONTESTANTS.values()}
    measured |= {adapter for turns in PREFIX_CONTESTANTS.values() for adapter in turns}
    assert measured - {None} == {*LOREFT, "LoRA"}


def test_the_report_has_ratios_and_the_half_of_them_in_the_middle():
    values = {"base": [1.0, 2.0, 4.0, 1.0, 2.0], "l7": [1.0, 1.0, 4.0, 3.0, 3.0]}
    series = Series({"model": "tiny", "mode": "eager"}, values)
    hardware = SimpleNamespace()
    result = Result("serving-first-token", "s", "base", [series], {}, hardware, "")
    assert "| tiny | eager | l7 | 3 |  |  |" in report(result)
    result.series[0].values["base after l7"] = result.series[0].values.pop("l7")
    line = "| tiny | eager | base after l7 | 3 | base | 1.000 (1.000 to 1.500) |"
    assert line in report(result)
    assert middle_half([9, 1, 2, 3, 0]) == (2, 1, 3)


def test_memory_is_that_of_the_tensors():
    held, seconds = memory(TOY, 3)
    edits, width, layers, rank = 2, TOY.hidden_size, TOY.layers, TOY.rank
    of_an_adapter = 4 * layers * edits * rank * (2 * width + 1)
    assert held.values["loaded adapters"] == [3 * of_an_adapter]
    # Rows and their edits, where each edit's begin, and their strengths.
    rows = 8 * (2 * 8192 + 2 * 3 + 1) + 4 * (8192 + 1)
    assert held.values["slots"] == [3 * of_an_adapter + rows]
    assert {len(values) for values in seconds.values.values()} == {3}


def test_bases_and_adapters_are_built_once(tmp_path):
    directory = base("toy", tmp_path)
    found = adapters(directory, tmp_path)
    written = (found["LoRA"] / "adapter_config.json").stat().st_mtime_ns
    assert base(str(directory), tmp_path) == base("toy", tmp_path) == directory
    assert adapters(directory, tmp_path) == found
    assert (found["LoRA"] / "adapter_config.json").stat().st_mtime_ns == written
    for name, settings in LOREFT.items():
        config = json.loads((found[name] / "adapter_config.json").read_text())
        assert config["peft_type"] == "LOREFT" and config["rank"] == settings["rank"]
        assert config["base_model_name_or_path"] == str(directory)


def test_a_base_must_be_a_model():
    with pytest.raises(ValueError, match="'big' holds no config.json; name a model's "):
        base("big")
