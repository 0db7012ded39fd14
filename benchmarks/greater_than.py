"""Greater-than by the weights of transcoders: `python benchmarks/greater_than.py RUN [--layer 3]`.

The analysis of Dunefsky et al. 2024 on the embedded LM, with the prompts "The war lasted from 17YY to 17", YY from
02 to 98. RUN is a training run with a transcoder at every MLP, such as
    python train.py experiment=single dictionary=transcoder 'sites=[mlp.0,mlp.1,mlp.2,mlp.3]' n_tokens=500_000 ...
Prints tables and writes benchmarks/results/greater_than.json; docs/transcoder_circuits.md is about them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hardware import hardware
from torch import Tensor

from dictlearn.circuits.decomposition import Decomposition, contributions, decompose, latent_reader, logit_reader
from dictlearn.circuits.dictionary_maps import decoder_rows
from dictlearn.circuits.heads import exact_head_effects
from dictlearn.circuits.pairs import NONE, PairBatch
from dictlearn.circuits.paths import greedy_paths
from dictlearn.circuits.weights import (
    LinearMaps,
    de_embedding,
    encoder_directions,
    linear_maps,
    logit_effects,
    through_heads,
)
from dictlearn.dictionaries import Dictionary
from dictlearn.hub import load
from dictlearn.lm import LM, load_lm, resolve
from dictlearn.lm.taps import activations, edit

ROOT = Path(__file__).parent.parent
TEXT = "The war lasted from 17{} to 17"
HALVES = [f"{half:02}" for half in range(100)]
YEARS = range(2, 99)
YY, END, N_SPECIAL = -3, -1, 1  # positions of the year's half and of the last token
SIZES = (1, 2, 4, 8, 16, 32, 64)


def prompts(lm: LM) -> tuple[PairBatch, Tensor]:
    """One pair for each year, the patch prompt's year being 01; and the ids of the halves."""
    tokenizer = lm.tokenizer
    rows = [tokenizer(TEXT.format(half), add_special_tokens=False).input_ids for half in HALVES]
    ids = torch.tensor([[tokenizer.bos_token_id, *row] for row in rows])
    halves = ids[:, YY]
    assert len(halves.unique()) == len(HALVES)
    assert torch.equal(ids[:, END], ids[0, END].expand(100))
    answers, wrong = (torch.full((len(YEARS), 100), NONE) for _ in range(2))
    for row, year in enumerate(YEARS):
        answers[row, : 99 - year] = halves[year + 1 :]
        wrong[row, : year + 1] = halves[: year + 1]
    clean = ids[list(YEARS)]
    patch = ids[[1]].expand_as(clean)
    return PairBatch(clean, patch, answers, wrong, "probability_difference", n_special=N_SPECIAL), halves


@torch.no_grad()
def value(lm: LM, batch: PairBatch, site: str = "embed", fn: Callable[[Tensor], Tensor] = torch.clone) -> float:
    """The mean metric with an edit at a site."""
    with edit(lm.model, {resolve(lm.model, site): fn}):
        return float(batch.value(lm.model(batch.clean).logits[:, -1]).mean())


@torch.no_grad()
def sites(lm: LM, batch: PairBatch) -> dict[str, float]:
    """The metric with one site patched from the prompt whose year is 01."""
    names = [f"{kind}.{layer}" for kind in ("attn_out", "mlp_out") for layer in range(4)]
    other = activations(lm.model, [resolve(lm.model, name) for name in names], batch.patch)
    return {name: value(lm, batch, name, lambda _, name=name: other[name].clone()) for name in names}


def at_end(act: Tensor, new: Tensor) -> Tensor:
    """`act` with other values at the last position."""
    return torch.cat([act[:, :-1], new[:, None].to(act)], dim=1)


class Parts:
    """An MLP's output at the last position as a sum over units, each prompt a row: latents, or neurons."""

    def __init__(self, lm: LM, batch: PairBatch, layer: int, transcoder: Dictionary | None) -> None:
        self.lm, self.batch, self.transcoder = lm, batch, transcoder
        read, self.site = (f"mlp_in.{layer}", f"mlp_out.{layer}") if transcoder else (f"mlp_hidden.{layer}",) * 2
        x = activations(lm.model, [resolve(lm.model, read)], batch.clean)[read][:, END].clone()
        self.values = transcoder.encode(x) if transcoder else x  # [n_prompts, n_units]
        self.order = self.values.var(0).argsort(descending=True)

    def metric(self, values: Tensor) -> float:
        new = values if self.transcoder is None else self.transcoder.decode(values)
        return value(self.lm, self.batch, self.site, lambda act: at_end(act, new))

    def best(self, n: int) -> float:
        """The metric with the `n` units of largest variance over the years; the others have their mean."""
        values = self.values.mean(0).expand_as(self.values).clone()
        values[:, self.order[:n]] = self.values[:, self.order[:n]]
        return self.metric(values)

    def without(self, unit: int) -> float:
        """The metric with one unit set to zero."""
        values = self.values.clone()
        values[:, unit] = 0
        return self.metric(values)


def spearman(x: Any, y: Any) -> float:
    return float(pd.Series(list(map(float, x))).corr(pd.Series(list(map(float, y))), method="spearman"))


def ranges(active: Tensor) -> str:
    """The years in which a latent has at least a tenth of its largest activation: "02-17 40"."""
    runs: list[list[int]] = []
    for year, act in zip(YEARS, active.tolist(), strict=True):
        if act < 0.1 * float(active.max()):
            continue
        if runs and runs[-1][1] == year - 1:
            runs[-1][1] = year
        else:
            runs.append([year, year])
    return " ".join(f"{first:02}" if first == last else f"{first:02}-{last:02}" for first, last in runs)


def latents(
    maps: LinearMaps, prompted: list[Decomposition], layer: int, best: list[int], halves: Tensor
) -> pd.DataFrame:
    """When latents of largest variance are active, and what they promote."""
    promoted = logit_effects(maps, decoder_rows(prompted[0].transcoders[layer].dictionary, torch.tensor(best)))
    rows = []
    for i, latent in enumerate(best):
        acts = torch.stack([prompt.transcoders[layer].latents[END, latent] for prompt in prompted])
        weights = promoted[i, halves]
        rows.append(
            {
                "latent": latent,
                "variance": float(acts.var()),
                "active_for": ranges(acts),
                "half_and_logit_weight": spearman(range(100), weights),
                "promotes": " ".join(HALVES[half] for half in sorted(weights.topk(5).indices.tolist())),
            }
        )
    return pd.DataFrame(rows)


def pulled_back(
    maps: LinearMaps,
    prompted: list[Decomposition],
    layer: int,
    best: list[int],
    halves: Tensor,
    head: tuple[int, int],
) -> pd.DataFrame:
    """Latents pulled back through the head to the year's token: rank correlations over the years of their
    activation with the year's own embedding and with what MLP 0 writes there; and the latent of MLP 0 that adds
    most.
    """
    first, own = prompted[0].transcoders[0].dictionary, prompted[0].transcoders[layer].dictionary
    pulled = through_heads(maps, head[0], encoder_directions(maps, own, torch.tensor(best)))[:, head[1]]
    tokens = de_embedding(maps, pulled)[:, halves[list(YEARS)]]
    virtual = pulled @ decoder_rows(first).to(pulled).T  # [n, n_latents of MLP 0]
    early = torch.stack([prompt.transcoders[0].latents[YY] for prompt in prompted])
    written = torch.stack([prompt.mlp_out[0][YY] for prompt in prompted]) @ pulled.T
    rows = []
    for i, latent in enumerate(best):
        acts = torch.stack([prompt.transcoders[layer].latents[END, latent] for prompt in prompted])
        most = int((early * virtual[i]).clamp_min(0).mean(0).argmax())
        direct = de_embedding(maps, encoder_directions(maps, first, torch.tensor([most])))[0, halves[list(YEARS)]]
        rows.append(
            {
                "latent": latent,
                "token_and_activation": spearman(tokens[i], acts),
                "mlp_0_and_activation": spearman(written[:, i], acts),
                "mlp_0_latent": most,
                "weight": float(virtual[i, most]),
                "its_active_for": ranges(early[:, most]),
                "its_de_embedding_and_activation": spearman(direct, early[:, most]),
            }
        )
    return pd.DataFrame(rows)


def bringers(prompted: list[Decomposition], layer: int, best: list[int], n_shown: int = 12) -> pd.DataFrame:
    """What of the latents' variance over the years each source of their pre-activations brings: its covariance
    with the pre-activation as a share of the variance. Of each latent the shares of all sources add up to 1; here
    are the `n_shown` that bring most, as the mean, the lowest and the highest of the latents.
    """
    ctx = prompted[0].ctx
    rows = []
    for latent in best:
        brought: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(prompted), dtype=torch.float64))
        for row, prompt in enumerate(prompted):
            for source, contribution in contributions(prompt, latent_reader(prompt, layer, latent, END)).items():
                name = source.kind if source.layer < 0 else f"{source.kind} {source.layer}"
                if source.kind == "head":
                    name += f".{source.index} from " + ("YY" if source.source == ctx + YY else "elsewhere")
                elif source.kind == "latent":
                    name = f"latents {source.layer}"
                brought[name][row] += contribution
        table = torch.stack(list(brought.values()))  # [n_sources, n_prompts]
        total = table.sum(0)
        share = (
            (table - table.mean(1, keepdim=True)) @ (total - total.mean()) / (total - total.mean()).square().sum()
        )
        rows += [{"source": name, "share": float(own)} for name, own in zip(brought, share, strict=True)]
    found = pd.DataFrame(rows).groupby("source").share.agg(["mean", "min", "max"])
    return found.sort_values("mean", ascending=False).head(n_shown).reset_index()


def replaced(ours: Parts, layer: int) -> dict[str, Any]:
    """The metric with the transcoder in place of the MLP, and without one of its latents."""
    active = (ours.values > 0).any(0).nonzero()[:, 0].tolist()
    without = pd.Series({latent: ours.without(latent) for latent in active}).sort_values()
    return {
        "model": value(ours.lm, ours.batch),
        f"transcoder in place of mlp.{layer}": ours.metric(ours.values),
        f"mlp.{layer} at its mean": ours.best(0),
        "without one latent": {
            "n_latents": len(active),
            "lowest": {"latent": int(without.index[0]), "metric": float(without.iloc[0])},
            "highest": {"latent": int(without.index[-1]), "metric": float(without.iloc[-1])},
        },
    }


def paths(prompt: Decomposition, layer: int, latent: int, year: int, halves: Tensor) -> dict[str, pd.DataFrame]:
    """Of a latent, and of the mean logit of later halves minus that of the others."""
    weights = torch.zeros(len(prompt.maps.unembedding))
    weights[halves[year + 1 :]] = 1 / (99 - year)
    weights[halves[: year + 1]] = -1 / (year + 1)
    roots = {"latent": latent_reader(prompt, layer, latent, END), "logits": logit_reader(prompt, weights)}
    return {
        f"paths_of_{name}": greedy_paths(prompt, root, n_paths=6, depth=4, n_special=N_SPECIAL).table()
        for name, root in roots.items()
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the training run")
    parser.add_argument("--layer", type=int, default=2, help="whose transcoder is looked at")
    parser.add_argument("--year", type=int, default=32, help="of the prompt whose paths are printed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    lm, layer = load_lm("embedded"), arguments.layer
    loaded = load(arguments.run)
    assert isinstance(loaded, Mapping)
    batch, halves = prompts(lm)
    effects = exact_head_effects(lm.model, batch)
    head = divmod(int(effects.argmin()), effects.shape[1])
    ours = Parts(lm, batch, layer, loaded[f"mlp_out.{layer}"])
    neurons = Parts(lm, batch, layer, None)
    maps = linear_maps(lm.model)
    prompted = [decompose(maps, dict(loaded), row[None]) for row in batch.clean]
    best = ours.order[:6].tolist()
    prompt = prompted[YEARS.index(arguments.year)]
    shown = max(best, key=lambda latent: float(prompt.transcoders[layer].latents[END, latent]))
    sizes = {name: [parts.best(n) for n in SIZES] for name, parts in (("latents", ours), ("neurons", neurons))}
    tables = {
        "sizes": pd.DataFrame({"units": SIZES, **sizes}),
        "latents": latents(maps, prompted, layer, best, halves),
        "pulled_back": pulled_back(maps, prompted, layer, best, halves, head),
        "bringers": bringers(prompted, layer, best),
        **paths(prompt, layer, shown, arguments.year, halves),
    }
    results: dict[str, Any] = {"hardware": hardware(), "layer": layer, "year": arguments.year}
    results |= {"patched": sites(lm, batch), "head_effects": effects.tolist(), "head": head}
    results |= {"metric": replaced(ours, layer), "paths_of_latent_root": shown}
    print(json.dumps(results, indent=1))
    for name, found in tables.items():
        print(f"\n{name}\n{found.to_string()}")
        results[name] = found.to_dict(orient="records")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "greater_than.json").write_text(json.dumps(rounded(results), indent=1) + "\n")


def rounded(found: Any) -> Any:
    if isinstance(found, float):
        return float(f"{found:.5g}")
    if isinstance(found, Mapping):
        return {key: rounded(part) for key, part in found.items()}
    return [rounded(part) for part in found] if isinstance(found, list | tuple) else found


if __name__ == "__main__":
    main()
