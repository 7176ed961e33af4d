"""The six interventions, as leaf modules with O(dr) numbers.

Each is a subclass of pyreft's class and computes the same edit, so the objects also run
inside a ``pyreft.ReftModel``. What differs is how they are held: parameters directly on
the module (``weight``, ``bias``, ``rotation``, ``proj_weight``), an ordinary
``state_dict``, float32 whatever happens to the base model, and a compact rotation
(see ``rotation.py``).

Shapes: N positions, D hidden size, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN

from axolotl_reft.core.leaf import AdapterLeaf
from axolotl_reft.core.pyreft import pyreft_unusable
from axolotl_reft.core.rotation import random_base, rotation

try:
    # pyvene greets by print with what it would like to have installed.
    with redirect_stdout(StringIO()):
        import pyreft
except Exception as error:  # pyvene's imports can fail in their own ways
    raise pyreft_unusable(f"importing it failed: {error}") from error


class _Intervention(AdapterLeaf):
    """What the six have in common; comes before pyreft's class in the bases.

    Args:
        embed_dim: hidden size D.
        low_rank_dimension: rank R, at most D.
        dropout: probability of zeroing an entry of the **whole** new hidden state, as
            pyreft does; not of the edit.
        act_fn: key of transformers' ``ACT2FN``; None is linear.

    Raises:
        ValueError: the rank is larger than the hidden size.
    """

    pyreft_class: type[nn.Module]
    # What fused.py asks: whether there is a W, and whether P is taken off it.
    has_weight = False
    subtracts = False
    # Told hidden states before and after each edit; by edit_log.py.
    on_edit: Callable[[Tensor, Tensor], None] | None = None

    # pyreft overrides these with ones that ignore `destination`, and so save nothing
    # from inside a parent module.
    state_dict = nn.Module.state_dict
    load_state_dict = nn.Module.load_state_dict

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        act_fn: str | None = None,
    ) -> None:
        if not 1 <= low_rank_dimension <= embed_dim:
            raise ValueError(
                f"rank: {low_rank_dimension} is larger than the hidden size "
                f"{embed_dim} of what is edited; choose a rank of at most {embed_dim}, "
                "4 to 8 are usual"
            )
        # Past pyreft's own constructor, which would build the d×d base; and without
        # embed_dim, which pyvene would keep as buffers and so save.
        super(self.pyreft_class, self).__init__(keep_last_dim=True)  # type: ignore[call-arg]
        self.hidden_size = embed_dim
        self.rank = low_rank_dimension
        self.made_for = f"hidden size {embed_dim}, rank {low_rank_dimension}"
        self.dropout_p = dropout
        # Not through nn.Module's setattr: activations are modules, and this is a leaf.
        self.__dict__["act_fn"] = ACT2FN[act_fn or "linear"]
        self._linear = act_fn in (None, "linear")
        self._create_parameters()

    def _create_parameters(self) -> None:
        raise NotImplementedError

    def _edit(self, h_ND: Tensor) -> Tensor:
        """The new hidden states in float32.

        A sharded model lends its parameters in the dtype of its mixed precision, so
        they are used as ``.float()``.
        """
        raise NotImplementedError

    def matrix_RD(self) -> Tensor:
        """What an edit adds combinations of: R, or W₂; float32."""
        raise NotImplementedError

    @property
    def affine(self) -> bool:
        """Whether an edit is h + Pᵀ(Mh + b), as it is computed now."""
        return self._linear and not (self.dropout_p and self.training)

    @property
    def unwatched(self) -> bool:
        """Whether its numbers can be used past its own forward: no hook is on it, as
        DeepSpeed, FSDP2 and accelerate have them to bring the numbers, and others to
        see what comes out."""
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or "_hf_hook" in self.__dict__
        ):
            return False
        for parameter in self._parameters.values():
            if isinstance(parameter, DTensor):
                return False
        return True

    def forward(
        self, base: Tensor, source: object = None, subspaces: object = None
    ) -> Tensor:
        """Φ(h) for hidden states ``base`` (…, D), in their dtype.

        ``source`` and ``subspaces`` are pyvene's and not used, as in pyreft.
        """
        device = base.device.type
        # Not on the meta device, which has none and where a forward is checked without
        # numbers. torch could be asked, but compiled by 2.11 that breaks the graph.
        casts = device != "meta"
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            new_ND = self._edit(base.float().reshape(-1, base.shape[-1]))
        new = new_ND.view(base.shape).to(base.dtype)
        new = F.dropout(new, self.dropout_p, self.training)
        if self.on_edit is not None:
            self.on_edit(base, new)
        return new

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, rank={self.rank}"


class _Affine(_Intervention):
    """Those with a source f(Wh + b)."""

    weight: nn.Parameter
    bias: nn.Parameter
    has_weight = True
    act_fn: Callable[[Tensor], Tensor]

    def _linear_parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """W (R, D) and b (R,), initialised as ``nn.Linear`` does, as in pyreft."""
        weight = nn.Parameter(
            torch.empty(self.rank, self.hidden_size, dtype=torch.float32)
        )
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        bias = nn.Parameter(torch.empty(self.rank, dtype=torch.float32))
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(bias, -bound, bound)
        return weight, bias

    def _source(self, h_ND: Tensor) -> Tensor:
        """f(Wh + b) (N, R)."""
        return self.act_fn(F.linear(h_ND, self.weight.float(), self.bias.float()))

    def _source_less(self, h_ND: Tensor, subspace_RD: Tensor) -> Tensor:
        """f(Wh + b) − Sh (N, R); where f is linear, one product for the two."""
        if self._linear:
            weight_RD = self.weight.float() - subspace_RD
            return F.linear(h_ND, weight_RD, self.bias.float())
        return self._source(h_ND) - F.linear(h_ND, subspace_RD)

    @property
    def learned_source(self) -> SimpleNamespace:
        """pyreft's name for W and b."""
        return SimpleNamespace(weight=self.weight, bias=self.bias)


class _KeptMatrix:
    """R with what it was computed from, as torch's version counters saw that."""

    def __init__(self, matrix_DR: Tensor, *sources: Tensor) -> None:
        self.matrix_DR = matrix_DR
        self._sources = sources
        self._states = [_state(source) for source in sources]

    def is_of(self, *sources: Tensor) -> bool:
        """Whether these are the same tensors, and hold what they held."""
        return all(
            source is own and _state(source) == state
            for source, own, state in zip(
                sources, self._sources, self._states, strict=True
            )
        )


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()


class _Rotated(_Intervention):
    """Those with an orthonormal R: ``rotation`` holds its Householder vectors."""

    rotation: nn.Parameter
    rotation_base: Tensor
    # By shared_rotations.py, for an edit.
    lent_RD: Tensor | None = None
    _kept: _KeptMatrix | None = None

    def _create_rotation(self) -> None:
        self.rotation = nn.Parameter(
            torch.zeros(self.hidden_size, self.rank, dtype=torch.float32)
        )
        self.register_buffer("rotation_base", random_base(self.hidden_size, self.rank))

    def rotation_matrix(self) -> Tensor:
        """R transposed, as pyreft holds it: (D, R), orthonormal columns.

        In eval mode without gradients it is computed once and kept, D·R numbers more,
        until its vectors change, also through ``.data``: where that could go unseen,
        after a change of mode or with a gradient there, it is computed anew.
        """
        if (lent_RD := self.lent_RD) is not None:
            return lent_RD.T
        vectors, base = self.rotation, self.rotation_base
        if torch.compiler.is_compiling():  # a graph may change nothing here
            return rotation(vectors.float(), base)
        if (
            self.training
            or torch.is_grad_enabled()
            or vectors.grad is not None
            or vectors.is_inference()
        ):
            self._kept = None
            return rotation(vectors.float(), base)
        kept = self._kept
        if kept is None or not kept.is_of(vectors, base):
            kept = _KeptMatrix(rotation(vectors.float(), base), vectors, base)
            self._kept = kept
        return kept.matrix_DR

    def matrix_RD(self) -> Tensor:
        lent_RD = self.lent_RD
        return self.rotation_matrix().T if lent_RD is None else lent_RD

    def train(self, mode: bool = True) -> _Rotated:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @property
    def rotate_layer(self) -> SimpleNamespace:
        """pyreft's name for R: ``rotate_layer.weight`` is :meth:`rotation_matrix`."""
        return SimpleNamespace(weight=self.rotation_matrix())


class _RotatedAffine(_Rotated, _Affine):
    """Those with both R and f(Wh + b)."""

    def _create_parameters(self) -> None:
        self._create_rotation()
        self.weight, self.bias = self._linear_parameters()


class _Projected(_Affine):
    """Those with a free W₂ (R, D), ``proj_weight``, in the place of R."""

    def _create_parameters(self) -> None:
        self.weight, self.bias = self._linear_parameters()
        self.proj_weight, _ = self._linear_parameters()

    def matrix_RD(self) -> Tensor:
        return self.proj_weight.float()

    @property
    def proj_layer(self) -> SimpleNamespace:
        """pyreft's name for W₂."""
        return SimpleNamespace(weight=self.proj_weight, bias=None)


class _BiasOnly(_Rotated):
    """Those whose source is b alone, whatever the hidden state."""

    def _create_parameters(self) -> None:
        self._create_rotation()
        self.bias = nn.Parameter(torch.rand(self.rank, dtype=torch.float32))

    @property
    def learned_source(self) -> nn.Parameter:
        """pyreft's name for b."""
        return self.bias


class LoreftIntervention(_RotatedAffine, pyreft.LoreftIntervention):
    """Φ(h) = h + Rᵀ(f(Wh + b) − Rh) (arXiv 2404.03592, equation 2)."""

    pyreft_class = pyreft.LoreftIntervention
    subtracts = True

    def _edit(self, h_ND: Tensor) -> Tensor:
        r_RD = self.matrix_RD()
        return torch.addmm(h_ND, self._source_less(h_ND, r_RD), r_RD)


class NoreftIntervention(_Projected, pyreft.NoreftIntervention):
    """Φ(h) = h + W₂ᵀ(f(W₁h + b) − W₂h), nothing constrained (pyreft)."""

    pyreft_class = pyreft.NoreftIntervention
    subtracts = True

    def _edit(self, h_ND: Tensor) -> Tensor:
        w_RD = self.matrix_RD()
        return torch.addmm(h_ND, self._source_less(h_ND, w_RD), w_RD)


class DireftIntervention(_Projected, pyreft.NodireftIntervention):
    """Φ(h) = h + W₂ᵀ(f(W₁h + b)), the paper's DiReFT (equation 3).

    pyreft calls this ``NodireftIntervention``.
    """

    pyreft_class = pyreft.NodireftIntervention

    def _edit(self, h_ND: Tensor) -> Tensor:
        return torch.addmm(h_ND, self._source(h_ND), self.matrix_RD())


class OrthogonalDireftIntervention(_RotatedAffine, pyreft.DireftIntervention):
    """Φ(h) = h + Rᵀ(f(Wh + b)), an ablation; pyreft's ``DireftIntervention``."""

    pyreft_class = pyreft.DireftIntervention

    def _edit(self, h_ND: Tensor) -> Tensor:
        return torch.addmm(h_ND, self._source(h_ND), self.matrix_RD())


class ConsreftIntervention(_BiasOnly, pyreft.ConsreftIntervention):
    """Φ(h) = h + Rᵀ(b − Rh), an ablation (pyreft)."""

    pyreft_class = pyreft.ConsreftIntervention
    subtracts = True

    def _edit(self, h_ND: Tensor) -> Tensor:
        r_RD = self.matrix_RD()
        return torch.addmm(h_ND, self.bias.float() - F.linear(h_ND, r_RD), r_RD)


class LobireftIntervention(_BiasOnly, pyreft.LobireftIntervention):
    """Φ(h) = h + Rᵀb, an ablation (pyreft)."""

    pyreft_class = pyreft.LobireftIntervention

    def _edit(self, h_ND: Tensor) -> Tensor:
        return h_ND + self.bias.float() @ self.matrix_RD()


INTERVENTION_CLASSES: dict[str, type[_Intervention]] = {
    "loreft": LoreftIntervention,
    "noreft": NoreftIntervention,
    "direft": DireftIntervention,
    "orthogonal_direft": OrthogonalDireftIntervention,
    "consreft": ConsreftIntervention,
    "lobireft": LobireftIntervention,
}
