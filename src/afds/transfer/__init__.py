"""What keeps a network near what it knew while it learns a new task: one file per idea, one interface.

::

    L = CE + sum over regularisers of weight * term(step)

    scratch  nothing to stay near          delta.py  DELTA, weighted feature maps
    l2       weight decay, the optimizer's afd.py    attentive feature distillation (with hints.py, kd.py of the base)
    l2_sp.py near the starting weights     kd.py     the logits of a fine-tuned dense network

`Regulariser` (base.py) is the interface. All match layers by name and follow the network when channels are cut away.
"""

from afds.transfer.afd import AttentiveTransfer
from afds.transfer.base import Regulariser, Step
from afds.transfer.delta import Delta, channel_weights, map_variances
from afds.transfer.hints import BlockHints, block_hints
from afds.transfer.kd import LogitDistillation, logit_distillation
from afds.transfer.l2_sp import NearStart, l2_sp

__all__ = [
    "AttentiveTransfer",
    "BlockHints",
    "Delta",
    "LogitDistillation",
    "NearStart",
    "Regulariser",
    "Step",
    "block_hints",
    "channel_weights",
    "l2_sp",
    "logit_distillation",
    "map_variances",
]
