"""Parameters sharded over processes with torch's ``fully_shard``: the same code on GPUs and on CPUs.

accelerate does not shard on CPUs, and only sharded runs can read its sharded checkpoints. So
the Trainer gets a model that is sharded already, and checkpoints contain whole tensors, which every run can read,
sharded or not, with any number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Sharded", "shard", "spread_optimizer_state", "whole", "whole_optimizer_state"]


class Sharded(nn.Module):
    """A wrapper of the sharded model, so that the Trainer does not wrap it again.

    Args:
        model: the model that :func:`shard` took.

    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sharded = model

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the model."""
        return self.sharded(*args, **inputs)


def shard(model: Any, device: torch.device, world: int) -> None:
    """Shard the parameters of ``model`` (a two-task model on ``device``) in place.

    A block of the encoder or decoder is gathered when it runs. The parameters outside the blocks (the
    embeddings, which are tied to the LM head in some students) are gathered when the model runs. Every process
    must make the same passes. Gradients are averaged over processes, as with DDP.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    core = model.core
    for block in [*core.get_encoder().block, *core.get_decoder().block]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Any) -> Any:
    """Return a tensor on the CPU, gathered if it is sharded; then every process must call this."""
    if not isinstance(value, Tensor):
        return value
    gathered = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered.detach().cpu()


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` with whole tensors; every process must call this."""
    state: dict[str, Any] = optimizer.state_dict()
    moments = {
        index: {name: whole(value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


def spread_optimizer_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return whole ``state`` with each tensor sharded like its parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    spread: dict[int, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        parameter = parameters[int(index)]
        spread[index] = {
            name: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in entry.items()
        }
    return {**state, "state": spread}
