"""Which modules see tokens in the order of their experts."""

import pytest
from torch import nn

from axolotl_reft.settings.components import is_inside_experts


class Routing(nn.Linear):
    def forward(self, hidden_states, top_k_index):
        return super().forward(hidden_states)


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("mlp", False),
        ("mlp.experts.1", True),
        ("mlp.experts.1.down_proj", True),
        ("mlp.shared_experts.0", False),
        ("routed.experts", False),
        ("routed.experts.down_proj", True),
    ],
)
def test_modules_inside_of_experts_are_known(path, inside):
    """A list of them, and one module that does the routing itself."""
    expert = nn.ModuleDict({"down_proj": nn.Linear(2, 2)})
    routing = Routing(2, 2)
    routing.down_proj = nn.Linear(2, 2)
    layer = nn.ModuleDict(
        {
            "mlp": nn.ModuleDict(
                {
                    "experts": nn.ModuleList([expert, expert]),
                    "shared_experts": nn.ModuleList([expert]),
                }
            ),
            "routed": nn.ModuleDict({"experts": routing}),
        }
    )
    assert is_inside_experts(layer, path) == inside
