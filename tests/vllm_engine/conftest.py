"""The models that all tests of engines use, and the table of what they compared."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in ``base``, and an adapter of every kind."""
    from vllm_runs import save_adapters, save_base

    path = tmp_path_factory.mktemp("llama")
    save_base(path)
    save_adapters(path)
    return path


@pytest.fixture(scope="session")
def reference(directory):
    from vllm_runs import Reference

    return Reference(directory)


@pytest.fixture
def check(reference, record_property) -> Callable[..., None]:
    """``check(kind, answers)``: every answer is that of transformers, and those of an
    adapter are not the base's."""

    def compare(kind, answers, reference=reference, least_edited=0.8, **settings):
        found = reference.compare(answers, **settings)
        record_property("compared", [kind, *found])
        assert found.different == 0, found
        adapted = sum(answer.asked.adapter is not None for answer in answers)
        assert found.edited >= least_edited * adapted, "the adapters change too little"

    return compare


@pytest.fixture(scope="module")
def start(directory) -> Iterator[Callable]:
    """``start(**settings)``: an engine, stopped behind the module's tests or when the
    next is started."""
    import vllm_runs

    running = []

    def begin(path=directory, **settings):
        stop()
        running.append(vllm_runs.start(path, **settings))
        return running[0]

    def stop():
        while running:
            vllm_runs.stop(running.pop())

    yield begin
    stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was compared."""
    rows = [
        value
        for report in terminalreporter.getreports("passed")
        + terminalreporter.getreports("failed")
        if report.when == "call"
        for name, value in report.user_properties
        if name == "compared"
    ]
    if rows:
        terminalreporter.section("requests compared with transformers")
        print = terminalreporter.write_line
        print("| kind | requests | different | largest difference of a logprob |")
        print("|---|---|---|---|")
        for kind, requests, different, largest, _ in rows:
            print(f"| {kind} | {requests} | {different} | {largest:.1e} |")
        print(f"| all | {sum(r[1] for r in rows)} | {sum(r[2] for r in rows)} | |")
