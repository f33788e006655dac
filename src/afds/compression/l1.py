"""L1-norm pruning: the channels whose weights are smallest go first; fine-tune, prune, fine-tune.

::

    importance of channel c = mean over the layers that lose it together of sum |w[c]|

Li, Kadav, Durdanovic, Samet, Graf, *Pruning Filters for Efficient ConvNets*, ICLR 2017: norms of filters, the same
share in every layer. Here the norm is torch-pruning's group norm, in which the batch norms and the layers that read
the channel count as well; where a residual stream ties layers together there is no norm of one filter.
"""

from __future__ import annotations

from typing import Any

import torch_pruning as tp


def importance() -> Any:
    """torch-pruning's score of a group of channels."""
    return tp.importance.GroupMagnitudeImportance(p=1)
