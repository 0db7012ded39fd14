"""The local replacement model of a prompt: linear between latents, with the model's own forward.

As Ameisen et al. (2025, "Circuit Tracing") have it: attention patterns and the denominators of norms are those of
the prompt, and what each MLP writes is a sum of constants, latent times decoder row, bias and error, but for a
linear skip path. Then every pre-activation and every logit is linear in latents, errors and embeddings:

    target = sum over sources of edges + bias

where `bias` is what is left with all of these at zero: biases of the model and of dictionaries, position
embeddings, and what MLPs write at special tokens, which is the same for every prompt.

A model in float16 or bfloat16 runs in float32 here, from its first activation on: it is the graph of its weights,
not of how their products are rounded, and adds up as one of a float32 model does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.circuits.cuts import Cut, cuts_of, embeddings
from dictlearn.circuits.freeze import held, recorded
from dictlearn.circuits.graphs.layers import Layer, layers_of
from dictlearn.circuits.surgery import NARROW, in_float32
from dictlearn.dictionaries import Dictionary
from dictlearn.lm.taps import capture, edit
from dictlearn.types import DictlearnError, TokenIds

N_PREFIXES = 4  # of a prompt: a target's gradient is zero behind its position
BLOCK_ELEMENTS = 2**25  # of decoder rows in one piece of work
KEPT_ELEMENTS = 2**27  # of those that are kept; more are made again for every batch of targets


class Active(NamedTuple):
    """The active latents of a prompt, by layer, then position.

    `layer` is where it reads, `latent` its place in its dictionary, `value` times its decoder row what it writes.
    """

    layer: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


class Targets(NamedTuple):
    """Numbers `vector . x + constant` of what one layer (n_layers: the unembedding) reads at positions."""

    layer: int
    position: Int[Tensor, " n"]
    vector: Float[Tensor, "n d"]
    constant: Float[Tensor, " n"]


class _Block(NamedTuple):
    """The latents that write at a layer, at the positions from `start` on, filled up to the same number."""

    start: int
    latent: Int[Tensor, "n most"]  # its place in `active`; n_sources where there is none
    rows: Float[Tensor, "n most d"] | None  # what they write: value times decoder row, or zero; None: not kept


class _Graph(NamedTuple):
    """The local model on a prefix of the prompt, with its graph: what targets at these positions depend on."""

    embedding: Float[Tensor, "1 ctx d"]
    written: list[Tensor]  # by layer, [1, ctx, d]
    reads: list[Tensor]  # by layer, and last the unembedding, [1, ctx, d]

    @property
    def ctx(self) -> int:
        return self.embedding.shape[1]


class LocalModel:
    """The local replacement model of one prompt.

    Args:
        ids: `[1, ctx]`.
        n_special: leading special tokens, at which there are neither latents nor errors.

    `active` are its latents, `errors` `[n_layers, ctx, d]` what dictionaries do not write: of a layer without one
    all that its MLP writes. `embedding` `[ctx, d]`; `logits` `[vocab]` of the next token.

    Raises DictlearnError for an unknown family, for dictionaries that are no transcoders or whose latents are not
    their pre-activations, and for ids that are not one prompt.
    """

    def __init__(
        self, model: PreTrainedModel, dictionaries: Mapping[str, Dictionary], ids: TokenIds, n_special: int = 0
    ) -> None:
        for name, d in dictionaries.items():
            if d.b_dec.dtype in NARROW:
                raise DictlearnError(
                    f"Graphs need dictionaries in float32 or float64, {name} is in {d.b_dec.dtype}: take its "
                    "float()."
                )
        self.model, self.ids, self.n_special, self.ctx = model, ids, n_special, ids.shape[1]
        if len(ids) != 1 or not 0 <= n_special < self.ctx:
            raise DictlearnError(
                f"A graph is of one prompt, longer than its {n_special} special tokens; got ids {list(ids.shape)}."
            )
        self.cuts = cuts_of(model, dictionaries)
        self.layers = layers_of(model, self.cuts)
        self._embed = embeddings(model)
        with in_float32(model):
            acts = self._record()
            self.embedding = acts[self._embed.name][0]
            self.active = self._find_active(acts)
            self._kept_elements = 0
            self._blocks = [self._blocks_at(number) for number in range(len(self.layers))]
            self._find_errors(acts)
            self._find_reads()

    @property
    def n_latents(self) -> int:
        return len(self.active.latent)

    @property
    def n_sources(self) -> int:
        """Latents, errors by layer and position, and embeddings."""
        return self.n_latents + (len(self.layers) + 1) * self.ctx

    # -- targets and their edges --

    def latent_targets(self, latents: Int[Tensor, " n"]) -> list[tuple[Int[Tensor, " m"], Targets]]:
        """Pre-activations of some of `active`, by layer: their places in `latents`, and what they are."""
        found = []
        of_layer = self.active.layer[latents]
        for number in of_layer.unique().tolist():
            (places,) = (of_layer == number).nonzero(as_tuple=True)
            own = latents[places]
            position = self.active.position[own]
            vector, constant = self.layers[number].vectors(self.active.latent[own], position)
            found.append((places, Targets(number, position, vector, constant)))
        return found

    @torch.no_grad()
    def logit_targets(self, tokens: Int[Tensor, " n"], minus: Int[Tensor, " n"] | None = None) -> Targets:
        """Logits of the next token, before a softcap, above those of the tokens `minus`, or where that is -1 (None:
        everywhere) above the mean over the vocabulary.
        """
        minus = torch.full_like(tokens, -1) if minus is None else minus

        def difference(values: Float[Tensor, "vocab d"]) -> Float[Tensor, "n d"]:
            wide = torch.promote_types(values.dtype, torch.float32)
            other = values[minus.clamp_min(0)].to(wide)
            mean = values.mean(0, dtype=wide)
            return values[tokens].to(wide) - torch.where((minus < 0).unsqueeze(-1), mean, other)

        head = self.model.get_output_embeddings()
        assert head is not None
        vector, bias = difference(head.get_parameter("weight")), getattr(head, "bias", None)
        constant = vector.new_zeros(len(tokens)) if bias is None else difference(bias.unsqueeze(-1)).squeeze(-1)
        return Targets(len(self.layers), torch.full_like(tokens, self.ctx - 1), vector, constant)

    @torch.no_grad()
    def edges(self, targets: Targets) -> Float[Tensor, "n n_sources"]:
        """The direct effect of each source on each target: what the source writes times the target's gradient."""
        found = self.errors.new_zeros(len(targets.position), self.n_sources + 1)  # last: what is filled up
        start = 0
        for graph in self._graphs:
            (own,) = ((targets.position >= start) & (targets.position < graph.ctx)).nonzero(as_tuple=True)
            if len(own):
                some = Targets(targets.layer, *(part[own] for part in targets[1:]))
                found[own] = self._edges(graph, some)
            start = graph.ctx
        return found[:, :-1]

    def _edges(self, graph: _Graph, targets: Targets) -> Float[Tensor, "n n_sources_plus_1"]:
        """Those of targets within a prefix of the prompt."""
        read, upstream = graph.reads[targets.layer], graph.written[: targets.layer]
        n, ctx = len(targets.position), graph.ctx
        at_read = read.new_zeros(n, *read.shape)
        at_read[torch.arange(n, device=read.device), 0, targets.position] = targets.vector.to(read.dtype)
        *grads, at_embedding = torch.autograd.grad(
            read,
            [*upstream, graph.embedding],
            at_read,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        found = self.errors.new_zeros(n, self.n_sources + 1)
        errors = found[:, self.n_latents : -1].view(n, -1, self.ctx)[..., :ctx]
        for number, grad in enumerate(grads):
            if grad is None:
                continue
            grad = grad[:, 0].to(found.dtype)  # [n, ctx, d]
            errors[:, number] = (grad * self.errors[number, :ctx]).sum(-1)
            for block in self._blocks[number]:
                here = slice(block.start, min(block.start + len(block.latent), ctx))
                if (m := here.stop - here.start) > 0:
                    along = torch.einsum("ntd,tmd->ntm", grad[:, here], self._rows(number, block)[:m])
                    found.index_add_(1, block.latent[:m].flatten(), along.flatten(1))
        if at_embedding is not None:
            errors[:, -1] = (at_embedding[:, 0] * self.embedding[:ctx]).sum(-1)
        return found

    def bias(self, targets: Targets) -> Float[Tensor, " n"]:
        """What targets are with all sources at zero."""
        return self._value(targets, self._reads_of_biases)

    def total(self, targets: Targets) -> Float[Tensor, " n"]:
        """What targets are on the prompt."""
        return self._value(targets, self._reads)

    def release(self) -> None:
        """Forget what can be made again: the graphs of gradients, which hold weights, and decoder rows."""
        vars(self).pop("_graphs", None)
        self._blocks = [[block._replace(rows=None) for block in blocks] for blocks in self._blocks]

    @torch.no_grad()
    def change(self, source: int, targets: Sequence[Targets]) -> list[Float[Tensor, " n"]]:
        """How far targets move in a forward of the model in which a source is there twice, with the patterns,
        denominators and MLP outputs (but for skip paths) of the prompt.
        """
        embedding, written = self.embedding.clone().unsqueeze(0), [whole.clone() for whole in self._wholes]
        number, position = divmod(source - self.n_latents, self.ctx)
        if number == len(self.layers):
            embedding[0, position] += self.embedding[position]
        elif number >= 0:
            written[number][0, position] += self.errors[number, position].to(written[number].dtype)
        for number, blocks in enumerate(self._blocks if source < self.n_latents else []):
            for block in blocks:
                row, column = (block.latent == source).nonzero(as_tuple=True)  # of one place, or none
                if len(row):
                    added = self._rows(number, block)[row, column]
                    written[number][0, block.start + row] += added.to(written[number].dtype)
        with in_float32(self.model):
            reads = self._forward(embedding, written)
        return [self._value(own, reads) - self.total(own) for own in targets]

    @staticmethod
    @torch.no_grad()
    def _value(targets: Targets, reads: Sequence[Tensor]) -> Float[Tensor, " n"]:
        x = reads[targets.layer][0, targets.position].to(targets.vector.dtype)
        return (x * targets.vector).sum(-1) + targets.constant

    # -- how it is made --

    @torch.no_grad()
    def _record(self) -> dict[str, Tensor]:
        """The plain forward: patterns, denominators and activations."""
        sites = {site.name: site for layer in self.layers for site in (layer.read, layer.write) if site is not None}
        sites |= {self._embed.name: self._embed}
        with recorded(self.model) as self._frozen, capture(self.model, list(sites.values())) as acts:
            self.logits = self.model(self.ids, use_cache=False).logits[0, -1]
        for layer in self.layers:
            if layer.read is not None:
                layer.hold(acts[layer.read.name])
        return dict(acts)

    @torch.no_grad()
    def _find_active(self, acts: Mapping[str, Tensor]) -> Active:
        parts = []
        for cut in self.cuts:
            values, d = cut.values(acts), cut.dictionary
            counts = values.offsets.diff()
            position = torch.arange(self.ctx, device=counts.device).repeat_interleave(counts)
            kept = (values.values != 0) & (position >= self.n_special)
            latent = values.indices[kept]
            _check_values(cut, acts, position[kept], latent, values.values[kept])
            of_places = {layer.place: number for number, layer in enumerate(self.layers) if layer.cut is cut}
            place = latent // (d.n_latents // len(of_places))  # 0 in dictionaries of one layer
            numbers = torch.tensor([of_places[place] for place in sorted(of_places)], device=latent.device)
            parts.append(Active(numbers[place], position[kept], latent, values.values[kept]))
        joined = Active(*(torch.cat(part) for part in zip(*parts, strict=True)))
        order = (joined.layer * self.ctx + joined.position).argsort(stable=True)
        return Active(*(part[order] for part in joined))

    @torch.no_grad()
    def _blocks_at(self, number: int) -> list[_Block]:
        """The latents that write at a layer; consecutive positions together, as far as their rows are few."""
        layer, active = self.layers[number], self.active
        if layer.cut is None:
            return []
        of_cut = torch.tensor(
            [other.cut is layer.cut for other in self.layers[: number + 1]], device=self.ids.device
        )
        (latents,) = (of_cut[active.layer.clamp_max(number)] & (active.layer <= number)).nonzero(as_tuple=True)
        position = active.position[latents]
        order = position.argsort(stable=True)
        by_position = latents[order].split(position.bincount(minlength=self.ctx).tolist())
        d, found, start = layer.cut.dictionary.d_out, [], 0
        while start < self.ctx:
            most = n = 0
            for own in by_position[start:]:
                if n and (n + 1) * max(most, len(own)) * d > BLOCK_ELEMENTS:
                    break
                most, n = max(most, len(own)), n + 1
            where = latents.new_full((n, most), self.n_sources)
            for row, own in zip(where, by_position[start : start + n], strict=True):
                row[: len(own)] = own
            block = _Block(start, where, None)
            if most:
                self._kept_elements += where.numel() * d
                keeps = self._kept_elements <= KEPT_ELEMENTS
                found.append(block._replace(rows=self._rows(number, block)) if keeps else block)
            start += n
        return found

    def _rows(self, number: int, block: _Block) -> Float[Tensor, "n most d"]:
        """What the latents of a block write at a layer: value times decoder row, zero where there is no latent."""
        if block.rows is not None:
            return block.rows
        own, active = block.latent.flatten(), self.active
        is_filled = own == self.n_sources
        own = own.masked_fill(is_filled, 0)
        value = active.value[own].masked_fill(is_filled, 0)
        latent = active.latent[own].masked_fill(is_filled, 0)  # that of another layer may not be there at this one
        rows = value.unsqueeze(-1) * self.layers[number].decoder_rows(latent)
        return rows.unflatten(0, block.latent.shape)

    @torch.no_grad()
    def _find_errors(self, acts: Mapping[str, Tensor]) -> None:
        """What every layer writes beside its skip path, and the parts of that which are errors and biases."""
        self._wholes: list[Tensor] = []  # each [1, ctx, d]
        self._biases: list[Tensor] = []
        errors = []
        for number, layer in enumerate(self.layers):
            whole = acts[layer.write.name]
            if layer.read is not None and (skip := layer.skip(acts[layer.read.name])) is not None:
                whole = whole.to(skip.dtype) - skip
            wide = whole if layer.bias is None else whole.to(layer.bias.dtype)
            bias = torch.zeros_like(wide) if layer.bias is None else layer.bias.expand_as(wide).clone()
            bias[:, : self.n_special] = wide[:, : self.n_special]
            error = (wide - bias)[0]
            for block in self._blocks[number]:
                error[block.start : block.start + len(block.latent)] -= self._rows(number, block).sum(1)
            errors.append(error)
            self._wholes.append(whole)
            self._biases.append(bias)
        self.errors = torch.stack(errors)

    @torch.no_grad()
    def _find_reads(self) -> None:
        """What layers and the unembedding read on the prompt, and with all sources at zero."""
        whole = self.embedding.unsqueeze(0)
        self._reads = self._forward(whole, self._wholes)
        self._reads_of_biases = self._forward(torch.zeros_like(whole), self._biases)

    @cached_property
    def _graphs(self) -> list[_Graph]:
        """The local model with its graph, on prefixes of the prompt, which have the same weights."""
        found = []
        with torch.enable_grad(), in_float32(self.model):
            for ctx in sorted({-(-self.ctx * part // N_PREFIXES) for part in range(1, N_PREFIXES + 1)}):
                parts = (self.embedding.unsqueeze(0), *self._wholes)
                embedding, *written = (part[:, :ctx].detach().requires_grad_() for part in parts)
                found.append(_Graph(embedding, written, self._forward(embedding, written)))
        return found

    def _forward(self, embedding: Tensor, written: Sequence[Tensor]) -> list[Tensor]:
        """What each layer reads, and last the unembedding, where layers write `written` beside their skip paths, on
        as many positions as they have.
        """
        ctx = embedding.shape[1]
        reads = {layer.read.name: layer.read for layer in self.layers if layer.read is not None}
        with held(self.model, self._frozen.prefix(ctx)), capture(self.model, list(reads.values())) as acts:
            edits = {layer.write: _write(layer, own, acts) for layer, own in zip(self.layers, written, strict=True)}
            with edit(self.model, edits | {self._embed: lambda act: embedding.to(act.dtype)}):
                last = self.model.base_model(self.ids[:, :ctx], use_cache=False).last_hidden_state
        return [last if layer.read is None else acts[layer.read.name] for layer in self.layers] + [last]


def _write(layer: Layer, whole: Tensor, acts: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """`whole` in place of what the MLP writes, and the skip path of what has been read."""

    def at_site(act: Tensor) -> Tensor:
        skip = None if layer.read is None else layer.skip(acts[layer.read.name])
        return whole.to(act.dtype) if skip is None else (whole + skip).to(act.dtype)

    return at_site


def _check_values(
    cut: Cut, acts: Mapping[str, Tensor], position: Tensor, latent: Tensor, value: Float[Tensor, " n"]
) -> None:
    """Raises DictlearnError unless active latents are their pre-activations."""
    pre_acts = cut.dictionary.pre_activations(cut.dictionary.select_reads(acts))
    if pre_acts is None or not torch.allclose(pre_acts[0][position, latent], value, rtol=1e-3, atol=1e-4):
        raise DictlearnError(
            "Graphs need latents that are their pre-activations where they are active, those of "
            f"{cut.name} are not: take its for_inference()."
        )
