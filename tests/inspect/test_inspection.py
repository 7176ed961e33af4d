"""``axolotl reft inspect``: facts from files, edits on prompts, tables and pictures."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from conftest import build_adapter, build_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from workspace import build_base, build_tokenizer

from axolotl_reft.inspect import probe as probing
from axolotl_reft.inspect.command import read_prompts
from axolotl_reft.inspect.facts import inspect_adapter, subspace_overlap
from axolotl_reft.inspect.plot import figure
from axolotl_reft.inspect.probe import load_model, probe, prompt_ids, resolve_base
from axolotl_reft.inspect.text import as_ranges, columns, summary
from axolotl_reft.inspect.tokens import runs, token_text
from axolotl_reft.plugin.commands import reft

PROMPT = "a b c d e f g h :"
LAYERS, HIDDEN, RANK = 3, 64, 4


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base and two adapters on it, the second with one intervention for both."""
    root = tmp_path_factory.mktemp("inspect")
    build_base(root / "base", layers=LAYERS)

    def save(name, seed, **settings):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        settings = {"positions": "f2+l3", "rank": RANK} | settings
        build_adapter(base, seed=seed, **settings).save_pretrained(root / name)
        return str(root / name)

    return SimpleNamespace(
        root=root,
        save=save,
        base=str(root / "base"),
        untied=save("untied", 1, tied_weights=False),
        tied=save("tied", 2),
    )


def load(facts):
    base_model, tokenizer = resolve_base(facts, None)
    return load_model(facts, base_model), tokenizer


def invoke(*arguments):
    return CliRunner().invoke(reft, ["inspect", *map(str, arguments)])


def test_facts_come_from_the_files_alone(places, monkeypatch):
    monkeypatch.setattr(probing, "load_model", None)
    facts = inspect_adapter(places.untied)
    assert facts.parameters == LAYERS * 2 * (2 * RANK * HIDDEN + RANK)
    assert [layer.layer for layer in facts.layers] == [0, 1, 2]
    assert facts.settings["positions"] == "f2+l3" and facts.size == HIDDEN
    for layer in facts.layers:
        assert layer.rank == RANK
        assert layer.parameters == facts.parameters / LAYERS
        assert set(layer.orthogonality_error) == {"prefix", "suffix"}
        assert max(layer.orthogonality_error.values()) < 1e-6
        assert 0 < layer.overlap < 0.5
        assert not layer.edit_size
    assert set(inspect_adapter(places.tied).layers[0].orthogonality_error) == {"both"}


def test_a_free_projection_is_far_from_orthonormal(places):
    directory = places.save("noreft", 3, intervention="noreft", positions="all")
    errors = [x.orthogonality_error["all"] for x in inspect_adapter(directory).layers]
    assert min(errors) > 0.1
    assert "W₂ error all" in invoke(directory).output


def test_ranks_and_layers_may_differ(places):
    directory = places.save("mixed", 3, layers=[0, 2], rank={"0": 1, "all": 3})
    facts = inspect_adapter(directory, places.tied)
    assert [(x.layer, x.rank) for x in facts.layers] == [(0, 1), (2, 3)]
    assert as_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_overlap_is_the_mean_squared_cosine():
    eye = torch.eye(6)
    assert subspace_overlap(eye[:, :2], eye[:, :3]) == 1
    assert subspace_overlap(eye[:, :2], eye[:, 2:]) == 0
    turned = torch.tensor([[0.5, 0, 0, 0, 0, 0.75**0.5]]).T
    assert subspace_overlap(eye[:, :1], turned) == pytest.approx(0.25)


def test_an_adapter_overlaps_itself_wholly(places):
    for layer in inspect_adapter(places.untied, places.untied).layers:
        assert layer.overlap_with == pytest.approx({"prefix": 1, "suffix": 1})
    for layer in inspect_adapter(places.untied, places.tied).layers:
        assert 0 < layer.overlap_with["suffix"] < 0.5


@torch.no_grad()
@pytest.mark.parametrize("adapter", ["untied", "tied"])
def test_the_size_of_an_edit_is_its_share_of_the_hidden_state(places, adapter):
    facts = inspect_adapter(getattr(places, adapter))
    model, tokenizer = load(facts)
    ids = prompt_ids(tokenizer, PROMPT, chat=False)
    probed = probe(model, tokenizer, ids)
    edited = [token.edited for token in probed.tokens]
    assert edited == ["prefix"] * 2 + [None] * 5 + ["suffix"] * 3
    assert torch.equal(
        probed.sizes_LT.isnan().any(0), torch.tensor([e is None for e in edited])
    )
    # The first layer's input does not depend on any edit.
    with model.disable_adapter():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    h_TD = states[1][0]
    layer = model.base_model.model.model.layers[0]
    for side, name in enumerate(("prefix", "suffix")):
        container = (layer.intv_0, layer.intv_1)[side if adapter == "untied" else 0]
        h_ND = h_TD[[at for at, e in enumerate(edited) if e == name]]
        change_ND = container["default"](h_ND) - h_ND
        expected = change_ND.norm(dim=1) / h_ND.norm(dim=1)
        got = probed.sizes_LT[0, [at for at, e in enumerate(edited) if e == name]]
        assert torch.allclose(got, expected, atol=1e-5)
    probing.add_sizes(facts, [probed])
    assert facts.layers[0].edit_size["suffix"] == pytest.approx(float(expected.mean()))


def test_every_token_of_positions_all_has_a_size(places):
    directory = places.save("all", 3, positions="all")
    facts = inspect_adapter(directory)
    model, tokenizer = load(facts)
    probed = probe(model, tokenizer, prompt_ids(tokenizer, PROMPT, chat=False))
    assert {token.edited for token in probed.tokens} == {"all"}
    assert not probed.sizes_LT.isnan().any()


def test_a_classifier_is_probed_with_its_head(places):
    base = AutoModelForSequenceClassification.from_pretrained(places.base, num_labels=5)
    directory = places.root / "classifier"
    build_adapter(base, task_type="SEQ_CLS", positions="f3").save_pretrained(directory)
    output = invoke(directory, "--prompt", PROMPT).output
    assert "also saved" in output and "« <s>· a· b» c d e" in output


def test_the_table_names_everything_and_marks_the_tokens(places):
    done = invoke(places.untied, "--prompt", PROMPT, "--with", places.tied)
    assert done.exit_code == 0, done.output
    for text in (
        "LOREFT, loreft",
        "0-2 (3 layers)",
        "f2+l3, one intervention each",
        "3,096",
        "R: its rows are orthonormal in every layer (max",
        "overlap prefix/suffix",
        "overlap with other, suffix",
        "edit suffix",
        "mean ‖Φ(h)−h‖/‖h‖ of the prompts' edited tokens",
        "prompt 1: 10 tokens, 5 edited",
        "« <s>· a» b c d e f‹ g· h· :›",
        "edited: «prefix» ‹suffix›, with · between two tokens",
    ):
        assert text in done.output
    assert "\x1b" not in done.output and "R error" not in done.output


def test_an_r_that_is_not_orthonormal_is_in_the_table_and_the_picture(places):
    facts = inspect_adapter(places.untied)
    titles = [panel.get_title() for panel in figure(facts, []).axes]
    assert facts.orthonormal < 1e-6 and len(titles) == 1
    assert titles[0].startswith("Overlap of the subspaces")
    facts.layers[1].orthogonality_error["prefix"] = 0.05
    assert facts.orthonormal is None
    assert "R error prefix" in columns(facts)
    _, panel = figure(facts, []).axes
    assert panel.get_title().startswith("Distance of R from orthonormal rows")


def test_an_adapter_of_one_layer(places):
    directory = places.save("one", 1, layers=[2], tied_weights=False)
    output = invoke(directory).output
    assert "2 (1 layer)" in output and "1 layers" not in output
    facts = inspect_adapter(directory)
    drawing = figure(facts, [])
    assert "1 layer," in drawing.get_suptitle()
    assert list(drawing.axes[0].get_xticks()) == [2]
    assert drawing.axes[0].get_xlim() == (1, 3)


def test_sizes_of_files(places):
    assert re.search(r"size +18\.5 kB", invoke(places.untied).output)
    facts = inspect_adapter(places.untied)
    facts.bytes = 2_500_000
    assert ("size", "2.5 MB") in summary(facts)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("several_times", [False, True])
def test_what_was_trained_whole_is_named_and_counted(tmp_path, tied, several_times):
    base = build_model(tie_word_embeddings=tied)
    names = ["embed_tokens", "lm_head"]
    model = build_adapter(base, rank=4, modules_to_save=list(names))
    model.save_pretrained(tmp_path)
    if several_times:  # as they were saved once
        file = tmp_path / "adapter_model.safetensors"
        numbers = load_file(file)
        for key in [key for key in numbers if "intv_" not in key]:
            stem = key.removesuffix("weight")
            numbers[f"{stem}modules_to_save.weight"] = numbers[key].clone()
            numbers[f"{stem}original_module.weight"] = numbers[key] + 1
        save_file(numbers, file, {"format": "pt"})
    facts = inspect_adapter(str(tmp_path))
    count = base.get_input_embeddings().weight.numel() * (1 if tied else 2)
    assert set(facts.trained_whole) == set(names) and not facts.also_saved
    assert facts.all_parameters == facts.parameters + count
    output = invoke(tmp_path).output
    assert f"embed_tokens, lm_head (trained whole): {count:,} parameters" in output
    assert f"{facts.parameters:,} of LoReFT, {facts.all_parameters:,} in all" in output
    assert ".weight" not in output


def test_what_was_saved_untrained_is_told_apart(tmp_path):
    model = build_adapter(build_model(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    facts = inspect_adapter(str(tmp_path))
    assert facts.also_saved == ["model.embed_tokens"]
    assert "model.embed_tokens (not trained)" in invoke(tmp_path).output


def test_a_prompt_without_the_chat_template_of_the_training_is_told_of(places):
    # As the tokenizer writes it: its words "d" and ":".
    marks = {"generation_prompts": [[7, 30]], "end_of_turn": [2]}
    directory = places.save("chat", 1, turn_markers=marks)
    told = "Add --chat"
    assert told in invoke(directory, "--prompt", "a b c").stderr
    assert told in invoke(directory, "--prompt", "a d :", "--prompt", "a").stderr
    assert told not in invoke(directory, "--prompt", "a d :").stderr
    assert told not in invoke(places.tied, "--prompt", "a b c").stderr


@pytest.mark.parametrize("options", [["--chat"], []])
def test_the_tokenizer_beside_the_adapter_comes_first(places, options):
    directory = places.save("own", 1)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "d : {{ messages[0]['content'] }}"
    # "a" and "b" have each other's number.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(state))
    tokenizer.save_pretrained(directory)
    assert (places.root / "own/chat_template.jinja").is_file()
    done = invoke(directory, "--prompt", "a a a a", *options)
    assert done.exit_code == 0, done.output
    assert ("« d· :»" if options else "« <s>· a»") in done.output
    base_model, own = resolve_base(inspect_adapter(directory), None)
    assert prompt_ids(own, "a", chat=False) == [1, words["a"]] == [1, 5]


def test_json_holds_the_same(places):
    done = invoke(places.untied, "--prompt", PROMPT, "--json")
    found = json.loads(done.stdout)
    assert found["parameters"] == 3096 and len(found["layers"]) == LAYERS
    tokens = found["prompts"][0]["tokens"]
    assert [token["edited"] for token in tokens[:3]] == ["prefix", "prefix", None]
    assert len(tokens[0]["edit_size"]) == LAYERS and tokens[2]["edit_size"] is None
    assert found["layers"][0]["edit_size"]["prefix"] > 0


def test_prompts_are_read_from_text_and_json(tmp_path):
    file = tmp_path / "prompts"
    file.write_text(
        'plain text\n\n{"prompt": "one\\ntwo"}\n"three"\n'
        '{"instruction": "4", "input": ""}'
    )
    prompts = ["plain text", "one\ntwo", "three", "4"]
    assert read_prompts(str(file)) == prompts
    drawn = read_prompts(str(file), sample=2)
    assert len(drawn) == 2 and set(drawn) < set(prompts)


def test_steps_and_losses_are_read_from_the_newest_trainer_state(places):
    directory = places.save("trained", 4)
    root = places.root / "trained"
    for step, last in ((24, 0.5), (96, 0.25)):
        checkpoint = root / f"checkpoint-{step}"
        checkpoint.mkdir()
        history = [{"loss": 2.0}, {"loss": last}, {"eval_loss": 0.75}]
        state = {"global_step": step, "epoch": 3.0, "log_history": history}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    output = invoke(directory).output
    assert "96 steps, 3 epochs" in output and "2 first, 0.25 last" in output


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize("prompts", [True, False])
def test_pictures(places, tmp_path, suffix, prompts):
    file = tmp_path / f"picture.{suffix}"
    options = ["--prompt", PROMPT, "--with", places.tied] if prompts else []
    done = invoke(places.untied, *options, "--plot", file)
    assert done.exit_code == 0, done.output
    if suffix == "png":
        with Image.open(file) as image:
            assert image.width == 1200 and image.height > 400
        assert done.stdout.splitlines()[-1] == f"wrote {file}"
        return
    content = file.read_bytes()
    assert b"<svg" in content if suffix == "svg" else content.startswith(b"%PDF")


def test_a_picture_beside_json_leaves_it_json(places, tmp_path):
    file = tmp_path / "picture.svg"
    done = invoke(places.untied, "--json", "--plot", file)
    assert json.loads(done.stdout) and f"wrote {file}" in done.stderr


def test_where_there_is_nothing_else_the_rotation_is_drawn(places, tmp_path):
    file = tmp_path / "picture.svg"
    assert invoke(places.tied, "--plot", file).exit_code == 0
    assert "Distance of R from orthonormal" in file.read_text()
    assert invoke(places.tied, "--prompt", PROMPT, "--plot", file).exit_code == 0
    assert "Distance of R from orthonormal" not in file.read_text()


def test_long_stretches_are_shortened(places):
    model, tokenizer = load(inspect_adapter(places.untied))
    ids = prompt_ids(tokenizer, "a b c d e f g h " * 20, chat=False)
    shown = runs(probe(model, tokenizer, ids).tokens, keep=12)
    line = "".join(text for _, text in shown)
    assert line.startswith("« <s>· a» b c d e f g … 144 tokens … ")
    assert line.endswith("h a b c d e‹ f· g· h›")


def test_a_token_shows_its_space_and_no_line_break():
    tokenizer = build_tokenizer()
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("a")) == " a"
    lines = SimpleNamespace(decode=lambda ids, **_: "\n" * len(ids))
    assert token_text(lines, 1) == "\\n"


def narrower(places):
    build_base(places.root / "narrow", hidden_size=32)
    base = AutoModelForCausalLM.from_pretrained(places.root / "narrow")
    build_adapter(base, positions="l1").save_pretrained(places.root / "small")
    return places.root / "small"


MISTAKES = [
    (["nowhere"], "DIR: there is no readable adapter in 'nowhere'"),
    (["{untied}", "--with", "nowhere"], "--with: there is no readable adapter"),
    (
        ["{untied}", "--with", "{small}"],
        "--with: .* vectors of size 32 in layers",
    ),
    (
        ["{untied}", "--with", "{top}"],
        r"--with: .* vectors of size 64 in layers \[2\]; compare adapters of one",
    ),
    (["{untied}", "--plot", "a.jpg"], "--plot: 'a.jpg' does not end with one of .png"),
    (["{untied}", "--plot", "no/a.png"], "--plot: there is no folder '.*no'"),
    (
        ["{mute}", "--prompt", "a"],
        "DIR: the model or tokenizer .* cannot be read",
    ),
    (["{untied}", "--prompts-file", "no"], "--prompts-file: 'no' cannot be read"),
    (["{untied}", "--plot", "a.html"], "does not end with one of .png, .svg, .pdf"),
    (["{untied}", "--chat"], "--chat: there is no prompt to run; pass --prompt or"),
    (["{untied}", "--base-model", "{narrow}"], "--base-model: there is no prompt to r"),
    (["{untied}", "--sample", "2"], "--sample: pass a file with --prompts-file"),
    (
        ["{untied}", "--chat", "--prompt", "a"],
        "--chat: the tokenizer has no chat templ",
    ),
    (
        ["{untied}", "--base-model", "no/such", "--prompt", "a"],
        "--base-model: the model or tokenizer 'no/such' cannot be read",
    ),
    (
        ["{untied}", "--base-model", "{narrow}", "--prompt", "a"],
        "of hidden size 64, this base has 32",
    ),
    (["{untied}", "--device", "abacus"], "--device: 'abacus' cannot be used"),
    (["{nameless}", "--prompt", "a"], "--base-model: the adapter names none; pass"),
    (["{tokens}", "--prompt", "a"], "DIR: the adapter is for TOKEN_CLS, and edits are"),
]


@pytest.fixture(scope="module")
def more(places):
    root = places.root
    narrower(places)
    top = places.save("top", 1, layers=[2])
    bottom = places.save("bottom", 1, layers=[0])
    for name, key, value in (
        ("nameless", "base_model_name_or_path", None),
        ("tokens", "task_type", "TOKEN_CLS"),
    ):
        places.save(name, 1)
        file = root / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    places.save("mute", 1)
    (root / "mute/tokenizer_config.json").write_text("{")
    names = ("mute", "untied", "small", "narrow", "nameless", "tokens")
    found = {name: str(root / name) for name in names}
    return found | {"top": top, "bottom": bottom}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_end_with_one_line(more, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    places = more | ({"untied": more["bottom"]} if "{top}" in arguments else {})
    done = invoke(*(argument.format(**places) for argument in arguments))
    assert done.exit_code == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    assert re.search(message, lines[0])
    assert not list(tmp_path.iterdir())
    assert "Loading weights" not in done.output


@pytest.mark.parametrize(
    ("package", "options"),
    [("rich", []), ("matplotlib", ["--json", "--plot", "a.png"])],
)
def test_a_missing_extra_is_named_with_its_command(
    places, monkeypatch, tmp_path, package, options
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    done = invoke(places.untied, *options)
    assert done.exit_code == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert f"{package} is not installed" in done.stderr
    assert "pip install 'axolotl-reft[inspect]'" in done.stderr


def test_json_needs_neither_rich_nor_matplotlib(places, monkeypatch):
    for package in ("rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    assert json.loads(invoke(places.untied, "--prompt", PROMPT, "--json").stdout)


def test_damaged_weights_are_one_line_as_well(places):
    directory = places.save("damaged", 1)
    file = places.root / "damaged/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    done = invoke(directory)
    assert re.search("DIR: .* are missing or damaged", done.stderr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write one prompt a line"),
        ("{}", "has a line without a prompt"),
        ('{"instruction": "1", "input": "2"}', "write the whole prompt, as"),
    ],
)
def test_a_prompts_file_without_prompts(tmp_path, text, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "file"))
