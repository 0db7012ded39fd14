"""A training step asks for nothing that would have to come back from a GPU: what does is seen on a CPU as well."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dictlearn.kernels import backend, encode, reference
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers import batch_top_k
from tests.dictionaries.pairs import PAIRS, data, empty

WAITING = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "equal", "_unique2")


class Watch(TorchDispatchMode):
    """Collects operations whose result is a number for Python, or has a size that only the device knows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = [t for part in args[1:2] if isinstance(part, list | tuple) for t in part]
        by_mask = name.startswith("index") and any(isinstance(t, Tensor) and t.dtype == torch.bool for t in indices)
        of_any_size = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or of_any_size:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "sparsifier"), PAIRS)
def test_a_step_does_not_wait(kind: str, sparsifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "use_native", lambda *_, **__: False)  # it looks at indices
    for module in (encode, batch_top_k):  # on a GPU it is Triton's
        monkeypatch.setattr(module, "top_entries", reference.top_entries)
    made = empty(kind, sparsifier)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    x, target = data(made)
    dead = torch.arange(0, 16, 3)
    made.step(x, target, torch.ones(len(made.writes)), dead)  # what is found once for the same dead latents
    rows = {name: row.detach().requires_grad_() for name, row in made.latent_rows(dead).items()}
    with Watch() as watch:
        made.at(0, 10)
        step = made.step(x, target, torch.ones(len(made.writes)), dead)
        object.__setattr__(step, "dead_rows", rows)
        parts = [*made.losses(step).values(), made.penalty(step), AuxK(k=2)(step)]
        torch.stack([part for part in parts if part is not None]).sum().backward()
        made.add_row_gradients_(dead, rows)
        made.project_gradient_()
        made.project_()
    assert watch.seen == []
