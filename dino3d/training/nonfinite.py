"""Steps whose loss or gradient is not finite: they change nothing, are counted, and end the run where they don't stop.

DDP's all-reduce gives every rank the same gradients, and so the same answer to whether their norm is finite: no rank
has to ask the others. The answer stays on the device, where whatever a step changes is guarded by it, so that the host
needn't wait for it; it is fetched every few steps only.
"""

import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dino3d.command_line import UserError, truncate_list
from dino3d.files import write_json
from utils import Processes

CHECK_EVERY = 10  # steps between looks at the counter; each look waits for the device


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step the optimizer if `finite`, a bool tensor () on its device; if not, weights and optimizer state stay as they
    are.

    The flag is handed over the way torch.amp.GradScaler does it: fused optimizers, and our LARS, read it on the device.
    """
    optimizer.found_inf = (~finite).float()
    optimizer.step()


class BuffersOfStep:
    """What the forward pass of models changes, as it was before: running means and variances of batch normalisation, in
    which one value that is not finite would stay for good."""

    def __init__(self, *models: nn.Module) -> None:
        training = (module for model in models for module in model.modules() if module.training)
        self._before = [(one, one.clone()) for module in training for one in module.buffers(recurse=False)]

    def undo_unless(self, finite: Tensor) -> None:
        """Put them back if not `finite`, a bool tensor () on their device."""
        for buffer, before in self._before:
            buffer.copy_(torch.where(finite, buffer, before))


class NonFiniteSteps:
    """Counts the steps in a row that were not finite. max_in_a_row: how many of them end the run."""

    def __init__(self, max_in_a_row: int, device: torch.device) -> None:
        self.max_in_a_row, self.every = max_in_a_row, min(max_in_a_row, CHECK_EVERY)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, finite: Tensor) -> None:
        """finite: of one more step, a bool tensor () on the device."""
        self._in_a_row = torch.where(finite, 0, self._in_a_row + 1)

    def too_many(self, step: int) -> bool:
        """Whether the run has to end, the same on all ranks; looked at in some steps only."""
        return step % self.every == 0 and self._in_a_row.item() >= self.max_in_a_row


def describe_sample(path: Path | str, loss: float | Tensor, **tensors: Tensor) -> dict[str, Any]:
    """What to tell of one sample: its file, its own loss, and the grey values of what was made of the file."""
    return {"file": str(path), "loss": _finite(loss)} | {
        name: tensor_statistics(values) for name, values in tensors.items()
    }


def tensor_statistics(values: Tensor) -> dict[str, float | None]:
    """Lowest, highest and mean of a tensor's finite values (None where there is none), and the share of the others."""
    finite = values[values.isfinite()].double()
    low, high, mean = (finite.min(), finite.max(), finite.mean()) if len(finite) else (math.nan,) * 3
    return {
        "min": _finite(low),
        "max": _finite(high),
        "mean": _finite(mean),
        "not_finite": 1 - len(finite) / values.numel(),
    }


def _finite(value: float | Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def abort_run(
    folder: Path, processes: Processes, step: int, max_in_a_row: int, samples: list[dict[str, Any]]
) -> NoReturn:
    """Write this rank's folder/skipped_batch_rank<r>.json, and raise UserError, on all ranks alike.

    samples: what `describe_sample` says of each sample of this rank's last batch
    """
    path = folder / f"skipped_batch_rank{processes.rank}.json"
    write_json(path, {"step": step, "rank": processes.rank, "samples": samples})
    broken = [
        sample["file"]
        for sample in samples
        if sample["loss"] is None or any(part["not_finite"] for part in sample.values() if isinstance(part, dict))
    ]
    broken = list(dict.fromkeys(file for part in processes.all_gather(broken) for file in part))
    why = (
        f"in the last batch it is {truncate_list(broken)}: look at it or leave it out"
        if broken
        else "no single file of the last batch is to blame: training has diverged; lower --lr or take --precision fp32"
    )
    raise UserError(
        f"at least {max_in_a_row} steps in a row were skipped up to step {step}, for a loss or gradient that is not "
        f"finite; {why}. The batch is described in {folder / 'skipped_batch_rank*.json'}; what was saved "
        "before is unharmed",
        everywhere=True,
    )
