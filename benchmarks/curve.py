"""The loss of the fast path beside a dense float32 reference: `python benchmarks/curve.py [--help]`.

Two sparse autoencoders start from the same weights and see the same batches of a residual stream of the embedded
LM: ours, with bfloat16 products, compact latents and fused steps, and one written out in dense float32 torch, from
Gao et al. 2024 (TopK, AuxK, unit decoder rows, clipping, Adam). Prints the mean reconstruction loss in each tenth
of the run, and the mean number of dead latents, to which the auxiliary term is proportional: one more or less is a
matter of chance. Writes benchmarks/results/curve.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from hardware import hardware
from torch import Tensor

from dictlearn.data import ActivationData, Batch, EmbeddedText
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import load_lm, resolve
from dictlearn.losses.aux_k import AuxK
from dictlearn.losses.recon import recon_loss
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import Learner, prepare
from dictlearn.training.optimizers import Adam, build_optimizer
from dictlearn.training.schedules import WarmupDecay
from dictlearn.types import Step

WINDOW = 50  # steps after which latents are judged anew; one that fired in it counts as alive at its end
EPS = 6.25e-10


class Dense:
    """The reference: every matrix full, everything in float32."""

    def __init__(self, start: dict[str, Tensor], k: int, variance: float, dead_after: int, lr: float) -> None:
        self.p = {name: value.clone().requires_grad_() for name, value in start.items()}
        self.k, self.variance, self.dead_after = k, variance, dead_after
        self.since_fired = torch.zeros(len(start["b_enc"]), dtype=torch.long)
        self.dead = torch.zeros(len(start["b_enc"]), dtype=torch.bool)
        self.fired, self.n_tokens = self.dead.clone(), 0  # since latents were last judged
        self.optimizer = torch.optim.Adam(self.p.values(), lr=lr, eps=EPS)
        self.lr, self.n_steps = lr, 0

    def step(self, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """The reconstruction loss before the step, and how many latents count as dead."""
        p = self.p
        pre_acts = x @ p["W_enc"] + p["b_enc"]
        latents = _top_k(pre_acts, self.k)
        recon = latents @ p["W_dec"] + p["b_dec"]
        loss = reconstruction = (x - recon).square().sum(-1).mean() / self.variance
        if self.n_steps % WINDOW == 0:
            self.since_fired = torch.where(self.fired, 0, self.since_fired + self.n_tokens)
            self.dead = self.since_fired >= self.dead_after
            self.fired, self.n_tokens = torch.zeros_like(self.dead), 0
        if n_dead := int(self.dead.sum()):
            residual, k_aux = (x - recon).detach(), x.shape[-1] // 2
            auxiliary = _top_k(pre_acts.masked_fill(~self.dead, -torch.inf), min(k_aux, n_dead)) @ p["W_dec"]
            fvu = (residual - auxiliary).square().sum() / (residual - residual.mean(0)).square().sum()
            loss = loss + fvu / 32 * min(1.0, n_dead / k_aux)
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad, rows = p["W_dec"].grad, p["W_dec"]
            assert grad is not None
            grad -= (grad * rows).sum(-1, keepdim=True) * rows
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        self.optimizer.param_groups[0]["lr"] = self.lr * factor
        self.optimizer.step()
        with torch.no_grad():
            p["W_dec"] /= p["W_dec"].norm(dim=-1, keepdim=True)
        self.fired |= (latents > 0).any(0)
        self.n_tokens += len(x)
        self.n_steps += 1
        return reconstruction.detach(), self.dead.sum()


class Probe:
    """A loss term that adds nothing and keeps what the reference returns, of every step."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []

    def __call__(self, step: Step) -> None:
        n_dead = 0 if step.dead is None else len(step.dead)
        self.found.append((recon_loss(step).detach(), torch.tensor(n_dead)))


def _top_k(pre_acts: Tensor, k: int) -> Tensor:
    values, indices = pre_acts.topk(k, dim=-1)
    return torch.zeros_like(pre_acts).scatter(-1, indices, values.relu())


def curves(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Of all steps, the loss and the number of dead latents [n_steps, 2]: ours, and the reference's."""
    lm = load_lm("embedded")
    site = resolve(lm.model, arguments.site)
    data = ActivationData(EmbeddedText(seed=1), lm, [site], arguments.batch_size, arguments.n_tokens, seed=0)
    width = 128
    sae = Linear(
        width, width, arguments.expansion * width, TopK(arguments.k), reads=[site.name], writes=[site.name]
    )
    statistics = data.statistics()
    variance = prepare(sae, statistics, "mean_norm", torch.Generator().manual_seed(0))
    dead_after = arguments.n_tokens // 10
    start = {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    adam = Adam(lr=None, lr_factor=arguments.lr_factor, betas=(0.9, 0.999), eps=EPS, clip_norm=1.0)
    reference = Dense(start, arguments.k, float(variance), dead_after, adam.peak_lr(sae))
    probe = Probe()
    terms = {"aux_k": AuxK(), "probe": probe}
    learner = Learner(site.name, sae, terms, variance, dead_after, clip_norm=1.0)
    optimizer = build_optimizer([(sae, adam)])
    stream = data.train_dataloader()
    schedule, theirs = WarmupDecay(1000, 0.2), []
    for step, batch in enumerate(stream):
        assert isinstance(batch, Batch)
        factor = schedule.factor(step, len(stream))
        if step % WINDOW == 0 and step:
            learner.statistics.flush()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = learner.loss(batch)
        loss.backward()
        learner.clip_gradients_()
        optimizer.param_groups[0]["lr"] = adam.peak_lr(sae) * factor
        optimizer.step()
        optimizer.zero_grad()
        sae.project_()
        theirs.append(reference.step(batch.acts[site.name] * sae.read_scale, factor))
    return torch.tensor(probe.found), torch.tensor(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", default="resid_post.2")
    parser.add_argument("--n-tokens", type=int, default=2_000_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lr-factor", type=float, default=3.0)
    arguments = parser.parse_args()
    tenths = [[part.mean(0).tolist() for part in steps.tensor_split(10)] for steps in curves(arguments)]
    print("tenth      ours   dense float32   difference   dead, ours   dead, dense")
    for i, ((ours, our_dead), (dense, dead)) in enumerate(zip(*tenths, strict=True), 1):
        print(f"{i:5} {ours:9.5f} {dense:15.5f} {ours / dense - 1:12.2%} {our_dead:12.1f} {dead:13.1f}")
    out = Path(__file__).parent / "results" / "curve.json"
    result = {"hardware": hardware(), "arguments": vars(arguments), "ours": tenths[0], "dense_float32": tenths[1]}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
