"""A config as a user writes it, through axolotl's validation."""

import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

GOOD = """
base_model: base
plugins:
  - axolotl_reft.LoreftPlugin
adapter: loreft
loreft:
  layers: all
  positions: f7+l7
  rank: 8
datasets:
  - path: data.jsonl
    ds_type: json
    type: alpaca
micro_batch_size: 1
gradient_accumulation_steps: 1
num_epochs: 1
learning_rate: 1e-3
"""


def validated(**changes):
    settings = yaml.safe_load(GOOD)
    settings |= changes
    cfg = DictDefault({k: v for k, v in settings.items() if v is not ...})
    prepare_plugins(cfg)
    return validate_config(cfg)
