from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

from comfy_api.latest import io


def within_limits(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Holds the numbers that a node's ``execute`` is given to the limits of its schema. ComfyUI does so with
    what is in its widgets, and not with what another node gives.

    Raises:
        ValueError: a number is outside its limits, or NaN.
    """
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(cls: type[io.ComfyNode], *args, **kwargs) -> io.NodeOutput:
        schema = cls.define_schema()
        _check(schema.display_name, schema.inputs, signature.bind(cls, *args, **kwargs).arguments)
        return execute(cls, *args, **kwargs)

    return checked


def _check(node: str, inputs: Sequence[io.Input], values: Mapping[str, object]) -> None:
    for widget in inputs:
        value = values.get(widget.id)
        if value is None:
            continue
        if isinstance(widget, io.DynamicCombo.Input):
            chosen = (option.inputs for option in widget.options if option.key == value[widget.id])
            _check(node, next(chosen, ()), value)
        elif isinstance(widget, io.Int.Input | io.Float.Input) and not widget.min <= value <= widget.max:
            raise ValueError(f'{node}: "{widget.id}" is {value}; it goes from {widget.min} to {widget.max}.')
