"""What is logged while an adapter trains, and told before the first step."""

import copy
import io
import math
import sys

import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import HIDDEN, LAYERS, build_adapter, build_model
from tqdm import tqdm
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from workspace import build_tokenizer

from axolotl_reft.core.interventions import edit_sizes
from axolotl_reft.plugin import plugin
from axolotl_reft.training import edit_log
from axolotl_reft.training.edit_log import EditLog, layer_groups
from axolotl_reft.training.first_batch import FirstBatch
from axolotl_reft.training.first_edit import FirstEdit
from axolotl_reft.tuner.layer import interventions_of

PROMPT, ANSWER = 9, 3
TOKENIZER = build_tokenizer()


def sample(seed=0, prompt=PROMPT):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, len(TOKENIZER), (prompt + ANSWER,), generator=generator)
    labels = ids.clone()
    labels[:prompt] = -100
    return {"input_ids": ids, "labels": labels}


def trainer_of(model, tmp_path, data=None, **settings):
    defaults = {
        "logging_steps": 1, "max_steps": 4, "report_to": [], "use_cpu": True,
        "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True,
        "max_grad_norm": 0.01,
    }  # fmt: skip
    arguments = TrainingArguments(str(tmp_path), **defaults | settings)
    return Trainer(model, arguments, train_dataset=data or [sample()] * 16)


def train(model, tmp_path, data=None, **settings):
    """The trainer, once it has run with both callbacks, and what was told."""
    trainer = trainer_of(model, tmp_path, data, **settings)
    told = []
    trainer.add_callback(EditLog(trainer))
    trainer.add_callback(FirstBatch(model, TOKENIZER, told.append))
    trainer.train()
    return trainer, told


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_groups_are_layers_or_thirds():
    assert layer_groups([0, 5]) == {"layer_0": [0], "layer_5": [5]}
    assert list(layer_groups([0, 1, 2, 3])) == [f"layer_{n}" for n in range(4)]
    groups = layer_groups(list(range(80)))
    assert list(groups) == ["layers_0-26", "layers_27-52", "layers_53-79"]
    assert sum(groups.values(), []) == list(range(80))


def test_the_logged_numbers_are_the_edits_and_gradients(tmp_path):
    model = build_adapter(build_model(), tied_weights=False)
    sizes = {}
    for layer, _, _, module in interventions_of(model, "default"):
        hook = lambda m, a, out, layer=layer: sizes.setdefault(layer, []).append(  # noqa: E731
            edit_sizes(a[0], out)
        )
        module.register_forward_hook(hook)
    one = {key: value[None] for key, value in sample().items()}
    model.train()(**one).loss.backward()
    norms = [
        math.sqrt(
            sum(p.grad.square().sum() for p in layer.parameters() if p.requires_grad)
        )
        for layer in model.base_model.model.model.layers
    ]
    model.zero_grad()
    expected = [float(torch.cat(sizes[layer]).mean()) for layer in range(LAYERS)]
    trainer, _ = train(model, tmp_path, learning_rate=0.0)
    for entry in logged(trainer):
        got = [entry[f"loreft/edit_size/layer_{n}"] for n in range(LAYERS)]
        assert got == pytest.approx(expected, rel=1e-5)
        got = [entry[f"loreft/grad_norm/layer_{n}"] for n in range(LAYERS)]
        # As before clipping, which was at 0.01.
        assert got == pytest.approx(norms, rel=1e-4)
        assert math.hypot(*got) == pytest.approx(entry["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}, [4, 8]),
    ],
)
def test_only_logged_steps_are_watched(tmp_path, monkeypatch, settings, steps):
    calls = []
    monkeypatch.setattr(
        edit_log, "edit_sizes", lambda *a: calls.append(1) or edit_sizes(*a)
    )
    model = build_adapter(build_model())
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2} | settings
    trainer, _ = train(model, tmp_path, data=[sample()] * 16, **settings)
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == steps
    assert all("loreft/edit_size/layer_0" in entry for entry in entries)
    assert len(calls) == len(steps) * 2 * LAYERS
    for _, _, _, module in interventions_of(model, "default"):
        assert module.on_edit is None


def test_every_reporter_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    build = build_adapter(build_model())
    train(build, tmp_path, report_to=["tensorboard"])
    (file,) = tmp_path.rglob("events.out*")
    events = EventAccumulator(str(file)).Reload()
    names = [n for n in events.Tags()["scalars"] if "loreft" in n]
    assert len(names) == 2 * LAYERS and "train/loreft/edit_size/layer_0" in names


def test_without_whole_gradients_there_are_no_norms(tmp_path):
    model = build_adapter(build_model())
    trainer, _ = train(model, tmp_path, max_steps=1)
    log = EditLog(trainer)
    model(**{key: value[None] for key, value in sample().items()}).loss.backward()
    assert log._gradient_norms()
    next(p for p in model.parameters() if p.requires_grad).grad = None
    assert not log._gradient_norms()


def test_an_evaluation_is_not_counted(tmp_path):
    model = build_adapter(build_model())
    trainer, _ = train(model, tmp_path, max_steps=1)
    log = EditLog(trainer)
    log.on_step_begin(trainer.args, TrainerState(logging_steps=1), None)
    one = {key: value[None] for key, value in sample().items()}
    with torch.no_grad():
        model.train()(**one)  # a checkpoint's first run, or a rollout
    model.eval()(**one)
    assert not any(log._sizes.values())
    model.train()(**one)
    assert all(len(sizes) == 1 for sizes in log._sizes.values())
    trainer.log({"eval_loss": 1.0})
    assert not any("loreft" in key for key in trainer.state.log_history[-1])
    trainer.log({"loss": 1.0})
    assert any("loreft" in key for key in trainer.state.log_history[-1])
    log.on_train_end(trainer.args, trainer.state, None)
    assert not log._sizes and not log._watched


def test_unused_slots_and_compiled_steps_have_no_size(tmp_path):
    model = build_adapter(build_model())
    trainer, _ = train(model, tmp_path, max_steps=1)
    log = EditLog(trainer)
    log.on_step_begin(trainer.args, TrainerState(logging_steps=1), None)
    intervention = next(interventions_of(model, "default"))[-1].train()
    h = torch.randn(3, HIDDEN)
    (expected,) = edit_sizes(h[:1], intervention(h[:1]))
    log._sizes.clear()
    log.on_step_begin(trainer.args, TrainerState(logging_steps=1), None)
    h[1:] = 0
    intervention(h)
    got = log._collect(None)["loreft/edit_size/layer_0"]
    assert got == pytest.approx(float(expected), rel=1e-5)
    trainer.args.torch_compile = True
    log.on_step_begin(trainer.args, TrainerState(logging_steps=1), None)
    assert not log._watched and not log._sizes


def lines(told):
    (text,) = told
    return text.splitlines()


def test_the_first_samples_are_told_with_their_edits(tmp_path):
    model = build_adapter(build_model(), positions="f2+l3")
    data = [sample(seed, prompt) for seed, prompt in ((0, 9), (0, 9), (1, 9))]
    _, told = train(model, tmp_path, data=data * 8, max_steps=2)
    text = lines(told)
    assert text[0] == (
        "LoReFT edits at f2+l3 in the first samples: «prefix» ‹suffix›, with · between "
        "two tokens"
    )
    assert text[1] == "sample 1: 12 tokens, 9 in prompts, 5 edited"
    assert text[2].startswith("  prompt  «") and text[2].endswith("›")
    inside = text[2].partition("«")[2].partition("»")[0]
    assert inside.count("·") == 1
    assert text[2].rpartition("‹")[2].count("·") == 2
    assert text[3].startswith("  answer  ") and "«" not in text[3]
    assert [line for line in text if line.startswith("sample")][1:] == [
        "sample 2: 12 tokens, 9 in prompts, 5 edited"
    ]


@pytest.mark.parametrize(
    ("positions", "prompt", "legend"),
    [
        ("f2", PROMPT, "«prefix», with · between two tokens"),
        ("l2", PROMPT, "‹suffix›, with · between two tokens"),
        ("all", PROMPT, "«every token», with · between two tokens"),
        ("f4+l1", 8, "«prefix» ‹suffix›, with · between two tokens"),
        (
            "f1+l4",
            7,
            "«prefix» ‹suffix›, with · between two tokens (each side at most half of a "
            "prompt)",
        ),
        ("f2", 1, "none (each side at most half of a prompt)"),
    ],
)
def test_the_legend_has_what_occurs(tmp_path, positions, prompt, legend):
    model = build_adapter(build_model(), positions=positions)
    data = [sample(0, prompt)] * 4
    _, told = train(model, tmp_path, data=data, max_steps=1)
    head = f"LoReFT edits at {positions} in the first samples: {legend}"
    assert lines(told)[0] == head


@pytest.mark.parametrize("short", [2, 3])
def test_a_short_prompt_that_is_not_shown_is_not_spoken_of(tmp_path, short):
    model = build_adapter(build_model(), positions="f4")
    samples = [sample(n, 5 if n == short else 8) for n in range(4)]
    lengths = [len(one["input_ids"]) for one in samples]
    row = {key: torch.cat([one[key] for one in samples]) for key in samples[0]}
    row["position_ids"] = torch.cat([torch.arange(n) for n in lengths])
    settings = {"per_device_train_batch_size": 1, "max_steps": 1}
    _, told = train(model, tmp_path, data=[row] * 2, **settings)
    assert lines(told)[0].endswith("half of a prompt)") == (short < 3)


@pytest.mark.parametrize("terminal", [False, True])
def test_it_starts_on_a_line_of_its_own(monkeypatch, terminal):
    written = io.StringIO()
    written.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(
        plugin.LOG, "log", lambda _, form, text: written.write(form % text + "\n")
    )
    with tqdm(total=3, file=written, desc="steps", ncols=40):
        plugin._log("LoReFT edits at f1")
    before, _, _ = written.getvalue().partition("LoReFT edits at f1")
    # Either way nothing of the bar is left in the line.
    assert "steps" in before
    assert before.endswith("\n") != terminal
    assert before.rpartition("\n" if not terminal else "\r")[2] == ""


def test_packed_samples_are_told_apart(tmp_path):
    model = build_adapter(build_model(), positions="l1")
    a, b = sample(0, 6), sample(1, 4)
    tail = torch.zeros(5, dtype=torch.long)
    row = {
        "input_ids": torch.cat([a["input_ids"], b["input_ids"], tail]),
        "labels": torch.cat([a["labels"], b["labels"], tail - 100]),
        "position_ids": torch.cat([torch.arange(n) for n in (9, 7, 5)]),
    }
    settings = {"per_device_train_batch_size": 1, "max_steps": 1}
    _, told = train(model, tmp_path, data=[row] * 2, **settings)
    assert [line for line in lines(told) if line.startswith("sample")] == [
        "sample 1: 9 tokens, 6 in prompts, 1 edited",
        "sample 2: 7 tokens, 4 in prompts, 1 edited",
    ]


def test_each_turn_of_a_conversation_is_told(tmp_path):
    ids = TOKENIZER("a b c : m </s> d e f g : n </s>").input_ids
    labels = [-100] * 5 + ids[5:7] + [-100] * 5 + ids[12:]
    row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    colon, end = ids[4], ids[6]
    markers = {"generation_prompts": [[colon]], "end_of_turn": [end]}
    for turns, counts in (
        ("every", "10 in prompts, 4 edited"),
        ("first", "5 in prompts, 2 edited"),
    ):
        model = build_adapter(
            build_model(), positions="f1+l1", turns=turns, turn_markers=markers
        )
        _, told = train(model, tmp_path, data=[row] * 4, max_steps=1)
        text = lines(told)
        assert text[1].endswith(f"14 tokens, {counts}")
        # Without the spaces, which belong to the tokens.
        shown = ["".join(line.split()) for line in text[2:]]
        assert shown[0] == "prompt«<s>»abc‹:›"
        if turns == "every":
            later = ["prompt«d»efg‹:›", "answern</s>"]
            assert shown[1:4] == ["answerm</s>", *later]


def test_the_line_break_after_the_last_answer_is_no_prompt(tmp_path):
    """ChatML ends an answer with a marker that is trained and a line break that is not:
    too short for a side, but no question."""
    ids = TOKENIZER("a b c d : m </s> n").input_ids
    labels = [-100] * 6 + ids[6:8] + [-100] * (len(ids) - 8)
    row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    model = build_adapter(build_model(), positions="l2")
    _, told = train(model, tmp_path, data=[row] * 4, max_steps=1)
    text = lines(told)
    assert text[0].endswith("two tokens")
    assert text[1].endswith(", 6 in prompts, 2 edited")
    shown = [line.split()[0] for line in text[2:5]]
    assert shown == ["prompt", "answer", "other"]


@pytest.mark.parametrize("known", [True, False])
def test_answers_that_a_trainer_knows_are_told_apart(tmp_path, known):
    """As in preference training, where no labels reach the model."""
    model = build_adapter(build_model(), positions="f2" if known else "all")

    def find_answers(ids_BT):
        if not known:  # which positions: all does not ask for
            raise ValueError
        return torch.arange(ids_BT.shape[1])[None] >= PROMPT

    model.base_model.model.loreft_hooks.state.find_answers = find_answers
    told = []
    callback = FirstBatch(model, TOKENIZER, told.append)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callback.on_train_begin(arguments, TrainerState(), None)
    for _ in range(2):
        model.train()(input_ids=sample()["input_ids"][None])
    text = lines(told)
    counts = "9 in prompts, 2 edited" if known else "12 in prompts, 12 edited"
    assert text[1] == f"sample 1: 12 tokens, {counts}"
    assert [line.split()[0] for line in text[2:]] == ["prompt", "answer"][: 1 + known]


def test_a_head_that_calls_past_the_backbone(tmp_path):
    """The batch is the decoder's: the forward of the base model is not called."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=len(TOKENIZER), **sizes)
    model = build_adapter(OPTForCausalLM(config), positions="f2")
    told = []
    callback = FirstBatch(model, TOKENIZER, told.append)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callback.on_train_begin(arguments, TrainerState(), None)
    for _ in range(2):
        row = {key: torch.as_tensor(value)[None] for key, value in sample().items()}
        model.train()(**row)
    assert lines(told)[1] == "sample 1: 12 tokens, 9 in prompts, 2 edited"


# What announces an answer, and what ends one; a last answer that nothing announces.
MARKERS = {"generation_prompts": [[5]], "end_of_turn": [2]}
UNMARKED = {
    "input_ids": torch.tensor([7, 8, 5, 9, 2, 10, 11, 12, 13, 2, 7, 5, 9, 2]),
    "labels": torch.tensor([-100] * 7 + [12, 13, 2] + [-100] * 4),
}


def test_trained_answers_that_no_mark_announces_stop_before_the_first_step(tmp_path):
    model = build_adapter(build_model(), positions="f1+l1", turn_markers=MARKERS)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="turn_markers: the labels train tokens that"):
        train(model, tmp_path, data=[UNMARKED] * 4)
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(map(torch.equal, before, after))


def test_known_answers_that_no_mark_announces_are_shown_as_answers(tmp_path):
    """As in preference training, whose answers end their rows."""
    model = build_adapter(build_model(), positions="f1+l1", turn_markers=MARKERS)
    known = UNMARKED["labels"][None] != -100
    model.base_model.model.loreft_hooks.state.find_answers = lambda ids_BT: known
    told = []
    callback = FirstBatch(model, TOKENIZER, told.append)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callback.on_train_begin(arguments, TrainerState(), None)
    model.train()(input_ids=UNMARKED["input_ids"][None])
    parts = [line.split()[0] for line in lines(told)[2:]]
    # The others are marked, and nobody knows whether they are trained.
    assert parts == ["prompt", "other", "prompt", "answer", "prompt", "other"]


def test_a_tokenizer_without_a_pad_token(tmp_path, monkeypatch):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = None
    monkeypatch.setitem(globals(), "TOKENIZER", tokenizer)
    _, told = train(build_adapter(build_model(), positions="f1"), tmp_path)
    assert lines(told)[1] == "sample 1: 12 tokens, 9 in prompts, 1 edited"


def test_padding_is_not_shown(tmp_path):
    model = build_adapter(build_model(), positions="all")
    row = sample() | {"attention_mask": torch.ones(PROMPT + ANSWER)}
    row["attention_mask"] = row["attention_mask"].long()
    row["attention_mask"][-1:] = 0
    _, told = train(model, tmp_path, data=[row] * 4, max_steps=1)
    assert lines(told)[1] == "sample 1: 11 tokens, 9 in prompts, 11 edited"


def first_edit(model, tmp_path, data=None, **settings):
    """What is told of the first edit in a training, and what is warned of."""
    trainer = trainer_of(model, tmp_path, data, **settings)
    told, warned = [], []
    trainer.add_callback(FirstEdit(model, told.append, warned.append))
    trainer.train()
    return told, warned


@pytest.mark.parametrize("accumulated", [1, 4])
def test_what_the_first_edit_costs_is_told_once(tmp_path, accumulated):
    model = build_adapter(build_model())
    one = {key: value[None] for key, value in sample().items()}
    with torch.no_grad():
        edited = model(**one).loss
        with model.disable_adapter():
            base = model(**one).loss
    assert abs(edited - base) > 0.02
    settings = {"gradient_accumulation_steps": accumulated}
    told, warned = first_edit(model, tmp_path, **settings)
    assert told == [
        f"the first batch's loss is {base:.2f} without the adapter and {edited:.2f} "
        "with its first edit"
    ]
    assert not warned


def ruinous(**settings):
    """An adapter whose edits are far longer than the hidden states."""
    model = build_adapter(build_model(), **settings)
    with torch.no_grad():
        for *_, module in interventions_of(model, "default"):
            module.learned_source.bias.fill_(1000.0)
        model.get_base_model().lm_head.weight *= 100
    return model


def test_a_random_first_edit_that_ruins_the_base_is_warned_of(tmp_path):
    told, (warning,) = first_edit(ruinous(), tmp_path)
    assert "init_weights: identity" in warning and not told
    # The remedy would be none.
    told, warned = first_edit(ruinous(init_weights="identity"), tmp_path)
    assert len(told) == 1 and not warned


def test_telling_of_the_first_edit_does_not_change_the_training(tmp_path):
    losses = []
    for tells in (False, True):
        model = build_adapter(build_model(), dropout=0.3, init_weights="random")
        trainer = trainer_of(model, tmp_path, learning_rate=0.1)
        if tells:
            trainer.add_callback(FirstEdit(model, lambda _: None, lambda _: None))
        torch.manual_seed(0)
        trainer.train()
        losses.append([entry["loss"] for entry in logged(trainer)])
    assert losses[0] == losses[1]


def test_the_first_batch_is_one_to_train_on(tmp_path):
    told = []
    for evaluated in (None, [sample(seed=5)]):
        model = build_adapter(build_model())
        trainer = trainer_of(model, tmp_path, eval_on_start=bool(evaluated))
        trainer.eval_dataset = evaluated
        trainer.add_callback(FirstEdit(model, told.append, told.append))
        trainer.train()
    assert told[0] == told[1]


def test_a_resumed_training_has_no_first_edit(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    told, _ = first_edit(build_adapter(build_model()), tmp_path, **settings)
    trainer = trainer_of(build_adapter(build_model()), tmp_path, max_steps=6)
    trainer.add_callback(FirstEdit(trainer.model, told.append, told.append))
    trainer.train(resume_from_checkpoint=True)
    assert len(told) == 1 and trainer.state.global_step == 6


@pytest.mark.parametrize("kind", ["no labels", "compiled"])
def test_without_a_loss_to_compare_nothing_is_told(tmp_path, kind):
    model = build_adapter(build_model())
    trainer = trainer_of(model, tmp_path, max_steps=1)
    told, forwards = [], []
    callback = FirstEdit(model, told.append, told.append)
    trainer.args.torch_compile = kind == "compiled"
    callback.on_train_begin(trainer.args, TrainerState(), None)
    inputs = {key: value[None] for key, value in sample().items()}
    if kind == "no labels":
        del inputs["labels"]
    model.get_base_model().register_forward_hook(lambda *_: forwards.append(1))
    for _ in range(2):
        model(**inputs)
    assert not told and len(forwards) == 2
    hooks = model.get_base_model()._forward_pre_hooks
    assert len(hooks) == len(
        build_adapter(build_model()).base_model.model._forward_pre_hooks
    )


def test_the_key_turns_it_off(tmp_path):
    model = build_adapter(build_model())
    trainer, _ = train(model, tmp_path, max_steps=1)
    trainer.processing_class = TOKENIZER
    on = plugin.edit_callbacks(DictDefault(adapter="loreft"), trainer)
    assert [type(callback) for callback in on] == [EditLog, FirstEdit, FirstBatch]
    going_on = DictDefault(adapter="loreft", lora_model_dir="saved")
    on = plugin.edit_callbacks(going_on, trainer)
    assert [type(callback) for callback in on] == [EditLog, FirstBatch]
    for cfg in ({"adapter": "loreft", "loreft_log_edits": False}, {"adapter": "lora"}):
        assert plugin.edit_callbacks(DictDefault(cfg), trainer) == []
