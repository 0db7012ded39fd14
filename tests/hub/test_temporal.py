"""Temporal autoencoders: known, and refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dictlearn
from dictlearn.types import FormatError

D, N = 4, 8
CONFIG = """
llm: {dimin: 4}
sae: {exp_factor: 2, n_heads: 2, n_attn_layers: 1, bottleneck_factor: 2, sae_diff_type: topk, kval_topk: 3,
  tied_weights: false, scaling_factor: 0.029}
data: {dtype: float32}
"""


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    w = {"D": torch.randn(N, D), "b": torch.randn(D), "E": torch.randn(D, N)}
    for name, width in {"k_ctx": N // 2, "q_target": N // 2, "v_ctx": N, "c_proj": N}.items():
        w[f"attn_layers.0.{name}.weight"], w[f"attn_layers.0.{name}.bias"] = (
            torch.randn(width, N),
            torch.randn(width),
        )
    save_file(w, folder / "latest_ckpt.safetensors")
    (folder / "conf.yaml").write_text(CONFIG)


@pytest.mark.parametrize("below", [True, False])
def test_it_is_refused_with_the_reason(tmp_path: Path, below: bool) -> None:
    folder = tmp_path / "llama-3.1-8B" / "layer_15" / "temporal"
    write(folder)
    reason = "is not supported because its latents depend on earlier tokens of the sequence"
    with pytest.raises(FormatError, match=f"temporal: a temporal autoencoder {reason}"):
        dictlearn.load(tmp_path if below else folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("llm: {dimin: 4}", "must be of exactly one known format; it is none"),
        ("[1, 2]", r"conf\.yaml must hold a mapping, found list"),
        ("llm: [", r"conf\.yaml is not valid YAML"),
        ("llm: !!python/object/apply:print [run]", r"conf\.yaml is not valid YAML"),
    ],
)
def test_configurations_of_nothing_known(
    tmp_path: Path, config: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "temporal")
    (tmp_path / "temporal" / "conf.yaml").write_text(config)
    with pytest.raises(FormatError, match=message):
        dictlearn.load(tmp_path / "temporal")
    assert "run" not in capsys.readouterr().out
