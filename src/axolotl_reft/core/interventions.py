"""The six interventions, as leaf modules with O(dr) parameters.

Each computes what its class of pyreft does, and is a subclass of it wherever pyreft is
imported, so that the objects also run inside a ``pyreft.ReftModel``. What differs is
how they are held: parameters directly on the module (``weight``, ``bias``,
``rotation``, ``proj_weight``), an ordinary ``state_dict``, float32 whatever happens to
the base model, and a compact rotation (``rotation.py``).

Shapes: N rows, D hidden size, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN

from axolotl_reft.core.affine import StackCache, affine_rows, projections
from axolotl_reft.core.kinds import KINDS, InterventionKind
from axolotl_reft.core.pyreft_bases import extend_when_imported
from axolotl_reft.core.rotation import random_base
from axolotl_reft.core.tensors import AdapterLeaf


class Intervention(AdapterLeaf):
    """An edit of hidden states, whose kind the subclasses name.

    Args:
        embed_dim: hidden size D.
        low_rank_dimension: rank R; ``ValueError`` above D.
        dropout: probability of zeroing an entry of the **whole** new hidden state, as
            pyreft does; not of the edit.
        act_fn: key of transformers' ``ACT2FN``; None is linear.
        init_weights: the first parameters, ``random`` or ``identity``.
    """

    kind: InterventionKind
    rotation_base: Tensor
    act_fn: Callable[[Tensor], Tensor]
    # Called with the hidden states before and after each edit.
    on_edit: Callable[[Tensor, Tensor], None] | None = None
    mode_changes = 0  # calls of train and eval

    # pyreft's ignore `destination`, and so save nothing from inside a parent module.
    state_dict = nn.Module.state_dict
    load_state_dict = nn.Module.load_state_dict

    # What pyvene's constructor sets, which is not called: it would add buffers, and
    # pyreft's the d×d base.
    trainable = is_source_constant = is_repr_distributed = keep_last_dim = True
    use_fast = False
    embed_dim = interchange_dim = subspace_partition = source_representation = None

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        act_fn: str | None = None,
        init_weights: str = "random",
    ) -> None:
        size, rank = embed_dim, low_rank_dimension
        if not 1 <= rank <= size:
            raise ValueError(
                f"rank: {rank} is larger than the hidden size {size} of what is "
                f"edited; choose a rank of at most {size}, 4 to 8 are usual"
            )
        nn.Module.__init__(self)
        self.hidden_size, self.rank = size, rank
        self.dropout_p = dropout
        # Not through nn.Module's setattr: activations are modules, and this is a leaf.
        self.__dict__["act_fn"] = ACT2FN[act_fn or "linear"]
        self.is_linear = act_fn in (None, "linear")
        self.init_weights = init_weights
        self._cache = StackCache()
        kind = self.kind
        if kind.has_rotation:
            self.rotation = _parameter(size, rank)
            base_DR = torch.empty(size, rank, dtype=torch.float32)
            self.register_buffer("rotation_base", base_DR)
        if kind.has_weight:
            self.weight = _parameter(rank, size)
        self.bias = _parameter(rank)
        if not kind.has_rotation:
            self.proj_weight = _parameter(rank, size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as pyreft does: R uniformly, W, b and W₂ as ``nn.Linear``; what is on
        the meta device is left for whoever fills it.

        With ``identity``, b = 0 and W = R, or 0 where nothing is subtracted: Φ(h) = h.
        """
        if self.kind.has_rotation:
            self.rotation.zero_()
            if not self.rotation_base.is_meta:
                self.rotation_base.copy_(random_base(self.hidden_size, self.rank))
        if self.kind.has_weight:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            bound = self.hidden_size**-0.5
            nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.init.uniform_(self.bias)
        if not self.kind.has_rotation:
            nn.init.kaiming_uniform_(self.proj_weight, a=math.sqrt(5))
        if self.init_weights == "identity" and not self.bias.is_meta:
            self.bias.zero_()
            if self.kind.subtracts:
                self.weight.copy_(projections([self])[0])
            elif self.kind.has_weight:
                self.weight.zero_()

    @property
    def is_affine(self) -> bool:
        """Whether the edit is h + Pᵀ(Mh + b), as it is computed now."""
        return self.is_linear and not (self.dropout_p and self.training)

    @property
    def has_local_params(self) -> bool:
        """Whether its parameters can be used without calling it: no hook is on it, such
        as DeepSpeed's, FSDP2's and accelerate's, which gather the parameters."""
        return not (
            self._forward_hooks
            or self._forward_pre_hooks
            or "_hf_hook" in self.__dict__
            or any(isinstance(p, DTensor) for p in self._parameters.values())
        )

    def forward(
        self, base: Tensor, source: object = None, subspaces: object = None
    ) -> Tensor:
        """Return Φ(h) for hidden states ``base`` (…, D), in their dtype; the other
        arguments are pyvene's, and not used, as in pyreft."""
        with without_autocast(base.device):
            stack = self._cache.get([self])
            if not self.is_linear:
                return self.edit(base, stack.p_KRD[0])
            h_ND = base.float().reshape(-1, base.shape[-1])
            new_ND = affine_rows(h_ND, stack)
        return self._finished(base, new_ND)

    def edit(self, base: Tensor, p_RD: Tensor) -> Tensor:
        """Return Φ(h) for hidden states ``base`` (…, D) and this P, in their dtype."""
        with without_autocast(base.device):
            h_ND = base.float().reshape(-1, base.shape[-1])
            bias_R = self.bias.float()
            if self.kind.has_weight:
                source_NR = self.act_fn(F.linear(h_ND, self.weight.float(), bias_R))
            else:
                source_NR = bias_R.expand(h_ND.shape[0], -1)
            if self.kind.subtracts:
                source_NR = source_NR - F.linear(h_ND, p_RD)
            new_ND = torch.addmm(h_ND, source_NR, p_RD)
        return self._finished(base, new_ND)

    def _finished(self, base: Tensor, new_ND: Tensor) -> Tensor:
        new = new_ND.view(base.shape).to(base.dtype)
        new = F.dropout(new, self.dropout_p, self.training)
        if self.on_edit is not None:
            self.on_edit(base, new)
        return new

    def rotation_matrix(self) -> Tensor:
        """Return R transposed, as pyreft holds it: (D, R), orthonormal columns."""
        if not self.kind.has_rotation:
            raise AttributeError(f"{type(self).__name__} has no rotation")
        return self._cache.get([self]).p_KRD[0].T

    def train(self, mode: bool = True) -> Intervention:
        self.mode_changes += 1
        return super().train(mode)

    # pyreft's names for R, W₂, and W and b; of kinds without one there is no such name.

    @property
    def rotate_layer(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.rotation_matrix())

    @property
    def proj_layer(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.proj_weight, bias=None)

    @property
    def learned_source(self) -> Any:
        if self.kind.has_weight:
            return SimpleNamespace(weight=self.weight, bias=self.bias)
        return self.bias

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, rank={self.rank}"


class LoreftIntervention(Intervention):
    """Φ(h) = h + Rᵀ(f(Wh + b) − Rh) (arXiv 2404.03592, equation 2)."""

    kind = KINDS["loreft"]


class NoreftIntervention(Intervention):
    """Φ(h) = h + W₂ᵀ(f(W₁h + b) − W₂h), nothing constrained (pyreft)."""

    kind = KINDS["noreft"]


class DireftIntervention(Intervention):
    """Φ(h) = h + W₂ᵀ(f(W₁h + b)), the paper's DiReFT (equation 3); pyreft calls this
    ``NodireftIntervention``."""

    kind = KINDS["direft"]


class OrthogonalDireftIntervention(Intervention):
    """Φ(h) = h + Rᵀ(f(Wh + b)), an ablation; pyreft's ``DireftIntervention``."""

    kind = KINDS["orthogonal_direft"]


class ConsreftIntervention(Intervention):
    """Φ(h) = h + Rᵀ(b − Rh), an ablation (pyreft)."""

    kind = KINDS["consreft"]


class LobireftIntervention(Intervention):
    """Φ(h) = h + Rᵀb, an ablation (pyreft)."""

    kind = KINDS["lobireft"]


INTERVENTION_CLASSES = {ours.kind.name: ours for ours in Intervention.__subclasses__()}
extend_when_imported({c.kind.pyreft_class: c for c in INTERVENTION_CLASSES.values()})


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in float32 inside autocast too."""
    # The meta device has no autocast; a forward is checked there without parameters.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def edit_sizes(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """Return ‖Φ(h)−h‖/‖h‖ of each hidden state, in float32 and without its last axis.

    Zero vectors, which unused reserved slots hold, give NaN.
    """
    before_ND = before_ND.detach().float()
    change_ND = after_ND.detach().float() - before_ND
    norm_N = before_ND.norm(dim=-1)
    return change_ND.norm(dim=-1) / norm_N.where(norm_N > 0, torch.nan)
