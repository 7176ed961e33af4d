"""Runs the checks of architectures, each in a process of its own with a time limit."""

from __future__ import annotations

import copy
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers
from peft import get_peft_model

from axolotl_reft import LoreftConfig
from benchmarks.sweep.architectures import Architecture
from benchmarks.sweep.building import build
from benchmarks.sweep.checks import CHECKS, checked
from benchmarks.sweep.findings import (
    BaseFailed,
    Finding,
    Row,
    failed,
    first_line,
)
from benchmarks.sweep.inputs import readable
from benchmarks.sweep.reference import NotFound
from benchmarks.sweep.subject import Subject

# Findings of the first check after which the others have nothing to say.
_LAST = ("refused", "not compared")


def check(architecture: Architecture) -> Row:
    """Build an architecture and run every check of it."""
    began = time.monotonic()
    row = Row(architecture.name, architecture.kind, architecture.model_type)
    row.findings += _findings(architecture, row)
    row.seconds = round(time.monotonic() - began, 2)
    return row


def _findings(architecture: Architecture, row: Row) -> Iterator[Finding]:
    try:
        base = build(architecture)
    except Exception as error:
        yield Finding("build", "not built", message=first_line(error))
        return
    try:
        get_peft_model(copy.deepcopy(base), LoreftConfig())
    except Exception as error:
        yield failed("adapter", error)
        return
    try:
        subject = Subject(base, architecture.kind, readable(base))
    except BaseFailed as error:
        yield Finding("base", "not compared", message=f"the base itself: {error}")
        return
    try:
        row.note = subject.layers.note()
    except NotFound as error:
        row.note = str(error)
    for run in CHECKS:
        found = list(checked(run, subject))
        yield from found
        if run is CHECKS[0] and any(f.verdict in _LAST for f in found):
            return


def _child(architecture: Architecture, connection: Connection) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    connection.send(json.dumps(check(architecture).to_dict()))
    connection.close()


def run(
    chosen: list[Architecture],
    jobs: int,
    limit: float,
    report: Callable[[Row], None],
) -> list[Row]:
    """Check each in a child process, so that a hang or a crash ends only its own."""
    # Forked: importing transformers takes longer than the checks.
    processes = multiprocessing.get_context("fork")
    waiting, rows = list(reversed(chosen)), []
    running: dict[Any, tuple[Architecture, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            architecture = waiting.pop()
            ours, theirs = processes.Pipe(duplex=False)
            process = processes.Process(target=_child, args=(architecture, theirs))
            process.start()
            theirs.close()
            running[ours] = architecture, process, time.monotonic()
        done: list[Any] = wait(list(running), timeout=min(limit, 1))
        for connection, (architecture, process, began) in list(running.items()):
            late = time.monotonic() - began > limit
            if connection not in done and not late:
                continue
            del running[connection]
            late = late and connection not in done
            row = _received(connection, architecture, process, late)
            rows.append(row)
            report(row)
    order = {architecture.name: n for n, architecture in enumerate(chosen)}
    return sorted(rows, key=lambda row: order[row.name])


def _received(
    connection: Connection, architecture: Architecture, process: Any, late: bool
) -> Row:
    try:
        if not late:
            return Row.read(json.loads(connection.recv()))
        message = "not done in time"
    except EOFError:
        message = "the process crashed"
    finally:
        process.kill()
        process.join()
    finding = Finding("run", "WRONG", message=message)
    return Row(architecture.name, architecture.kind, architecture.model_type, [finding])
