"""FVU of PCA with as many components as a dictionary has active latents: `python benchmarks/pca.py RUN_DIR`.

The components are fitted on training text and judged on the held-out text of the run, as the dictionaries are.
Prints, per dictionary, its FVU, PCA's at the same L0 and their ratio; `--out FILE.json` writes them as well
(results/pca.json is of `python train.py`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from dictlearn.config import build
from dictlearn.data import ActivationData
from dictlearn.lm import load_lm, resolve

N_TOKENS = 200_000  # to fit on, and to judge on


def rows_of_acts(data: ActivationData, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """Counted activations by site, `[n_tokens, d]` float64."""
    parts: dict[str, list[torch.Tensor]] = {site.name: [] for site in data.sites}
    for rows, counted in zip(tokens.split(32), mask.split(32), strict=True):
        for site, acts in data.read(rows).items():
            parts[site].append(acts[counted].double())
    return {site: torch.cat(found).numpy() for site, found in parts.items()}


def fvu_of_pca(train: np.ndarray, heldout: np.ndarray, n_components: int) -> float:
    """Of `heldout` about its own mean, in the components and about the mean of `train`, both `[n_tokens, d]`."""
    components = np.linalg.eigh(np.cov(train.T))[1][:, -n_components:]  # [d, n_components]
    centred = heldout - train.mean(0)
    residual = centred - centred @ components @ components.T
    return float((residual**2).sum() / ((heldout - heldout.mean(0)) ** 2).sum())


def main(run_dir: Path, out: Path | None) -> None:
    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    reports = [json.loads(path.read_text()) for path in sorted(run_dir.glob("dictionaries/*/report.json"))]
    lm = load_lm(cfg.lm.name, cfg.lm.revision, cfg.lm.dtype)
    sites = [resolve(lm.model, name) for name in dict.fromkeys(r["dictionary"]["writes"][0] for r in reports)]
    data = ActivationData(build(cfg.data), lm, sites, cfg.batch_size, cfg.n_tokens)
    tokens = data.store.rows(0, data.store.wait_counted(N_TOKENS))
    fitted_on = rows_of_acts(data, tokens, data.store.mask(tokens))
    heldout = data.heldout(N_TOKENS)
    judged_on = rows_of_acts(data, heldout.tokens, heldout.mask)
    table = {}
    for report in reports:
        site, l0 = report["dictionary"]["writes"][0], round(report["sparsity"]["l0"]["mean"])
        pca, ours = fvu_of_pca(fitted_on[site], judged_on[site], l0), report["reconstruction"]["fvu"]
        table[report["dictionary"]["name"]] = {"components": l0, "fvu": ours, "fvu_pca": pca, "ratio": ours / pca}
        print(f"{report['dictionary']['name']:>14}  FVU {ours:.4f}  PCA({l0}) {pca:.4f}  ratio {ours / pca:.3f}")
    if out is not None:
        out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="FVU of PCA with as many components as dictionaries have L0.")
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    main(given.run_dir, given.out)
