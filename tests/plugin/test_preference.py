"""TRL's trainers, as axolotl builds them, compute what a forward with labels does."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import move_parameters
from datasets import Dataset
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from preferences import (
    METHODS,
    POSITIONS,
    build_preference_workspace,
    build_trainer,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from axolotl_reft.plugin.preference import prepare_trainer

pytestmark = pytest.mark.slow

BETA = 0.5
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("preferences")


@pytest.fixture(scope="module")
def base(directory):
    build_preference_workspace(directory, "dpo")
    return AutoModelForCausalLM.from_pretrained(
        directory / "base", attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def colon(base, directory):
    """Every prompt ends with it, and no answer of the data has it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "base")
    return tokenizer.convert_tokens_to_ids(":")


@pytest.fixture(scope="module")
def build(directory, base):
    """``build(method)``: its trainer and a batch, the adapter away from its start."""
    built = {}

    def make(method, **changes):
        key = method + str(changes)
        if key not in built:
            config = build_preference_workspace(directory, method, **changes)
            trainer = build_trainer(config)
            disturb(trainer.model)
            trainer.model.train()
            batch = next(iter(trainer.get_train_dataloader()))
            built[key] = trainer, batch
        return built[key]

    return make


def disturb(model):
    torch.manual_seed(3)
    move_parameters(model, 0.3)


def forwards_of(trainer, run):
    """What ``run`` returned, and every forward in it but those of ``generate``."""
    model = trainer.model.get_base_model()
    layer = model.model.layers[0]
    seen = []

    def note(module, args, kwargs, output):
        if model.loreft_hooks.state.thread.generation is None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            edited = not layer.disable_adapters
            mask = kwargs["attention_mask"]
            seen.append(SimpleNamespace(**locals()))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        return run(), seen
    finally:
        handle.remove()


def loss_of(trainer, batch):
    inputs = trainer._prepare_inputs(batch)
    return trainer.compute_loss(trainer.model, inputs), inputs


def rows_of(ids, mask, colon):
    """The tokens of each row without padding, and how many are the prompt."""
    for row, real in zip(ids, mask.bool(), strict=True):
        tokens = row[real]
        yield tokens, (tokens == colon).nonzero()[0].item() + 1


def alone(model, tokens, prompt):
    """Logits of one sample in a forward with labels."""
    labels = tokens.clone()
    labels[:prompt] = -100
    return model(tokens[None], labels=labels[None]).logits[0]


def answer_logps(model, ids, mask, colon):
    """Log-probabilities of each row's answer tokens, row by row."""
    logps = []
    for tokens, prompt in rows_of(ids, mask, colon):
        log_probabilities = alone(model, tokens, prompt)[:-1].log_softmax(-1)
        chosen = log_probabilities.gather(1, tokens[1:, None])[:, 0]
        logps.append(chosen[prompt - 1 :])
    return logps


@pytest.mark.parametrize("method", METHODS)
def test_every_forward_is_that_of_its_rows_alone(build, base, colon, method):
    trainer, batch = build(method)
    _, seen = forwards_of(trainer, lambda: loss_of(trainer, batch))
    counts = sum(f.edited for f in seen), sum(not f.edited for f in seen)
    expected = {"kto": (2, 2), "orpo": (1, 0), "simpo": (1, 0)}
    assert counts == expected.get(method, (1, 1))
    assert len({len(tokens) for tokens, _ in rows_of(*seen_rows(seen), colon)}) > 1
    with torch.no_grad():
        for forward in seen:
            kept = forward.output.logits.shape[1]
            if not forward.edited:
                same = base(
                    forward.ids, attention_mask=forward.mask, logits_to_keep=kept
                )
                assert torch.equal(forward.output.logits, same.logits)
                continue
            rows = rows_of(forward.ids, forward.mask, colon)
            for row, (tokens, prompt) in enumerate(rows):
                logits = alone(trainer.model, tokens, prompt)
                real = forward.mask[row].bool()[-kept:]
                got = forward.output.logits[row][real]
                assert (got - logits[-len(got) :]).abs().max() < TOLERANCE


def seen_rows(seen):
    return seen[0].ids, seen[0].mask


@torch.no_grad()
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_every_forward_is_that_of_prefill_and_decode(build, colon, method):
    trainer, batch = build(method)
    _, seen = forwards_of(trainer, lambda: loss_of(trainer, batch))
    forward = next(f for f in seen if f.edited)
    model = trainer.model.eval()
    try:
        for row, (tokens, prompt) in enumerate(
            rows_of(forward.ids, forward.mask, colon)
        ):
            step = model(tokens[None, :prompt], use_cache=True)
            logits = [step.logits[0, -1:]]
            for token in tokens[prompt:]:
                step = model(token[None, None], past_key_values=step.past_key_values)
                logits.append(step.logits[0])
            expected = torch.cat(logits)
            kept = forward.output.logits.shape[1]
            got = forward.output.logits[row][forward.mask[row].bool()[-kept:]]
            assert (got[-len(expected) :] - expected).abs().max() < TOLERANCE
    finally:
        model.train()


def by_hand(method, model, base, batch, inputs, colon):
    """Each method's loss from the log-probabilities of rows by themselves."""

    def logps(of, kind=""):
        ids, mask = batch[f"{kind}input_ids"], batch[f"{kind}attention_mask"]
        return answer_logps(of, ids, mask, colon)

    def total(rows):
        return torch.stack([row.sum() for row in rows])

    def mean(rows):
        return torch.stack([row.mean() for row in rows])

    if method in ("orpo", "simpo"):
        batch = concatenated(batch)
        answers = logps(model)
        chosen, rejected = mean(answers).chunk(2)
        pairs = len(chosen)
        if method == "simpo":  # and, by TRL's default of cpo_alpha, the chosen's own
            margin = chosen - rejected - 0.5 / BETA
            return (
                -F.logsigmoid(BETA * margin).mean() - torch.cat(answers[:pairs]).mean()
            )
        log_odds = (chosen - rejected) - (
            torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp())
        )
        rows = rows_of(
            batch["input_ids"][:pairs], batch["attention_mask"][:pairs], colon
        )
        nll = torch.cat(
            [
                F.cross_entropy(alone(model, t, p)[:-1], t[1:], reduction="none")
                for t, p in rows
            ]
        ).mean()
        return nll - BETA * F.logsigmoid(log_odds).mean()
    if method == "grpo":
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        losses = []
        with torch.no_grad():
            reference = answer_logps(base, ids, mask, colon)
        policy = answer_logps(model, ids, mask, colon)
        for p, r, a in zip(policy, reference, inputs["advantages"], strict=True):
            kl = torch.exp(r - p) - (r - p) - 1
            losses.append(-torch.exp(p - p.detach()) * a + 0.04 * kl)
        losses = torch.cat(losses)
        return losses.sum() / len(losses)
    with torch.no_grad():
        reference = logps(base)
    policy = logps(model)
    if method == "ipo":
        chosen, rejected = (mean(policy) - mean(reference)).chunk(2)
        return ((chosen - rejected - 1 / (2 * BETA)) ** 2).mean()
    ratios = total(policy) - total(reference)
    if method == "dpo":
        chosen, rejected = ratios.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()
    with torch.no_grad():
        kl = (total(logps(model, "KL_")) - total(logps(base, "KL_"))).mean().clamp(0)
    sign = torch.where(batch["label"].bool(), 1.0, -1.0)
    return (1 - torch.sigmoid(sign * BETA * (ratios - kl))).mean()


def concatenated(batch):
    def both(key, fill):
        parts = [batch[f"{side}_{key}"] for side in ("chosen", "rejected")]
        width = max(part.shape[1] for part in parts)
        return torch.cat(
            [F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
        )

    return {key: both(key, 0) for key in ("input_ids", "attention_mask")}


def gradients(loss, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    return torch.autograd.grad(loss, parameters)


def assert_same_gradients(got, expected):
    size = max(g.abs().max() for g in expected)
    assert size > 1e-4
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() < 1e-4 * size


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "simpo", "grpo"])
def test_loss_and_gradients_are_those_written_by_hand(build, base, colon, method):
    trainer, batch = build(method)
    loss, inputs = loss_of(trainer, batch)
    expected = by_hand(method, trainer.model, base, batch, inputs, colon)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    got = gradients(loss, trainer.model)
    assert_same_gradients(got, gradients(expected, trainer.model))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_checkpointing_replays_the_policys_own_batch(
    build, base, colon, component, reentrant
):
    """KTO forwards another batch, and the reference, before its backward."""
    trainer, batch = build("kto", loreft=POSITIONS | {"component": component})
    model = trainer.model
    settings = {"use_reentrant": reentrant}
    trainer.args.gradient_checkpointing_kwargs = settings
    model.gradient_checkpointing_enable(settings)
    model.enable_input_require_grads()
    model.zero_grad()
    try:
        loss, inputs = loss_of(trainer, batch)
        loss.backward()
    finally:
        model.gradient_checkpointing_disable()
    got = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    expected = by_hand("kto", model, base, batch, inputs, colon)
    assert_same_gradients(got, gradients(expected, model))


def numbers(model, name="default"):
    return get_peft_model_state_dict(model, adapter_name=name)


@pytest.fixture(scope="module")
def saved(build, directory):
    """An adapter to start from."""
    trainer, _ = build("dpo")
    trainer.model.save_pretrained(directory / "saved")
    return directory / "saved"


@torch.no_grad()
@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_training_that_goes_on_keeps_its_start_as_the_reference(
    directory, saved, method
):
    config = build_preference_workspace(directory, method, lora_model_dir=str(saved))
    trainer = build_trainer(config)
    base = AutoModelForCausalLM.from_pretrained(
        directory / "base", attn_implementation="eager"
    )
    start = PeftModel.from_pretrained(base, saved)
    for name in ("default", "ref"):
        got = numbers(trainer.model, name)
        assert got.keys() == numbers(start).keys()
        assert any("rotation_base" in key for key in got)
        assert all(torch.equal(got[k], v) for k, v in numbers(start).items())
    trainable = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and not any(".ref" in name for name in trainable)
    disturb(trainer.model)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    _, seen = forwards_of(trainer, lambda: loss_of(trainer, batch))
    assert all(forward.edited for forward in seen)
    reference = seen[0] if method == "grpo" else seen[-1]
    state = start.get_base_model().loreft_hooks.state
    state.find_answers = answers_after_the_colon(directory)
    same = start(
        reference.ids,
        attention_mask=reference.mask,
        logits_to_keep=reference.output.logits.shape[1],
    )
    assert torch.equal(same.logits, reference.output.logits)
    trainer.model.save_pretrained(directory / f"checkpoint-{method}")
    assert not list((directory / f"checkpoint-{method}").glob("ref*"))


def answers_after_the_colon(directory):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "base")
    colon = tokenizer.convert_tokens_to_ids(":")

    def answers(ids):
        is_colon = (ids == colon).long()
        return (is_colon.cumsum(1) - is_colon) > 0

    return answers


def test_a_forward_of_unknown_ids_is_an_error(build, tokens):
    trainer, _ = build("dpo")
    with pytest.raises(ValueError, match="cannot tell prompt from answer in a batch"):
        trainer.model(tokens(2, 9) % 30)


def test_what_tools_answer_within_completions_is_refused(build):
    trainer, _ = build("grpo")
    inputs = {"tool_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match="GRPO with tools, environments or a rollout"):
        trainer.compute_loss(trainer.model, inputs)


def test_dropout_is_off_where_trl_says_so(directory):
    config = build_preference_workspace(
        directory, "simpo", loreft=POSITIONS | {"dropout": 0.4}
    )
    with pytest.warns(UserWarning, match="the adapter's dropout is not used"):
        trainer = build_trainer(config)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    losses = {loss_of(trainer, batch)[0].item() for _ in range(2)}
    assert len(losses) == 1


@torch.no_grad()
def test_evaluation_is_of_the_trained_adapter_against_the_base(
    directory, saved, base, colon
):
    """axolotl evaluates DPO on a bare base, and TRL loads another one beside it."""
    config = build_preference_workspace(directory, "dpo")
    trainer = build_trainer(config)
    bare = AutoModelForCausalLM.from_pretrained(
        directory / "base", attn_implementation="eager"
    )
    for name in ("compute_loss", "compute_ref_log_probs"):
        del trainer.__dict__[name]
    trainer.model = trainer.model_wrapped = trainer.ref_model = bare
    prepare_trainer(trainer, str(saved), evaluates=True)
    assert trainer.ref_model is None
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    loss, inputs = loss_of(trainer, batch)
    expected = by_hand("dpo", trainer.model, base, batch, inputs, colon)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_seed_is_the_start_of_an_adapter_that_trl_makes(directory):
    """In every process the same, whatever each has drawn before."""

    def start(seed):
        torch.rand(seed)
        model = build_trainer(
            build_preference_workspace(directory, "dpo", seed=seed)
        ).model
        return get_peft_model_state_dict(model)

    one, again, other = start(3), start(3), start(4)
    bases = [key for key in one if key.endswith("rotation_base")]
    assert bases and all(torch.equal(one[key], again[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in bases)


@pytest.mark.parametrize("method", ["orpo", "simpo"])
@torch.no_grad()
def test_evaluation_of_rows_as_axolotl_hands_them_over(directory, saved, method):
    """They are not tokenized, which the trainers on pairs without a reference need."""
    trainer = build_trainer(build_preference_workspace(directory, method))
    prepare_trainer(trainer, str(saved), evaluates=True)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    raw = Dataset.from_list([{"prompt": "a :", "chosen": " m", "rejected": " n"}])
    for prefix, rows in (
        ("train", trainer.train_dataset),
        ("eval", trainer.eval_dataset),
    ):
        metrics = trainer.evaluate(raw, metric_key_prefix=prefix)
        batches = list(trainer.get_eval_dataloader(rows))
        losses = [loss_of(trainer, batch)[0].item() for batch in batches]
        mean = sum(losses) / len(losses)
        assert metrics[f"{prefix}_loss"] == pytest.approx(mean, rel=1e-4)
