"""Files of the peers, both ways: `python benchmarks/peers_formats.py`.

SAELens, dictionary_learning, sparsify and circuit-tracer, each in an environment of its own, write tiny
dictionaries of random weights of every kind that they have, and we read them; we write what we have read in the
peer's format, and the peer reads that. What the reader computes on random inputs is compared with what the writer
does: the largest difference of latents and of reconstructions, as a share of the largest value, which must be at
most 1e-5. Dictionaries that a peer lacks must be refused, when we write them or when it reads them. Prints a table,
writes benchmarks/results/peers_formats.json where all peers have run, and exits with 1 where that does not hold or
a peer could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from contenders import ENVIRONMENT
from environments import PACKAGES, READERS, Unavailable, python_of
from equal_l0 import write_json
from formats_lacking import lacking
from hardware import hardware
from table import table

from dictlearn import load
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.load import save
from dictlearn.registry import kind_of
from dictlearn.types import DictlearnError

FOLDER = Path(__file__).parent
MOST_DIFFERENCE = 1e-5
FORMATS = {
    "saelens": "native",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
    "circuit_tracer": "circuit_tracer",
}
THEY, WE = "they write, we read", "we write, they read"
REFUSED = {  # of what the peers write, this is refused: the direction, by peer and kind
    ("saelens", "transcoder (layer_norm)"): THEY,
    ("saelens", "standard (expected_average_only_in)"): THEY,
    ("saelens", "matching_pursuit"): THEY,
    ("saelens", "temporal"): THEY,
    ("circuit_tracer", "JumpReLU set (thresholds below 0)"): THEY,
    ("circuit_tracer", "JumpReLU cross-layer (thresholds below 0)"): THEY,
    ("circuit_tracer", "TopK set"): WE,
}
LACKING = "what it has not"
NOTES = [
    "SAELens: gated dictionaries are written as jumprelu. Its converters of other formats, some of them wrong, are "
    "not used: each format is written and read by its own peer.",
    "dictionary_learning: its loader gives the decoders of AutoEncoder unit norm, and what it loads back counts. "
    "Gated, BatchTopK and Matryoshka dictionaries are written as its JumpReluAutoEncoder, ReLU as AutoEncoderNew.",
    "sparsify: 1.3.3 has no signed latents any more and takes them for TopK's, so they are not written.",
    "circuit-tracer: what PyPI has is a fork, 0.5.0. It saves no k, and loads sets whose configuration says TopK "
    "as ReLU ones (the original loads them since its pull request 94), so none is written. It neither saves nor "
    "loads the skip path that its cross-layer transcoders have. Its JumpReLU lets latents be negative where the "
    "threshold is, and such files are refused.",
]


class Exchange(NamedTuple):
    """One direction: the largest difference, or why the dictionary was refused, and by whom."""

    difference: float | None = None
    refused: str | None = None


def run_peer(peer: str, action: str, folder: Path) -> dict[str, str | None]:
    """What formats_worker.py says it has done. Raises Unavailable where it cannot."""
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    command = [python_of(peer), str(FOLDER / "formats_worker.py"), peer, action, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise Unavailable((result.stderr.strip().splitlines() or ["it ended"])[-1])
    return json.loads((folder / f"{action}.json").read_text())


def layers_of(folder: Path) -> list[Dictionary]:
    """The dictionary in a folder, or one for each layer of a set."""
    files = sorted(folder.glob("layer_*.safetensors")) or [folder]
    found = [load(file) for file in files]
    assert all(isinstance(dictionary, Dictionary) for dictionary in found)
    return found  # pyright: ignore[reportReturnType]


@torch.no_grad()
def compute(layers: Sequence[Dictionary], x: torch.Tensor) -> dict[str, np.ndarray]:
    """Latents, side by side, and reconstruction; of a set from x [n, n_layers, d]."""
    if len(layers) == 1:
        out = layers[0](x)
        return {"latents": out.latents.numpy(), "recon": out.recon.numpy()}
    outs = [layer(x[:, i]) for i, layer in enumerate(layers)]
    latents, recon = torch.cat([out.latents for out in outs], -1), torch.stack([out.recon for out in outs], 1)
    return {"latents": latents.numpy(), "recon": recon.numpy()}


def difference(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """The largest one of latents and reconstruction, as a share of the largest value expected of each."""
    shares = []
    for key in ("latents", "recon"):
        a, b = expected[key], found[key]
        shares.append(float(np.abs(a - b).max() / np.abs(a).max()) if a.shape == b.shape else np.inf)
    return float(np.max(shares))  # NaN where there is one


def read_theirs(folder: Path, kind: str) -> tuple[Exchange, list[Dictionary]]:
    """Ours of a peer's files, beside what the peer computes."""
    try:
        layers = layers_of(folder / kind)
    except DictlearnError as error:
        return Exchange(refused=f"by us: {error}".replace(f"{folder}{os.sep}", "")), []
    with np.load(folder / f"{kind}.npz") as theirs:
        return Exchange(difference(theirs, compute(layers, torch.from_numpy(theirs["x"])))), layers


def write_ours(peer: str, layers: Sequence[Dictionary], folder: Path, kind: str) -> Exchange | None:
    """Write the files, and beside them what we compute on random inputs; where that is refused, why."""
    generator = torch.Generator().manual_seed(0)
    many = len(layers) > 1 or layers[0].site_axis
    n_reads = (max(len(layers), len(layers[0].reads)),) if many else ()
    x = torch.randn(200, *n_reads, layers[0].d_in, generator=generator)
    of_layers = "_clt" if peer == "circuit_tracer" and kind_of(layers[0]) == "cross_layer" else ""
    try:
        for layer in layers:
            save(layer, folder / kind, format=FORMATS[peer] + of_layers)
    except DictlearnError as error:
        shutil.rmtree(folder / kind, ignore_errors=True)
        return Exchange(refused=f"by us: {error}".replace(f"{folder}{os.sep}", ""))
    computed = compute(layers, x)
    np.savez(folder / f"{kind}.npz", x=x.numpy(), latents=computed["latents"], recon=computed["recon"])
    return None


def exchange(peer: str, work: Path) -> list[dict[str, Any]]:
    """A row for each kind. Raises Unavailable where the peer cannot be installed or run."""
    theirs, ours = work / peer / "theirs", work / peer / "ours"
    for folder in (theirs, ours):
        folder.mkdir(parents=True)
    rows: dict[str, dict[str, Any]] = {}
    for kind, failed in run_peer(peer, "write", theirs).items():
        found, layers = (Exchange(refused=f"by the peer: {failed}"), []) if failed else read_theirs(theirs, kind)
        group = kind.partition(",")[0]
        rows[kind] = {
            "peer": peer,
            "group": group,
            "kind": kind,
            "expected": REFUSED.get((peer, group)),
            THEY: found,
        }
        rows[kind][WE] = write_ours(peer, layers, ours, kind) if layers else Exchange()
    for kind, dictionary in lacking(peer).items():
        rows[kind] = {"peer": peer, "group": LACKING, "kind": kind, "expected": WE, THEY: Exchange()}
        rows[kind][WE] = write_ours(peer, [dictionary], ours, kind)
    for kind, failed in run_peer(peer, "read", ours).items():
        if failed:
            rows[kind][WE] = Exchange(refused=f"by the peer: {failed}")
            continue
        with np.load(ours / f"{kind}.npz") as expected, np.load(ours / f"{kind}.read.npz") as found:
            rows[kind][WE] = Exchange(difference(expected, found))
    return list(rows.values())


def is_right(row: Mapping[str, Any]) -> bool:
    """Nothing is refused but what is expected to be, and what is not refused is the same."""
    ways = {way: row[way] for way in (THEY, WE) if row[way] != Exchange()}
    return all(
        row["expected"] == way if found.refused else found.difference <= MOST_DIFFERENCE
        for way, found in ways.items()
    )


def cell(exchanges: Sequence[Exchange]) -> str:
    """The largest difference of several variants."""
    if refused := [found.refused for found in exchanges if found.refused]:
        by_us = {text.startswith("by us") for text in refused}
        return "refused" if len(by_us) == 2 else "refused by us" if True in by_us else "refused there"
    differences = [found.difference for found in exchanges if found.difference is not None]
    return f"{np.max(differences):.1e}" if differences else "-"


def show(rows: Sequence[Mapping[str, Any]], absent: Mapping[str, str]) -> None:
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["peer"], row["group"]), []).append(row)
    lines = [
        [f"{peer}: {group}", str(len(own)), *(cell([row[way] for row in own]) for way in (THEY, WE))]
        for (peer, group), own in grouped.items()
    ]
    lines += [[f"{peer}: {why}", "-", "-", "-"] for peer, why in absent.items()]
    print(table("Largest difference, as a share of the largest value", ["peer: kind", "variants", THEY, WE], lines))
    print("\nRefused:")
    for row in rows:
        for way in (THEY, WE):
            if row[way].refused:
                print(f"  {row['peer']}: {row['kind']}: {row[way].refused}")
    print("", *NOTES, sep="\n")
    for row in rows:
        if not is_right(row):
            print(f"NOT RIGHT: {row}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(FORMATS))
    parser.add_argument("--work", type=Path, help="a new folder to keep all files in")
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    arguments = parser.parse_args(argv)
    work = (arguments.work or Path(tempfile.mkdtemp())).absolute()
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    try:
        for peer in filter(None, arguments.peers.split(",")):
            try:
                rows += exchange(peer, work)
            except Unavailable as error:
                absent[peer] = str(error)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    show(rows, absent)
    if {row["peer"] for row in rows} == set(FORMATS):
        write_report(rows, arguments.out)
    return int(bool(absent) or not all(map(is_right, rows)))


def write_report(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Of all peers: those of a few would take the place of all others."""
    report = {
        "hardware": hardware(),
        "peers": {**PACKAGES, **READERS},
        "most_difference": MOST_DIFFERENCE,
        "rows": [{**row, THEY: row[THEY]._asdict(), WE: row[WE]._asdict()} for row in rows],
        "notes": NOTES,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(report, folder / "peers_formats.json")


if __name__ == "__main__":
    sys.exit(main())
