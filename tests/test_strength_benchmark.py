"""The benchmark of strengths asks each task's adapter at all of them."""

from types import SimpleNamespace

from conftest import build_adapter, build_model

from benchmarks.quality import strength


def test_its_table_has_a_row_of_scores_for_each_task(monkeypatch, capsys):
    def train(base, tokenizer, task, training):
        return SimpleNamespace(model=build_adapter(base))

    def accuracy(model, tokenizer, task, conversations):
        state = model.base_model.model.loreft_hooks.state
        return 100 * state.strengths.get("default", 1.0) + len(conversations)

    task = SimpleNamespace(test=[1, 2])
    monkeypatch.setattr(strength, "base_of", lambda: (build_model(), None))
    monkeypatch.setattr(strength, "load", lambda name, answers: task)
    monkeypatch.setattr(strength, "train", train)
    monkeypatch.setattr(strength, "accuracy", accuracy)
    strength.main(["--strengths", "0", "0.5", "1"])
    assert capsys.readouterr().out.splitlines() == [
        "| strength | 0 | 0.5 | 1 |",
        "| --- | --- | --- | --- |",
        "| review sentiment | 2.0 | 52.0 | 102.0 |",
        "| linguistic mappings | 2.0 | 52.0 | 102.0 |",
    ]
