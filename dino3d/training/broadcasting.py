"""A state that rank 0 has read, on every rank: storage is read once, however many ranks there are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from utils import Processes


def broadcast_state(make: Callable[[], Any], processes: Processes) -> Any:
    """What make() gives on rank 0, on every rank: dicts, lists and tuples of tensors and of what pickle can store.

    Its tensors come one by one, bit for bit, and lie in CPU memory; on a GPU there is one of them at a time.
    Errors as of `Processes.run_on_main`.
    """
    if processes.world_size == 1:
        return processes.run_on_main(make)
    mine = []

    def outline() -> Any:
        mine.append(make())
        return map_tensors(mine[0], lambda tensor: tensor.detach().to("meta"))

    state = processes.run_on_main(outline)
    if not processes.is_main:
        return map_tensors(state, processes.broadcast)
    map_tensors(mine[0], processes.broadcast)
    return mine[0]


def map_tensors(state: Any, function: Callable[[Tensor], Any]) -> Any:
    """The state with function(tensor) for each tensor, in their order."""
    if isinstance(state, Tensor) and state.layout == torch.strided and not state.is_quantized:
        return function(state)
    if isinstance(state, dict):
        return {name: map_tensors(value, function) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)([map_tensors(value, function) for value in state])
    return state
