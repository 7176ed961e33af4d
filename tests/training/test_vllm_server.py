"""The client of a vLLM server, against a stand-in for it."""

import shlex

import pytest
from vllm_stub import NO_ROUTE, running_stub

from axolotl_reft.training.vllm_server import (
    AdapterServer,
    serve_command,
    training_command,
)

COMMAND = training_command("org/base", 8)


@pytest.fixture
def stub():
    with running_stub() as stub:
        yield stub


@pytest.fixture
def server(stub):
    return AdapterServer(stub.url, COMMAND)


@pytest.fixture
def folders(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")
    return paths


def test_an_adapter_takes_the_place_of_the_one_before(server, stub, folders):
    for path in folders:
        server.load(path.name, path, path)
    assert [route for route, _ in stub.requests] == [
        "load_lora_adapter",
        "load_lora_adapter",
        "unload_lora_adapter",
    ]
    assert stub.loaded == {"b": ["adapter_config.json"]}
    assert [path.exists() for path in folders] == [False, True]
    server.close(folders[1].parent)
    assert not stub.loaded and not folders[1].parent.exists()


def test_a_server_that_is_gone_does_not_keep_the_folder(server, stub, folders):
    server.load("a", folders[0], folders[0])
    stub.refusals["unload_lora_adapter"] = (500, "gone")
    server.close(folders[0].parent)
    assert not folders[0].parent.exists()


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (NO_ROUTE, "404 .*started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1\n"),
        ((400, {"error": {"message": "rank 9"}}), "refused load_lora_adapter: 400 .*9"),
    ],
)
def test_a_refusal_is_told_with_the_servers_reason(
    server, stub, folders, refusal, reason
):
    stub.refusals["load_lora_adapter"] = refusal
    with pytest.raises(RuntimeError, match=reason) as error:
        server.load("a", folders[0], folders[0])
    assert str(error.value).endswith(COMMAND)


def test_a_server_that_does_not_answer_is_waited_for(stub, folders):
    server = AdapterServer("http://127.0.0.1:9", COMMAND)
    with (
        pytest.warns(UserWarning, match="Waiting for it, 0.1 s"),
        pytest.raises(ConnectionError, match="no vLLM server answers at http://127"),
    ):
        server.wait(0.1)
    AdapterServer(stub.url, COMMAND).wait(0.1)


def test_logprobs_without_the_temperature_are_refused(server, stub):
    server.check("org/base", with_logprobs=True)
    stub.raw_logprobs = True
    server.check("org/base", with_logprobs=False)
    with pytest.raises(ValueError, match="add --logprobs-mode processed_logprobs"):
        server.check("org/base", with_logprobs=True)


def test_another_base_is_told(server):
    with pytest.warns(UserWarning, match="serves '/srv/base', and 'org/base-2' is"):
        server.check("org/base-2", with_logprobs=False)


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), ({"0-3": 4, "all": 9}, 16), (600, 600)]
)
def test_the_command_names_a_rank_that_vllm_takes(rank, allowed):
    words = shlex.split(serve_command("a base", rank, "--port", "1"))
    assert words[:3] == ["vllm", "serve", "a base"]
    assert words[words.index("--max-lora-rank") + 1 :] == [str(allowed), "--port", "1"]
