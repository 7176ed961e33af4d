"""An engine of two processes, each with half of every matrix."""

import pickle
import sys
from pathlib import Path

import pytest
import vllm_runs
from vllm_runs import conversation, every, prompts


@pytest.mark.slow
def test_two_tensor_parallel_processes(directory, check, tmp_path):
    answers = tmp_path / "answers"
    vllm_runs.run_apart(__file__, directory, answers)
    check("2 tensor-parallel processes", pickle.loads(answers.read_bytes()))


if __name__ == "__main__":
    base, found = map(Path, sys.argv[1:])
    engine = vllm_runs.start(base, tensor_parallel_size=2)
    texts = [*prompts((1, 3, 14, 33, 64)), conversation((9, 4))]
    found.write_bytes(pickle.dumps(vllm_runs.ask(engine, base, every(texts))))
