"""Processes forked from one that has imported axolotl, which takes each 20 s alone."""

import gc
import io
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

# What axolotl's commands import before they look at a config's model and data.
_IMPORTED = [
    "axolotl.cli.main",
    "axolotl.cli.evaluate",
    "axolotl.cli.inference",
    "axolotl.cli.preprocess",
    "axolotl.cli.train",
    "axolotl.core.builders",
    "axolotl.monkeypatch.accelerate.fsdp2",
    "axolotl.train",
]


def fork(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start ``function(*arguments)`` in a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def run_forked(
    function: Callable[..., object],
    *arguments: object,
    directory: Path,
    text: str = "",
    timeout: float = 600,
) -> tuple[int, str]:
    """Run ``function`` in a process as a command: its exit code and what it prints."""
    with tempfile.NamedTemporaryFile("r") as printed:
        process = fork(_run, function, arguments, directory, text, printed.name)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} hangs: {printed.read()[-5000:]}")
        return process.exitcode, printed.read()


def _run(function, arguments, directory, text, printed):
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin = io.StringIO(text)
    os.chdir(directory)
    gc.freeze()  # for what conftest.py does it
    # As in a process by itself: workers that this one starts are not forked as it was.
    multiprocessing.set_start_method(None, force=True)
    function(*arguments)
