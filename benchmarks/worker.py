"""Processes that answer requests, of another environment where one is named.

Requests and answers are lines of JSON, on standard input and output.
:class:`RemoteBench` runs this module as ``python -m benchmarks.worker``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.base import Setting

_ROOT = Path(__file__).parent.parent


def environment(directory: str) -> str | None:
    """The interpreter that ``make bench-environments`` made, if it did."""
    python = Path(__file__).parent / "environments" / directory / "bin" / "python"
    return str(python) if python.exists() else None


class Worker:
    """A process of its own that answers requests.

    Args:
        module: what it runs, which calls :func:`serve`.
        python: interpreter of the environment.
        source: directory that holds another build of ``axolotl_reft``, which the
            process imports in the place of this one.

    Raises:
        RuntimeError: the worker failed; the message is its last.
        ValueError: ``source`` holds no ``axolotl_reft``.
    """

    def __init__(
        self, module: str, python: str = sys.executable, source: Path | None = None
    ) -> None:
        own = os.path.abspath(python) == os.path.abspath(sys.executable)
        paths = [str(_ROOT), os.environ.get("PYTHONPATH", "") if own else ""]
        if source is not None:
            if not (source / "axolotl_reft" / "__init__.py").exists():
                raise ValueError(
                    f"{source} holds no axolotl_reft; name the src/ of a checkout"
                )
            paths.insert(1, str(source.resolve()))
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended at {request}; see its error above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class RemoteBench(Worker):
    """A bench in a process of its own."""

    def __init__(
        self, python: str = sys.executable, source: Path | None = None
    ) -> None:
        super().__init__("benchmarks.worker", python, source)

    def build(self, task: str, name: str, setting: Setting) -> None:
        self.ask({"build": [task, name, setting.asdict()]})

    def turn(self, name: str) -> float:
        return self.ask({"turn": name})

    def versions(self) -> dict[str, str]:
        return self.ask({"versions": True})


def serve(handle: Callable[[dict[str, Any]], Any]) -> None:
    """Answer requests until standard input ends."""
    # Libraries greet on standard output; the answers have it to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = {"result": handle(json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _serve_bench() -> None:
    from benchmarks.harness import versions
    from benchmarks.tasks import Bench

    bench = Bench()

    def handle(request: dict[str, Any]) -> Any:
        if "build" in request:
            task, name, setting = request["build"]
            return bench.build(task, name, Setting.read(setting))
        return bench.turn(request["turn"]) if "turn" in request else versions()

    serve(handle)


if __name__ == "__main__":
    _serve_bench()
