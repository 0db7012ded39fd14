"""What a frozen language model does on rows of text, as it is and with other activations put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.lm.dry_run import inputs
from dictlearn.lm.taps import capture, edit
from dictlearn.types import Site, TokenIds


class Patched(NamedTuple):
    """What follows from other activations: logits, and activations by site name, of the counted tokens."""

    logits: Float[Tensor, "n vocab"]
    acts: dict[str, Float[Tensor, "n _"]]


class CleanRun:
    """A frozen LM on the rows of one batch. Nothing runs before it is asked for, and the clean logits only once.

    The LM works in its own dtype, whatever autocast says. Its parameters get no gradient.

    Args:
        tokens: on the model's device.
        counted: the tokens that are trained on, as places row * ctx + position.
        acts: the clean activations of these tokens, by site name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: TokenIds,
        counted: Int[Tensor, " n"],
        acts: Mapping[str, Float[Tensor, "n _"]],
    ) -> None:
        assert not any(parameter.requires_grad for parameter in model.parameters()), "the LM is frozen"
        self.model, self.tokens, self.counted, self.acts = model, tokens, counted, acts

    @cached_property
    def logits(self) -> Float[Tensor, "n vocab"]:
        """What the LM predicts after the counted tokens, without gradient."""
        with torch.no_grad():
            return self._logits()

    def patched(self, values: Mapping[Site, Float[Tensor, "n _"]], later_sites: Sequence[Site] = ()) -> Patched:
        """The LM's run with `values` in place of the counted activations at their sites, with gradient.

        All other activations of these sites are the model's own. `later_sites` are read as well.
        """
        edits = {site: self._replacing(value) for site, value in values.items()}
        with edit(self.model, edits), capture(self.model, later_sites) as acts:
            logits = self._logits()
        return Patched(logits, {site.name: self._of_counted(acts[site.name]) for site in later_sites})

    def _logits(self) -> Float[Tensor, "n vocab"]:
        with torch.autocast(self.tokens.device.type, enabled=False):
            return self._of_counted(self.model(input_ids=self.tokens, use_cache=False).logits)

    def _of_counted(self, values: Float[Tensor, "rows ctx width"]) -> Float[Tensor, "n width"]:
        return values.flatten(0, 1).index_select(0, self.counted)

    def _replacing(self, value: Float[Tensor, "n d"]) -> Callable[[Tensor], Tensor]:
        def replaced(act: Float[Tensor, "rows ctx d"]) -> Float[Tensor, "rows ctx d"]:
            return act.flatten(0, 1).index_copy(0, self.counted, value.to(act.dtype)).view_as(act)

        return replaced


def reached(model: PreTrainedModel, writes: Sequence[Site], sites: Sequence[Site]) -> list[Site]:
    """Those of `sites`, other than `writes`, whose activations depend on those at `writes`; by one forward of the
    frozen model, which may be on the meta device (see `dry`).
    """
    if not sites:
        return []
    edits = dict.fromkeys(writes, lambda act: act.detach().clone().requires_grad_())
    with torch.enable_grad(), edit(model, edits), capture(model, sites) as acts:
        model(**inputs(model), use_cache=False)
    places = {(site.module, site.io) for site in writes}
    found = [site for site in sites if site.name in acts and acts[site.name].requires_grad]  # others never run
    return [site for site in found if (site.module, site.io) not in places]
