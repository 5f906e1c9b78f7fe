"""What judges the accuracy of a build: labelled images, held out or given, and the search that uses them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pcn_deploy.calibration.search.evaluation import Answers
from pcn_deploy.progress import Progress
from pcn_deploy.proof.budget import NOT_LABELLED, Judges, judge_held_out
from pcn_deploy.tasks.roles import get_role
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.prepared import Prepared
from pcn_deploy.verbs.steps.sources import BuildImages
from pcn_deploy.verbs.verify import eager

if TYPE_CHECKING:
    from torch import nn

    from pcn_deploy.calibration.search.search import SearchResult


@dataclass(frozen=True, kw_only=True)
class JudgedBy:
    """What judges the accuracy.

    Attributes:
        judges: The images, shared out; None where there are none.
        search: What the search for a plan found, if there was one.
        why_not: Why nothing judges it.
    """

    judges: Judges | None = None
    search: SearchResult | None = None
    why_not: str = NOT_LABELLED


def judge_by(
    model: nn.Module,
    network: Prepared,
    images: BuildImages,
    options: CompileOptions,
    record: Path | None,
    progress: Progress,
) -> tuple[Prepared, JudgedBy]:
    """Let the network answer the images that judge it; with a budget of INT8, find the plan that keeps it."""
    drop, first = options.budget.top1_drop, network.outputs[0]
    if not get_role(first.role).labelled:
        reason = f"output {first.name!r} has the role {first.role}, whose answers no label judges."
        return network, JudgedBy(why_not=f"{reason} If it holds logits (N, K): --output-name {first.name}:logits.")
    if images.judging is not None:
        answers = Answers.of(eager(model), images.judging, progress)
        asked = options.max_drop is not None
        judges = Judges.share_out(answers, drop, searching=options.searches, asked=asked)
        if not options.searches:
            return network, JudgedBy(judges=judges)
        from pcn_deploy.verbs.steps.search_plan import search_plan

        network, search = search_plan(network, judges, record, progress)
        return network, JudgedBy(judges=judges, search=search)
    if images.held_out is None:
        return network, JudgedBy()
    held_out, why_not = judge_held_out(eager(model), images.held_out, drop, progress)
    return network, JudgedBy(judges=held_out, why_not=why_not)
