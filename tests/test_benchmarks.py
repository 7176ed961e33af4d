"""The benchmarks run, at toy size; how long anything takes is not looked at."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import axolotl_reft
from axolotl_reft.tuner import frozen_base
from axolotl_reft.tuner.frozen_prompt import FrozenPrompt
from benchmarks import frozen_rule, harness, plot, steps, table, tasks
from benchmarks.__main__ import main
from benchmarks.base import Setting, build_base, packed, padded, rectangle, share
from benchmarks.contestants import CONTESTANTS
from benchmarks.harness import Result, Series, take_turns
from benchmarks.parts import PARTS
from benchmarks.running import run, workers
from benchmarks.steps import train
from benchmarks.suite import SUITE, with_before
from benchmarks.synchronisation import synchronisation
from benchmarks.worker import RemoteBench

TOY = SUITE["step-by-size"].sizes["toy"][0]
TOGETHER = [name for name, benchmark in SUITE.items() if not benchmark.fresh]


def check(result):
    """What is promised of every JSON."""
    assert result.versions["here"]["torch"] == torch.__version__
    assert result.hardware["cores"] >= 1 and result.date
    assert result.series
    for series in result.series:
        assert not series.failures
        assert result.floor in series.values
        assert all(values for values in series.values.values())


def needs_a_compiler(name):
    missing = "compiled" in name and shutil.which("g++") is None
    why = "torch.compile makes C++ for a CPU"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=why))


@pytest.mark.parametrize("name", [needs_a_compiler(name) for name in TOGETHER])
def test_each_benchmark_of_a_model_runs(tmp_path, name):
    result = run(name, SUITE[name], "toy", report=lambda line: None)
    check(result)
    repetitions = SUITE[name].repetitions["toy"]
    for series in result.series:
        assert {len(values) for values in series.values.values()} == {repetitions}
        assert Setting.read(series.setting) == SUITE[name].sizes["toy"][0]
    saved = json.loads(result.write(tmp_path).read_text())
    assert set(saved) == {
        "benchmark", "unit", "floor", "series", "versions", "hardware", "date",
    }  # fmt: skip
    assert harness.read(tmp_path / f"{name}.json") == result


@pytest.mark.parametrize("name", [name for name in PARTS if name != "start-up"])
def test_each_benchmark_of_a_part_runs(name):
    check(PARTS[name]("toy"))


def test_a_contestant_runs_in_a_process_of_its_own():
    bench = RemoteBench()
    # More than the tiny step before it has left for it.
    bench.build("peak_memory", "floor", TOY.but(hidden_size=256, length=400))
    assert bench.turn("floor") > 0
    assert bench.versions()["torch"] == torch.__version__
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        bench.turn("nobody")
    bench.close()


@pytest.fixture
def another_build(tmp_path):
    """A source directory whose LoreftConfig says that it is not today's, and whose
    rank is another."""
    package = tmp_path / "axolotl_reft"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\n"
        "sys.modules.pop('axolotl_reft')\n"
        "here = sys.path.pop(sys.path.index(%r))\n"
        "import axolotl_reft as today\n"
        "made = today.LoreftConfig\n"
        "today.LoreftConfig = lambda **settings: made(**settings | {'rank': 1})\n"
        "sys.modules['axolotl_reft'] = today\n" % str(tmp_path)
    )
    return tmp_path


def test_ours_of_another_build_takes_turns_with_todays(another_build):
    benchmark = with_before(SUITE["peak-memory"])
    assert benchmark.contestants[:3] == ("floor", "ours", "before")
    benchmark = replace(benchmark, contestants=("before", "ours"), task="trained")
    starts = workers(before=another_build)
    assert set(starts) == {"before", "ours"}
    for fresh in (True, False):
        result = run("trained", replace(benchmark, fresh=fresh), "toy", starts, print)
        check(result)
        (series,) = result.series
        # Untied, on two layers: a rank of 1 in the place of 2.
        assert series.ratios("ours", "before") == [2.0] * len(series.values["ours"])


def test_another_build_is_where_one_says():
    with pytest.raises(ValueError, match="benchmarks holds no axolotl_reft; name the "):
        RemoteBench(source=harness.RESULTS.parent)


def test_the_command_compares_builds(tmp_path, capsys):
    source = str(Path(axolotl_reft.__file__).parents[1])
    arguments = ["--size", "toy", "--before", source, "--results", str(tmp_path)]
    main(["prefill", "build", *arguments])
    for name in ("prefill", "build"):
        (series,) = harness.read(tmp_path / f"{name}.json").series
        assert {"ours", "before"} <= set(series.values) and not series.failures
    said = capsys.readouterr().out
    assert "prefill hidden_size=64 layers=2 batch=2 length=40: ours/before " in said
    assert "build hidden_size=64 layers=2" in said
    main(["prefill", *arguments, "--contestants", "before,ours"])
    result = harness.read(tmp_path / "prefill.json")
    assert result.floor == "before" and set(result.series[0].values) == {
        "before",
        "ours",
    }
    for wrong, why in (
        (["start-up", *arguments], "--before: start-up cannot run another build"),
        (
            ["decode", "--contestants", "us"],
            "--contestants: decode has no us, but base",
        ),
        (["build", "--contestants", "ours"], "build has no ours, but none to choose"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert why in capsys.readouterr().err


def test_the_lines_that_compare_builds(results):
    result = harness.read(results / "one.json")
    assert harness.before_and_after(result) == []
    setting = {"hidden_size": 8, "layers": 2, "batch": 1, "length": 4}
    values = {"before": [1.0, 2.0, 4.0, 8.0, 1.0], "ours": [2.0, 1.0, 4.0, 8.0, 0.5]}
    result.series = [Series(setting, values)]
    assert harness.before_and_after(result) == [
        "one hidden_size=8 layers=2 batch=1 length=4: ours/before 1.000, half of 5 "
        "rounds in 0.500 to 1.000; median 2 -> 2 s"
    ]


def test_the_time_of_a_first_adapter_has_its_import_in_it():
    with pytest.raises(RuntimeError, match="imported before the time began"):
        tasks.first_adapter("ours", build_base(TOY), TOY)
    bench = RemoteBench()
    bench.build("first_adapter", "ours", TOY)
    first, second = bench.turn("ours"), bench.turn("ours")
    bench.close()
    assert first > second > 0


def test_what_a_contestant_says_when_it_fails_is_kept():
    benchmark = replace(SUITE["step-by-size"], contestants=("floor", "nobody"))
    result = run("step", benchmark, "toy", report=lambda line: None)
    assert result.series[0].failures == {"nobody": "KeyError: 'nobody'"}
    assert len(result.series[0].values["floor"]) == 2


def test_the_mode_for_gpus_runs_in_its_dtype():
    result = run(
        "step",
        replace(SUITE["step-by-size"], contestants=("floor", "ours", "lora")),
        "toy",
        report=lambda line: None,
        dtype="bfloat16",
    )
    check(result)


def test_no_step_waits_for_the_device():
    """Full rows and packed ones; the first batch, which is looked at, has gone by."""
    check(synchronisation("toy"))


def test_choices_are_scored_by_whole_rows_or_on_a_cache(monkeypatch):
    from axolotl_reft.lm_eval import LoreftLM

    shapes, forward = [], LoreftLM._forward

    def noted(lm, **inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(lm, **inputs)

    monkeypatch.setattr(LoreftLM, "_forward", noted)
    (toy,) = SUITE["multiple-choice"].sizes["toy"]
    for name in ("whole-rows", "ours"):
        tasks.TASKS["multiple_choice"](name, build_base(toy), toy)()
    assert shapes == [(2, 110), (1, 100), (2, 10)]


def test_contestants_take_turns_and_not_always_after_the_same_one():
    order = []
    turns = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    values = take_turns(turns, 9, warm_up=1)
    rounds = [order[start : start + 3] for start in range(0, 30, 3)]
    assert len(order) == 30 and all(sorted(one) == [*"abc"] for one in rounds)
    assert values == {name: [1.0] * 9 for name in "abc"}
    before = set(zip(order, order[1:], strict=False))
    assert before >= {(one, other) for one in "abc" for other in "abc" if one != other}


def test_contestants_start_from_the_same_loss_but_for_their_edits():
    """The floor computes what the base does, and LoRA starts there."""
    base = build_base(TOY)
    losses = {}
    for name in ("floor", "lora", "ours", "pyreft"):
        torch.manual_seed(0)
        contestant = CONTESTANTS[name](share(base), TOY)
        losses[name] = contestant.loss(rectangle(TOY)).item()
        assert all(p.requires_grad for p in contestant.trained)
        assert bool(contestant.trained) == (name != "floor")
    assert losses["floor"] == losses["lora"]
    assert losses["ours"] != losses["floor"] != losses["pyreft"]


def test_fewer_logits_have_the_loss_of_all():
    base = build_base(TOY)
    losses, seen = [], []
    for name in ("ours", "labelled"):
        torch.manual_seed(0)
        contestant = CONTESTANTS[name](share(base), TOY)
        contestant.model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: seen.append(args[0].shape[1])
        )
        losses.append(contestant.loss(contestant.collate(rectangle(TOY))))
    torch.testing.assert_close(*losses)
    assert seen == [40, 24]


@pytest.fixture
def embedded(monkeypatch):
    """The shapes of ids that models embed."""
    shapes, forward = [], torch.nn.Embedding.forward

    def noted(self, ids):
        shapes.append(tuple(ids.shape))
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", noted)
    # A base is compared with itself once, ahead of the turns that count.
    monkeypatch.setattr(FrozenPrompt, "_check_base", lambda *_: "")
    return shapes


LAST = TOY.but(first=0, last=3)
WHOLE, BEFORE, BEHIND = (2, 40), (2, 17), (2, 23)


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("ours", [WHOLE] * 2),
        ("labelled", [WHOLE] * 2),
        ("frozen", [BEFORE, BEHIND] * 2),
        ("kept", [BEFORE, BEHIND, BEHIND]),
    ],
)
def test_only_named_contestants_compute_in_two_parts(name, shapes, embedded):
    base, losses = build_base(LAST), []
    contestants = {}
    for each in ("labelled", name):
        torch.manual_seed(0)
        contestants[each] = CONTESTANTS[each](share(base), LAST)
    for contestant in contestants.values():
        embedded.clear()
        for _ in range(2):
            loss = contestant.loss(contestant.collate(rectangle(LAST)))
            losses.append(loss.item())
    assert embedded == shapes
    assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-5)


def test_a_shared_prompt_is_computed_once_where_it_is_kept(embedded):
    setting, base = LAST.but(shared=12), build_base(LAST)
    for name, second in (("labelled", [WHOLE]), ("kept", [(2, 5), BEHIND])):
        turn = steps.shared_prompt_step(name, base, setting)
        turn()
        embedded.clear()
        turn()
        assert embedded == second


def test_a_preference_step_computes_its_prompts_once(embedded):
    pair, base = LAST.but(batch=1), build_base(LAST)
    for name, shapes in (
        ("ours", [WHOLE, WHOLE]),
        ("frozen", [(1, 17), BEHIND, BEHIND]),
        ("kept", [BEHIND, BEHIND]),
    ):
        turn = steps.preference_step(name, base, pair)
        turn()
        embedded.clear()
        turn()
        assert embedded == shapes


def test_the_rule_is_tabulated_beside_what_was_measured(tmp_path, results, monkeypatch):
    monkeypatch.setattr(frozen_base, "_FLOPS_OF_A_PASS", {"cpu": 4e7})
    monkeypatch.setattr(frozen_base, "_SAVED", 0.1)
    settings = [TOY.but(hidden_size=1024, first=0, length=n) for n in (40, 400)]
    values = {"labelled": [1.0], "frozen": [0.5], "kept": [1.1]}
    result = harness.read(results / "one.json")
    result.benchmark = "frozen-prompt-rule"
    result.series = [Series(setting.asdict(), values) for setting in settings]
    result.write(tmp_path)
    assert frozen_rule.rule_table(tmp_path).splitlines()[2:] == [
        "| 1024 | 2×40 | 13 | 0.50 | two parts | 1.10 | two parts (!) |",
        "| 1024 | 2×400 | 13 | 0.50 | whole (!) | 1.10 | whole |",
    ]


def test_the_floor_goes_back_to_the_first_edited_layer_and_no_further():
    setting = replace(TOY, edited="last")
    reached = []
    base = build_base(setting)
    contestant = CONTESTANTS["floor"](base, setting)
    for number, layer in enumerate(base.model.layers):
        layer.mlp.down_proj.register_full_backward_hook(
            lambda *args, number=number: reached.append(number)
        )
    train(contestant, None, [rectangle(setting)])
    assert reached == []
    contestant = CONTESTANTS["floor"](share(build_base(TOY)), TOY)
    for number, layer in enumerate(contestant.model.model.layers):
        layer.mlp.down_proj.register_full_backward_hook(
            lambda *args, number=number: reached.append(number)
        )
    train(contestant, None, [rectangle(TOY)])
    assert reached == [1]


def test_the_floor_in_a_graph_is_the_floor():
    base, found = build_base(TOY), []
    for name in ("floor", "floor-in-a-graph"):
        contestant, reached = CONTESTANTS[name](share(base), TOY), []
        assert not contestant.trained
        for layer in contestant.model.model.layers:
            layer.mlp.down_proj.register_full_backward_hook(
                lambda module, given, taken, reached=reached: reached.append(taken[0])
            )
        loss = contestant.loss(rectangle(TOY))
        loss.backward()
        assert len(reached) == 1
        found.append([loss, *reached])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_floor_in_a_graph_adds_nothing_up_from_step_to_step():
    contestant, leaves = CONTESTANTS["floor-in-a-graph"](build_base(TOY), TOY), []
    contestant.model.model.layers[0].register_forward_hook(
        lambda module, args, output: leaves.append(
            output.grad_fn.next_functions[1][0].variable
        )
    )
    gradients = []
    for _ in range(2):
        contestant.loss(rectangle(TOY)).backward()
        gradients.append(leaves[-1].grad.clone())
    assert leaves[0] is leaves[1] and gradients[0].any()
    assert torch.equal(*gradients)


def test_a_call_of_a_kernel_is_told_from_what_is_around_it():
    code = """
        def triton_poi_fused_add_1(in_ptr0, xnumel, XBLOCK : tl.constexpr):
        buf2 = empty_strided_cpu((4, 65), (65, 1), torch.int64)
        cpp_fused_add_0(buf2, buf0)
        triton_poi_fused_add_1.run(buf2, 512, stream=stream0)
        # Source Nodes: [linear], Original ATen: [aten.mm]
        extern_kernels.mm(reinterpret_tensor(buf7, (256, 64)), buf1, out=buf8)
        buf4 = torch.ops.aten.cumsum.default(buf3, dim=-1)
        assert_alignment(buf5, 16, 'torch.ops.aten.cumsum.default')
    """
    calls = [call.split()[-1] for call in tasks._KERNEL_CALL.findall(code)]
    assert calls == [
        "cpp_fused_add_0(",
        "triton_poi_fused_add_1.run(",
        "extern_kernels.mm(",
        "torch.ops.aten.cumsum.default(",
    ]


def test_steps_in_a_row_are_several_and_the_time_is_of_one(monkeypatch):
    trained, ticks = [], iter([10.0, 18.0])
    monkeypatch.setattr(
        steps, "train", lambda contestant, optimizer, batches: trained.extend(batches)
    )
    monkeypatch.setattr(steps, "clock", lambda setting: lambda: next(ticks))
    turn = steps.steps_in_a_row("floor", build_base(TOY), TOY)
    assert (turn(), len(trained)) == (2, 4)


def test_packed_and_padded_rows_hold_the_same_samples():
    setting = replace(TOY, samples=9, length=64)
    useful = [
        sum(batch.useful_tokens for batch in batches)
        for batches in (packed(setting), padded(setting))
    ]
    assert useful[0] == useful[1]
    for batches in (packed(setting), padded(setting)):
        for batch in batches:
            trained = (batch.inputs["labels"] != -100).sum().item()
            assert trained == batch.useful_tokens - sum(batch.prompts)
    assert all(b.inputs["input_ids"].shape[1] <= 64 for b in packed(setting))


@pytest.fixture
def results(tmp_path):
    series = [
        Series({"hidden_size": d}, {"floor": [1.0, 2.0], "ours": [1.5, 2.0]})
        for d in (64, 128)
    ]
    series[1].failures["pyreft"] = "MemoryError: no | room"
    here = {"here": harness.versions()}
    for name in ("one", "two"):
        Result(
            name, "s", "floor", series, here, harness.hardware(), harness.now()
        ).write(tmp_path)
    return tmp_path


def test_the_table_is_made_of_the_json(results):
    text = table.write(results).read_text()
    assert "## one" in text and "## two" in text
    assert "| 64 | ours | 1.75 | 1 / 1.25 / 1.5 | 2 |" in text
    assert "| 128 | pyreft | failed | MemoryError: no / room | 0 |" in text


def test_the_plots_are_made_of_the_json(results):
    paths = plot.write(results)
    assert [path.name for path in paths] == ["one.png", "two.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def drawn(settings, path, monkeypatch):
    """The axes of a plot of these settings."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    values = {"floor": [1.0, 2.0], "ours": [1.5, 2.0], "lora": [2.0, 4.0]}
    series = [Series(setting, values) for setting in settings]
    result = Result("one", "s", "floor", series, {}, {"gpu": None}, "")
    assert plot.plot(result, path / "one.png")
    (axes,) = figures[0].axes
    return axes


def test_what_varies_alone_is_an_axis(tmp_path, monkeypatch):
    settings = [{"hidden_size": d, "layers": 4096 // d} for d in (64, 512, 128)]
    axes = drawn(settings, tmp_path, monkeypatch)
    assert axes.get_xlabel() == "hidden size d"
    (lora, ours, _) = axes.lines
    assert list(lora.get_xdata()) == [64, 128, 512] == list(ours.get_xdata())
    assert (lora.get_ydata()[0], ours.get_ydata()[0]) == (2, 1.25)


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ([{"length": 8}, {"hidden_size": 128}], "d=128\n2×4"),
        (
            [{"length": 8, "prompt": 3}, {"batch": 5, "length": 8}],
            "d=64\n5×8\nprompt 1",
        ),
        ([{"rank": 4}, {"hidden_size": 128}], "d=128\n2×4\nrank 2"),
        ([{"hidden_size": 128, "length": 8}], "d=128\n2×8"),
    ],
    ids=str,
)
def test_what_varies_together_is_side_by_side(changes, last, tmp_path, monkeypatch):
    usual = {"hidden_size": 64, "batch": 2, "length": 4, "prompt": 1, "rank": 2}
    settings = [usual, *(usual | change for change in changes)]
    axes = drawn(settings, tmp_path, monkeypatch)
    assert axes.get_xticklabels()[-1].get_text() == last
    (lora, ours, _) = axes.lines
    for line, ratio in ((lora, 2), (ours, 1.25)):
        assert line.get_linestyle() == "None"
        assert list(line.get_ydata()) == [ratio] * len(settings)
        assert [round(x) for x in line.get_xdata()] == [*range(len(settings))]
    assert lora.get_xdata()[0] < ours.get_xdata()[0]


def test_the_command_runs_and_tabulates(tmp_path, capsys):
    main(["prefill", "table", "--size", "toy", "--results", str(tmp_path)])
    assert "## prefill" in (tmp_path / "results.md").read_text()
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no benchmark is called speed" in capsys.readouterr().err
