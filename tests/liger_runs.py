"""``TRITON_INTERPRET=1 python liger_runs.py DIRECTORY``: training without
and with Liger's kernels, which Triton's interpreter runs where there is no GPU.

Liger changes transformers' classes for good, so this is a process of its own.
"""

import json
import sys
from pathlib import Path

import triton
import triton.language as tl
from liger_kernel.ops import rms_norm
from training import train
from workspace import build_workspace

LIGER = {
    "plugins": [
        "axolotl.integrations.liger.LigerPlugin",
        "axolotl_reft.LoreftPlugin",
    ],
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
    "liger_fused_linear_cross_entropy": True,
}


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


def main(directory: Path) -> None:
    # The interpreter has no functions of CUDA's own library.
    rms_norm.rsqrt = rsqrt
    config = build_workspace(directory)
    results = {}
    for run, changes in {"plain": {}, "liger": LIGER}.items():
        model, losses = train(
            config,
            2,
            micro_batch_size=1,
            loreft={"positions": "f2+l2", "rank": 4},
            output_dir=str(directory / run),
            **changes,
        )
        results[run] = {
            "losses": losses,
            "kinds": sorted({type(m).__name__ for m in model.modules()}),
            "forward": type(model.get_base_model()).forward.__module__,
        }
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
