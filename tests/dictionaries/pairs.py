"""Every registered dictionary with every registered sparsifier that it takes."""

import torch
from torch import Tensor

from dictlearn.data import SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.registry import kinds, lookup

DICTIONARIES, SPARSIFIERS = kinds("dictlearn.dictionaries"), kinds("dictlearn.sparsifiers")
PAIRS = [(d, s) for d in DICTIONARIES for s in SPARSIFIERS if d != "gated" or s == "relu"]


def empty(kind: str, sparsifier: str) -> Dictionary:
    """Before its start, with as many latents as the kind's `tiny()`."""
    tiny = lookup("dictlearn.dictionaries", kind).tiny()
    changed = {"sparsifier": lookup("dictlearn.sparsifiers", sparsifier).tiny(), "decoder_norm": None}
    return type(tiny)(**tiny.config() | changed)


def trained(kind: str, sparsifier: str) -> Dictionary:
    """Any weights on the constraint set, in scales of its own, with a threshold where it is learnt from batches."""
    made = empty(kind, sparsifier)
    for name, parameter in made.named_parameters():
        if not name.startswith("sparsifier."):
            parameter.data.normal_()
    made.project_()
    made.read_scale.copy_(torch.linspace(0.5, 0.9, len(made.reads)))
    made.write_scale.copy_(torch.linspace(1.3, 2.0, len(made.writes)))
    made.set_unit_(torch.linspace(1.0, 1.5, len(made.reads)))
    for _ in range(3):
        x, target = data(made)
        made.step(x, target, torch.ones(len(made.writes)))
    return made


def data(made: Dictionary, n_tokens: int = 60, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What it reads and its target, about means that are not zero; an autoencoder's are the same."""
    reads = [len(made.reads)] * made.site_axis + [made.d_in]
    writes = [len(made.writes)] * made.site_axis + [made.d_out]
    x = scale * (torch.randn(n_tokens, *reads) + torch.linspace(-1, 1, made.d_in))
    y = x if made.is_autoencoder else scale * (torch.randn(n_tokens, *writes) + torch.linspace(0, 2, made.d_out))
    return x, y


def statistics(made: Dictionary, x: Tensor, target: Tensor) -> dict[str, SiteStatistics]:
    """Of the activations, by site."""
    per_site = {}
    for sites, acts in ((made.reads, x), (made.writes, target)):
        for site, own in zip(sites, acts.unbind(-2) if made.site_axis else [acts], strict=True):
            own = own.double()
            per_site[site] = SiteStatistics(
                mean_norm=float(own.norm(dim=-1).mean()),
                mean=own.mean(0),
                variance=float((own - own.mean(0)).square().sum(-1).mean()),
                n_tokens=len(own),
                median_norm=float(own.norm(dim=-1).median()),
                n_filtered=0,
                layer_norm_mean=own.mean(0),
                layer_norm_variance=1.0,
            )
    return per_site
