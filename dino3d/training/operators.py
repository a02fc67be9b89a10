"""Counts the operators of a training step that compute something, by the part of the step that they belong to."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

CASTS = "aten::_to_copy"
# They make or name memory, and compute nothing
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view"}
FREE |= {"lift_fresh", "promote_types", "_record_function_enter_new", "_record_function_exit", "record_stream"}


class OperatorCounter(TorchDispatchMode):
    """Counts what runs inside it: {(part, operator): number}. Views and new memory don't count; a foreach or fused
    operator on many tensors counts once.

    inside: name of the function whose calls are told apart; others are not counted
    parts: {module, or name of a function that is called within it: part}; the innermost call tells
    """

    def __init__(self, inside: str, parts: Mapping[str | nn.Module, str]) -> None:
        super().__init__()
        self.inside, self.parts, self.counts = inside, parts, Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, schema = operator.name().split(".")[0], operator._schema
        is_view = any(one.alias_info and not one.alias_info.is_write for one in schema.arguments)
        if not is_view and name.rpartition("::")[2] not in FREE:
            part = self.part()
            if part is not None:
                self.counts[part, name] += 1
        return operator(*args, **kwargs or {})

    def part(self) -> str | None:
        frame, part = sys._getframe(2), None
        while frame is not None and frame.f_code.co_name != self.inside:
            if part is None:
                owner = frame.f_locals.get("self")
                part = self.parts.get(frame.f_code.co_name)
                part = part or (self.parts.get(owner) if isinstance(owner, nn.Module) else None)
            frame = frame.f_back
        return None if frame is None else part or "the rest"


def count_operators(
    call: Callable[[], Any], inside: str, parts: Mapping[str | nn.Module, str]
) -> dict[str, dict[str, int]]:
    """{part: {"operators": number, "casts": those of them that only change the precision}}, most first, and "all".

    call: what is counted, at its second call: an optimizer makes its state in the first; inside, parts: see
    `OperatorCounter`
    """
    call()
    with OperatorCounter(inside, parts) as counter:
        call()
    table = {}
    for (part, name), number in counter.counts.items():
        for row in (table.setdefault(one, {"operators": 0, "casts": 0}) for one in ("all", part)):
            row["operators"] += number
            row["casts"] += number * (name == CASTS or name == "aten::_foreach_copy_")
    return dict(sorted(table.items(), key=lambda item: -item[1]["operators"]))
