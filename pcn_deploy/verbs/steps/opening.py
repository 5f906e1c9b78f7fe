"""The first step of a build: the network as it is compiled, with the outputs that are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pcn_deploy.data.images import ImageSource
from pcn_deploy.data.transform import drawn_images
from pcn_deploy.errors import OptionError
from pcn_deploy.network.evaluation_mode import in_evaluation_mode
from pcn_deploy.specs import ATTENTION_MAP, OutputSpec
from pcn_deploy.tasks.roles import get_role
from pcn_deploy.verbs.options import CompileOptions
from pcn_deploy.verbs.steps.sources import two_images

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A network that is about to be compiled.

    Attributes:
        model: It, in evaluation mode; it returns one tensor or a tuple of them.
        outputs: What is built, the attention map of a network of ours last; the first one judges the network.
        notes: What the user should know of them.
    """

    model: nn.Module
    outputs: tuple[OutputSpec, ...]
    notes: tuple[str, ...]

    def count_classes(self, options: CompileOptions) -> int:
        """How many classes the first output has, by what the network answers to a drawn image; 0 if it has none."""
        import torch

        from pcn_deploy.network.outputs import first_output

        if not get_role(self.outputs[0].role).labelled:
            return 0
        with torch.no_grad():
            image = torch.from_numpy(drawn_images(1, options.transform, options.seed))
            return int(first_output(self.model, image).shape[-1])

    def check_labelled(self, what: str) -> None:
        """Refuse what needs answers that can be right or wrong.

        Args:
            what: What needs them, in words.

        Raises:
            OptionError: If the first output has none.
        """
        first = self.outputs[0]
        if not get_role(first.role).labelled:
            msg = (
                f"{what} needs the answers of a classifier, and output {first.name!r} has the role {first.role}. If it "
                f"holds logits (N, K), say so: --output-name {first.name}:logits."
            )
            raise OptionError(msg)


def open_network(model: nn.Module, options: CompileOptions, source: ImageSource | None) -> Opened:
    """Copy a network in evaluation mode, and let it return the outputs that are built.

    Args:
        model: Network of one float input `(N, C, H, W)`; left as it is.
        options: What to build.
        source: Images on which it may run, if there are any.

    Raises:
        ModelError: If no graph can be made from it as it is defined, it cannot run, or returns no numbers.
        OptionError: If it has no output that was asked for, or a budget is asked of one without answers.
    """
    import torch

    from pcn_deploy.network.outputs import choose_outputs

    copied = in_evaluation_mode(model)
    image = torch.from_numpy(two_images(options, source)[:1])
    chosen, outputs, notes = choose_outputs(copied, image, options.asked_outputs)
    if options.with_attention_map:
        outputs = (*outputs, OutputSpec(ATTENTION_MAP, ATTENTION_MAP))
    opened = Opened(model=chosen, outputs=outputs, notes=notes)
    if options.max_drop is not None:
        opened.check_labelled("--max-drop")
    return opened
