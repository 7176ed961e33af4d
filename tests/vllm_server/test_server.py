"""Adapters behind vLLM's OpenAI server: answers are those of ``generate`` with them.

A token is compared with transformers' argmax behind the tokens before it, so that one
rounding does not decide about the rest.
"""

import base64
import io
import random
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from vllm_http import (
    ADAPTERS,
    ROUNDING,
    TOKENIZER,
    Answer,
    Reference,
    command,
    environment,
    save_adapter,
    save_base,
    save_refused_adapters,
    serving,
)

pytestmark = pytest.mark.vllm

MODELS = [None, *ADAPTERS]
# From a part of a cached block to several blocks.
TEXTS = ["a", "which tokens are edited?", "one, two, three. " * 4, "x y z " * 25]
MESSAGES = [
    {"role": "user", "content": "how do you do?"},
    {"role": "assistant", "content": "fine"},
    {"role": "user", "content": "and what is the weather like today?"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_base(folder)
    for seed, (name, settings) in enumerate(ADAPTERS.items(), start=1):
        save_adapter(folder / name, seed, **settings)
    # What "changing" is before and after its change.
    for seed, name in ((11, "before"), (12, "after")):
        save_adapter(folder / name, seed, positions="f7+l7", rank=4)
    shutil.copytree(folder / "before", folder / "changing")
    return folder


@pytest.fixture(scope="module")
def refused(directory):
    return save_refused_adapters(directory / "refused")


@pytest.fixture(scope="module")
def server(directory):
    with serving(directory, list(ADAPTERS)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", timeout=300)


@pytest.fixture(scope="module")
def reference(directory):
    return Reference(directory, [*ADAPTERS, "before", "after"])


def is_answered_right(server, reference):
    answers = server.ask("ends", TEXTS[1])
    return reference.difference(answers[0]) < ROUNDING


def test_the_models_are_the_base_and_its_adapters(client):
    models = {model.id: model.parent for model in client.models.list()}
    assert models == {"base": None} | dict.fromkeys(ADAPTERS, "base")


@pytest.mark.parametrize("adapter", MODELS)
def test_completions_are_those_of_generate(server, reference, adapter):
    for text in TEXTS:
        (answer,) = server.ask(adapter, text, max_tokens=16)
        assert answer.prompt == TOKENIZER(text)["input_ids"]
        assert reference.difference(answer) < ROUNDING
        assert reference.generate(adapter, answer.prompt, 16) == answer.tokens
        # The last byte may be the first of a letter's.
        whole = TOKENIZER.decode(answer.tokens, skip_special_tokens=True)
        assert whole.startswith(answer.text)
        # Each side has at most half of the prompt.
        if adapter is not None and len(answer.prompt) > 1:
            base = Answer(None, *answer[1:])
            assert reference.difference(base) > 100 * ROUNDING


@pytest.mark.parametrize("adapter", ["turns", "ends"])
def test_a_conversation_is_edited_by_its_turns(client, reference, adapter):
    for count in (1, 3):
        messages = MESSAGES[:count]
        done = client.chat.completions.create(
            model=adapter,
            messages=messages,
            temperature=0,
            max_tokens=12,
            logprobs=True,
            extra_body={"return_token_ids": True},
        )
        prompt = TOKENIZER.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        (choice,) = done.choices
        assert done.prompt_token_ids == prompt
        logprobs = [token.logprob for token in choice.logprobs.content]
        answer = Answer(adapter, prompt, choice.token_ids, logprobs, "")
        assert reference.difference(answer) < ROUNDING


@pytest.mark.parametrize("adapter", MODELS)
def test_a_stream_is_the_whole_answer_in_parts(client, server, adapter):
    (whole,) = server.ask(adapter, TEXTS[2])
    parts = client.completions.create(
        model=adapter or "base",
        prompt=TEXTS[2],
        temperature=0,
        max_tokens=8,
        stream=True,
        extra_body={"return_token_ids": True},
    )
    choices = [part.choices[0] for part in parts if part.choices]
    assert len(choices) > 1
    assert "".join(choice.text for choice in choices) == whole.text
    assert sum((choice.token_ids or [] for choice in choices), []) == whole.tokens


def test_several_answers_to_one_prompt_are_each_the_adapters(server, reference):
    answers = server.ask("ends", TEXTS[2], n=4, temperature=1.0, seed=3)
    assert len({tuple(answer.tokens) for answer in answers}) > 1
    for answer in answers:
        assert reference.difference(answer, is_sampled=True) < ROUNDING


def test_several_prompts_in_a_request_are_each_edited(server, reference):
    for answer in server.ask("turns", TEXTS):
        assert reference.difference(answer) < ROUNDING


def test_requests_of_more_adapters_than_slots_are_answered_at_once(server, reference):
    asked = [(adapter, text) for adapter in MODELS for text in TEXTS] * 2
    random.Random(0).shuffle(asked)
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda pair: server.ask(*pair)[0], asked)
        assert max(map(reference.difference, answers)) < ROUNDING


def test_each_request_may_give_its_adapter_a_strength(server, client, reference):
    strengths = (0.5, 1, 2, -0.5, 0.5)
    asked = [(a, t, s) for a in ADAPTERS for t in TEXTS[1:] for s in strengths]
    random.Random(1).shuffle(asked)

    def ask(request):
        adapter, text, strength = request
        return server.ask(adapter, text, vllm_xargs={"loreft_strength": strength})[0]

    with ThreadPoolExecutor(8) as threads:
        for answer, (*_, strength) in zip(threads.map(ask, asked), asked, strict=True):
            assert reference.difference(answer, strength=strength) < ROUNDING
            other = reference.difference(answer, strength=strength / 2)
            assert other > 10 * ROUNDING
    for adapter in ADAPTERS:
        answer, base = ask((adapter, TEXTS[2], 0)), ask((None, TEXTS[2], 0.5))
        assert (answer.tokens, answer.logprobs) == (base.tokens, base.logprobs)
    done = client.chat.completions.create(
        model="turns",
        messages=MESSAGES,
        temperature=0,
        max_tokens=8,
        logprobs=True,
        extra_body={"return_token_ids": True, "vllm_xargs": {"loreft_strength": 0.5}},
    )
    logprobs = [token.logprob for token in done.choices[0].logprobs.content]
    tokens = done.choices[0].token_ids
    answer = Answer("turns", done.prompt_token_ids, tokens, logprobs, "")
    assert reference.difference(answer, strength=0.5) < ROUNDING


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"loreft_strength": "0.5"}, "'0.5' is not a finite number; pass 1"),
        ({"loreft_strength": [0.5]}, "[0.5] is not a finite number; pass 1"),
        ({"loreft_scale": 0.5}, "loreft_scale is not known among a request's extra"),
    ],
)
def test_a_strength_that_cannot_be_is_refused(server, reference, extra, message):
    refused = server.post("completions", model="ends", prompt="a", vllm_xargs=extra)
    assert refused.status_code == 400, refused.text
    assert message in refused.json()["error"]["message"]
    assert is_answered_right(server, reference)


def test_an_adapter_is_loaded_and_unloaded_while_the_server_runs(
    server, client, directory, reference
):
    path = str(directory / "after")
    assert server.post("completions", model="after", prompt="a").status_code == 404
    loaded = server.post("load_lora_adapter", lora_name="after", lora_path=path)
    assert loaded.status_code == 200, loaded.text
    assert "after" in {model.id for model in client.models.list()}
    (answer,) = server.ask("after", TEXTS[3])
    assert reference.difference(answer) < ROUNDING
    twice = server.post("load_lora_adapter", lora_name="after", lora_path=path)
    assert twice.status_code == 400
    assert server.post("unload_lora_adapter", lora_name="after").status_code == 200
    assert server.post("completions", model="after", prompt="a").status_code == 404
    assert server.post("unload_lora_adapter", lora_name="after").status_code == 404


def test_changed_files_give_new_answers_and_no_old_cached_block(
    server, directory, reference
):
    """While other clients ask for the same adapter, and for two that take the slots."""
    folder, is_over = directory / "changing", False

    def asking(adapter):
        found = []
        while not is_over:
            found += server.ask(adapter, TEXTS[3], max_tokens=4)
        return found

    def named(answer, name):
        return Answer(name, *answer[1:])

    body = {"lora_name": "changing", "lora_path": str(folder)}
    assert server.post("load_lora_adapter", **body).status_code == 200
    # Twice: from the cache.
    for _ in range(2):
        (answer,) = server.ask("changing", TEXTS[3])
        assert reference.difference(named(answer, "before")) < ROUNDING
        assert reference.difference(named(answer, "after")) > 100 * ROUNDING
    with ThreadPoolExecutor(5) as threads:
        clients = [
            threads.submit(asking, adapter)
            for adapter in ("changing", "changing", "ends", "everywhere", "turns")
        ]
        try:
            for name in ("after", "before") * 3:
                source = directory / name / "adapter_model.safetensors"
                shutil.copy(source, folder / "new")
                (folder / "new").replace(folder / "adapter_model.safetensors")
                loaded = server.post("load_lora_adapter", load_inplace=True, **body)
                assert loaded.status_code == 200, loaded.text
                (answer,) = server.ask("changing", TEXTS[3])
                assert reference.difference(named(answer, name)) < ROUNDING
        finally:
            is_over = True
        for answers in map(lambda client: client.result(), clients):
            assert answers
            for answer in answers:
                names = (
                    ("before", "after")
                    if answer.adapter == "changing"
                    else (answer.adapter,)
                )
                found = [reference.difference(named(answer, name)) for name in names]
                assert min(found) < ROUNDING
    assert server.post("unload_lora_adapter", lora_name="changing").status_code == 200


def test_a_refused_load_says_why_and_what_to_do_and_the_server_goes_on(
    server, directory, refused, reference
):
    for name, (reason, remedy) in refused.items():
        path = str(directory / "refused" / name)
        response = server.post("load_lora_adapter", lora_name="new", lora_path=path)
        assert response.status_code == 400, (name, response.text)
        message = response.json()["error"]["message"]
        assert reason in message and remedy in message, (name, message)
        assert is_answered_right(server, reference)


def test_a_directory_that_is_not_there_is_not_found(server, directory, reference):
    path = str(directory / "nowhere")
    response = server.post("load_lora_adapter", lora_name="new", lora_path=path)
    assert response.status_code == 404, response.text
    assert "No adapter found" in response.json()["error"]["message"]
    assert is_answered_right(server, reference)


def test_files_that_are_damaged_later_are_the_matter_of_their_requests_alone(
    server, directory, reference
):
    folder = directory / "damaged"
    shutil.copytree(directory / "before", folder)
    body = {"lora_name": "damaged", "lora_path": str(folder)}
    assert server.post("load_lora_adapter", **body).status_code == 200
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    refused = server.post("completions", model="damaged", prompt=TEXTS[1])
    assert refused.status_code == 400, refused.text
    assert "save the adapter again" in refused.text
    assert is_answered_right(server, reference)
    assert server.post("unload_lora_adapter", lora_name="damaged").status_code == 200


def test_beam_search_is_refused_with_an_adapter_alone(server, reference):
    body = {"prompt": TEXTS[1], "use_beam_search": True, "n": 2, "max_tokens": 3}
    assert server.post("completions", model="base", **body).status_code == 200
    for path, more in (
        ("completions", body),
        ("chat/completions", {"messages": MESSAGES, "use_beam_search": True, "n": 2}),
    ):
        refused = server.post(path, model="ends", **more)
        assert refused.status_code == 400, refused.text
        assert "adapter 'ends' cannot be used with beam search" in refused.text
        assert "use sampling with n" in refused.text
    assert is_answered_right(server, reference)


def test_prompt_embeddings_are_refused_with_an_adapter_alone(server, reference):
    saved = io.BytesIO()
    torch.save(torch.zeros(5, 64), saved)
    body = {"prompt_embeds": base64.b64encode(saved.getvalue()).decode()}
    base = server.post("completions", model="base", max_tokens=2, **body)
    assert base.status_code == 200, base.text
    refused = server.post("completions", model="ends", max_tokens=2, **body)
    assert refused.status_code == 400, refused.text
    assert "cannot be used with prompt embeddings" in refused.text
    assert "send the whole prompt as text or ids" in refused.text
    assert is_answered_right(server, reference)


def test_a_server_does_not_start_with_an_adapter_that_it_cannot_serve(
    directory, refused
):
    done = subprocess.run(
        command(directory, ["ends", "refused/rank"], 0),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    (error,) = re.findall(r"^.*ValueError: (.*)$", done.stderr, re.MULTILINE)
    assert "adapter 'refused/rank' cannot be served" in error
    assert "--max-lora-rank 16" in error
