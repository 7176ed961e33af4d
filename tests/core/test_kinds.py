"""The table of kinds against the interventions that are built, and pyreft's classes."""

import ast
import inspect

import pyreft
import pytest

from axolotl_reft.core import kinds
from axolotl_reft.core.interventions import INTERVENTION_CLASSES
from axolotl_reft.core.kinds import KINDS


def test_every_intervention_has_a_row():
    assert list(KINDS) == list(INTERVENTION_CLASSES)
    assert all(kind.name == name for name, kind in KINDS.items())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_row_describes_the_intervention(kind):
    made = INTERVENTION_CLASSES[kind.name](embed_dim=5, low_rank_dimension=2)
    shapes = {name: tuple(t.shape) for name, t in made.state_dict().items()}
    assert shapes == kind.expected_shapes(5, 2)
    assert kind.sizes(made.state_dict()) == (5, 2)
    assert kind.sizes({"bias": made.bias}) == (0, 0)
    assert isinstance(made, getattr(pyreft, kind.pyreft_class))


def test_the_table_needs_no_torch():
    tree = ast.parse(inspect.getsource(kinds))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules == {"__future__", "collections.abc", "dataclasses", "typing"}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
