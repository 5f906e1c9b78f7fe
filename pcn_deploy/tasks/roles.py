"""The registry of roles: one line each. numpy only."""

from __future__ import annotations

from pcn_deploy.errors import OptionError
from pcn_deploy.tasks.attention_map import AttentionMap
from pcn_deploy.tasks.classification import Classification
from pcn_deploy.tasks.role import Role
from pcn_deploy.tasks.tensor import Tensor

_ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Classification(),
        AttentionMap(),
        Tensor(),
    )
}
ROLES = tuple(_ROLES)


def get_role(name: str) -> Role:
    """What outputs of a role mean.

    Raises:
        OptionError: If there is no such role.
    """
    if name not in _ROLES:
        msg = f"Unknown role {name!r} of an output: known are {', '.join(ROLES)}."
        raise OptionError(msg)
    return _ROLES[name]
