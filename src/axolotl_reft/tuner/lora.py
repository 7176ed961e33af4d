"""LoRA beside LoReFT, in one adapter: low-rank additions to linear modules of a layer.

Not by PEFT's layers: PEFT saves an adapter's tensors by the prefix of one method, and a
model takes adapters of one method. Computes the same, from the same start and under
autocast (``tests/tuner/test_lora.py``), for any linear module, quantised ones too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axolotl_reft.core.scatter import EditIndices, edit
from axolotl_reft.core.strength import Strength, at_strength
from axolotl_reft.core.tensors import AdapterLeaf
from axolotl_reft.errors import did_you_mean, shown
from axolotl_reft.settings.lora import ALL_LINEAR


class LayerLora(AdapterLeaf):
    """y + (α/r)·B·A·dropout(x) for linear modules of one layer (arXiv 2106.09685, 4.1).

    A leaf, and float32 under any cast, like the interventions. A (r, in) starts as
    PEFT's does, B (out, r) at zero.

    Args:
        sizes: of each module's input and output, by its path in the layer.
        dropout: probability of zeroing an entry of x.
    """

    def __init__(
        self, sizes: Mapping[str, tuple[int, int]], r: int, alpha: float, dropout: float
    ) -> None:
        super().__init__()
        widest = max((size for both in sizes.values() for size in both), default=r)
        if r > widest:
            raise ValueError(
                f"lora: r: {r} is larger than every size of its target modules; "
                f"choose at most {widest}, 8 is usual"
            )
        self.paths = tuple(sizes)
        self.r, self.scaling, self.dropout_p = r, alpha / r, dropout
        for path, (size_in, size_out) in sizes.items():
            a = nn.Parameter(torch.empty(r, size_in, dtype=torch.float32))
            b = nn.Parameter(torch.empty(size_out, r, dtype=torch.float32))
            # Directly on the leaf for PEFT, so without dots.
            self.register_parameter(f"{path.replace('.', '_')}_A", a)
            self.register_parameter(f"{path.replace('.', '_')}_B", b)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("_A"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                parameter.zero_()

    def forward(self, path: str, x: Tensor) -> Tensor:
        """Return (α/r)·B·A·dropout(x) of the module at ``path`` for its input."""
        stem = path.replace(".", "_")
        a, b = self.get_parameter(f"{stem}_A"), self.get_parameter(f"{stem}_B")
        x = F.dropout(x.to(a.dtype), self.dropout_p, self.training)
        return F.linear(F.linear(x, a), b) * self.scaling

    def add_to(
        self,
        output: Tensor,
        path: str,
        x: Tensor,
        rows: EditIndices | None,
        strength: Strength = None,
    ) -> Tensor:
        """Return a module's output with this LoRA's, in these rows; None for all."""
        if rows is None:
            added = output + self(path, x)
        else:
            x_ND = x.reshape(-1, x.shape[-1]).index_select(0, rows.all_N)
            added = edit(output, rows, [lambda y_ND: y_ND + self(path, x_ND)])
        return at_strength(strength, output, added)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling}, dropout={self.dropout_p}"


def linear_modules(
    layer: nn.Module, targets: str | Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return the input and output sizes of a layer's linear modules by path: all, or
    those with a target's name or end of path; ValueError where there is none."""
    linear: dict[str, tuple[int, int]] = {}
    for path, module in layer.named_modules():
        for names in (("in_features", "out_features"), ("nx", "nf")):  # GPT-2's Conv1D
            size_in, size_out = (getattr(module, name, None) for name in names)
            if isinstance(size_in, int) and isinstance(size_out, int):
                linear[path] = size_in, size_out
    if targets == ALL_LINEAR:
        return linear
    found = {}
    for target in targets:
        paths = [p for p in linear if p == target or p.endswith(f".{target}")]
        if not paths:
            known = tuple(dict.fromkeys(path.rpartition(".")[2] for path in linear))
            raise ValueError(
                f"lora: target_modules: {shown(target)} is no linear module of "
                f"{type(layer).__name__}.{did_you_mean(target, known)} It has: "
                f"{', '.join(linear)}"
            )
        found.update({path: linear[path] for path in paths})
    return found
