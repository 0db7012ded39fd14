"""Batches of planted sparse data, for training without a language model."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dictlearn.data import Batch, SiteStatistics
from dictlearn.dictionaries.linear import Linear
from dictlearn.kernels import layer_norm
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import Learner, prepare
from dictlearn.training.module import Member
from dictlearn.training.optimizers import Adam
from dictlearn.training.schedules import WarmupDecay

D, N_FEATURES = 16, 48


class PlantedStream:
    """`n_steps` batches of x = sum f_i d_i + mean + noise; the position is its state, as a token stream's is."""

    def __init__(self, n_steps: int, batch_size: int = 128, seed: int = 0) -> None:
        self.n_steps, self.batch_size, self.seed = n_steps, batch_size, seed
        self.position = 0
        make = torch.Generator().manual_seed(123)
        self.features = torch.nn.functional.normalize(torch.randn(N_FEATURES, D, generator=make), dim=-1)
        self.mean = torch.randn(D, generator=make)

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Batch]:
        while self.position < self.n_steps:
            batch = self.batch(self.position)
            self.position += 1
            yield batch
        self.position = 0

    def batch(self, index: int) -> Batch:
        make = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        active = torch.rand(self.batch_size, N_FEATURES, generator=make) < 0.06
        values = active * (0.5 + torch.rand(self.batch_size, N_FEATURES, generator=make))
        noise = 0.02 * torch.randn(self.batch_size, D, generator=make)
        x = values @ self.features + self.mean + noise
        index_ = torch.arange(self.batch_size)
        return Batch({"x": x, "y": x.flip(-1).tanh()}, index_, index_, index_)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def sample(self, n_batches: int = 20, first: int = 10_000) -> Tensor:
        return torch.cat([self.batch(first + i).acts["x"] for i in range(n_batches)])

    def statistics(self) -> dict[str, SiteStatistics]:
        found = {}
        for site in ("x", "y"):
            acts = torch.cat([self.batch(20_000 + i).acts[site] for i in range(20)]).double()
            spread = float((acts - acts.mean(0)).square().sum(-1).mean())
            norms, z = acts.norm(dim=-1), layer_norm(acts).z
            found[site] = SiteStatistics(
                mean_norm=float(norms.mean()),
                mean=acts.mean(0),
                variance=spread,
                n_tokens=len(acts),
                median_norm=float(norms.median()),
                n_filtered=0,
                layer_norm_mean=z.mean(0),
                layer_norm_variance=float((z - z.mean(0)).square().sum(-1).mean()),
            )
        return found


def member(
    name: str = "x",
    reads: str = "x",
    writes: str = "x",
    k: int = 4,
    lr: float = 3e-3,
    clip_norm: float | None = 1.0,
    dead_after: int = 2_000,
    seed: int = 0,
    sparsifier: Sparsifier | None = None,
) -> Member:
    dictionary = Linear(D, D, 64, sparsifier or TopK(k), reads=[reads], writes=[writes])
    statistics = PlantedStream(1).statistics()
    variance = prepare(dictionary, statistics, "mean_norm", torch.Generator().manual_seed(seed))
    learner = Learner(name, dictionary, {"aux_k": AuxK()}, variance, dead_after, clip_norm)
    return Member(learner, Adam(lr, 1.0, (0.9, 0.999), 6.25e-10, clip_norm), WarmupDecay(1000, 0.2))
