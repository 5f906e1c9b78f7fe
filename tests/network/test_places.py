"""Where a network is at work."""

from __future__ import annotations

import sys
import traceback
import weakref

from torch import nn

from pcn_deploy.network.diagnosis.places import place_at_work


def test_looking_at_the_stack_keeps_nothing_alive() -> None:
    """A frame that is asked for its variables may keep what it deletes later: all weights, while an engine is built."""
    model = nn.Linear(2, 2)
    alive = weakref.ref(model)
    place_at_work(nn.Identity(), reversed(list(traceback.walk_stack(sys._getframe()))))
    del model
    assert alive() is None
