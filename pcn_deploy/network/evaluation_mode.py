"""A network as it is compiled: a copy in evaluation mode. Importing this loads no framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def in_evaluation_mode(model: nn.Module) -> nn.Module:
    """A copy that shares the weights: the caller's network keeps its mode and its running statistics.

    Wrappers that compute nothing are taken away.

    Raises:
        ModelError: If no graph can be made from the network as it is defined.
    """
    from pcn_deploy.models.wrappers import unwrapped
    from pcn_deploy.network.deploy import simplify
    from pcn_deploy.network.preconditions import check_definition
    from pcn_deploy.network.sharing import share_weights

    model = unwrapped(model)
    check_definition(model)
    copied = share_weights(model)
    simplify(copied)
    copied.eval()  # returns nothing where a network has a `train` of its own without a return
    return copied
