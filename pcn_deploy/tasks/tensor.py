"""The role `tensor`: an embedding, a map, whatever is compared as it stands. numpy only."""

from __future__ import annotations

from pcn_deploy.specs import TENSOR
from pcn_deploy.tasks.role import Role


class Tensor(Role):
    """The role `tensor`: cosine, SQNR, and SQNR of what the images change."""

    name = TENSOR
