"""What every reader is given, and what it gives."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Protocol

from comfy.model_management import InterruptProcessingException
from torch import Tensor, nn

from ...architectures import Family
from ...concepts import ConceptTokens
from ...geometry import Grid


@dataclass(frozen=True)
class Look:
    """What to read of a call.

    Attributes:
        tokens: the concepts.
        layers: the layers whose scores are wanted.
        spaces: what is scored, out of the reader's ``SPACES``.
        attend_image, attend_concepts: the keys of the concepts' attention (the paper's Table 3; both on is
            the method). With neither, a concept's output is its own value.
        known: what readings of one run keep from call to call; None if the model's weights change meanwhile.
    """

    tokens: ConceptTokens
    layers: tuple[int, ...]
    spaces: tuple[str, ...] = ("output",)
    attend_image: bool = True
    attend_concepts: bool = True
    known: dict | None = None


class ModelCall:
    """A call of a model as it was met by a wrapper around ``function``."""

    def __init__(self, function: Callable, args: Sequence, kwargs: dict) -> None:
        self.arguments = named(function, args, kwargs)
        self.function = function
        self._args, self._kwargs = args, kwargs

    @property
    def x(self) -> Tensor:
        """The latent: a model's first argument, whatever its name; of a video with sound, the video."""
        latent = next(iter(self.arguments.values()))
        return latent if isinstance(latent, Tensor) else latent[0]

    @property
    def options(self) -> dict:
        return self.arguments.get("transformer_options") or {}

    def with_options(self, options: dict) -> tuple[list, dict]:
        """The call's arguments as they were given, but for its ``transformer_options``: other wrappers may
        have other names for them."""
        args, kwargs = list(self._args), dict(self._kwargs)
        names = list(inspect.signature(self.function).parameters)
        place = names.index("transformer_options") if "transformer_options" in names else len(args)
        if place < len(args):
            args[place] = options
        else:
            kwargs["transformer_options"] = options
        return args, kwargs


def named(function: Callable, args: Sequence, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name; those of a ``*args`` by their number."""
    signature = _signature(function)
    bound = signature.bind(*args, **kwargs).arguments
    found: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({str(i): v for i, v in enumerate(value)})
        else:
            found[name] = value
    return found


_signatures: weakref.WeakKeyDictionary[Callable, inspect.Signature] = weakref.WeakKeyDictionary()


def _signature(function: Callable) -> inspect.Signature:
    """Those of methods are remembered: a model calls its blocks' again and again, and it takes longer to find
    out about their arguments than to name them."""
    if not inspect.ismethod(function):
        return inspect.signature(function)
    if function.__func__ not in _signatures:
        _signatures[function.__func__] = inspect.signature(function)
    return _signatures[function.__func__]


def uncompiled(module: nn.Module) -> nn.Module:
    """What torch.compile made ``module`` of, which knows the names of its arguments; or ``module`` itself."""
    return getattr(module, "_orig_mod", module)


class Guard:
    """Keeps a call of the model from what fails while it is watched. What ``failed`` does not take is raised;
    so are what ComfyUI raises when the user cancels, and all that is no ``Exception``."""

    def __init__(self, failed: Callable[[Exception], bool]) -> None:
        self.broken = False
        self._failed = failed

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        # What ComfyUI raises when the user cancels is an Exception up to 0.19.
        if not isinstance(error, Exception) or isinstance(error, InterruptProcessingException):
            return False
        self.broken = True
        return self._failed(error)


class Complete(BaseException):
    """Ends a call whose last layer has been read, where its result is of no use. Not an ``Exception``: no
    other node's code on the way should take it for a failure that it can handle.

    What is skipped is the rest of the model's own forward pass: blocks, which keep no state between calls,
    and the patches in them. Offloaded weights are cast and released within each layer's call, never across
    layers; families whose models hold something open across layers say so (``Family.may_stop``). What comes
    after the model (ControlNets, hooks, offloading) goes on as if it had returned.
    """


class RunningOrder:
    """How far a call has been read: block by block, up to the ``last`` that is wanted. Once another block ran
    than was due (other nodes leave blocks out, as caches do), no more is read."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._due = 0
        self._other: int | None = None

    @property
    def complete(self) -> bool:
        return self._due > self._last

    @property
    def gap(self) -> str | None:
        """Why it is not complete, if it will not be any more when the call has ended."""
        if self.complete:
            return None
        if self._other is None:
            return f"block {self._due} did not run"
        return f"block {self._other} ran where block {self._due} was due"

    def enters(self, block: int) -> bool:
        """Whether the ``block`` that runs now is to be read."""
        if self.complete or self._other is not None:
            return False
        if block != self._due:
            self._other = block
        return block == self._due

    def left(self) -> None:
        """The block that was due has been read."""
        self._due += 1


class Reading(Protocol):
    """One call of the model as it is read.

    Args:
        model: the diffusion model.
        rows: the rows of the call whose concepts are scored, part by part.
        grid: the N tokens that the picture has in each row.
        stop: whether the call ends, by ``Complete``, when all has been read.
    """

    SPACES: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        family: Family,
        model: nn.Module,
        call: ModelCall,
        look: Look,
        rows: Sequence[slice],
        grid: Grid,
        guard: Guard,
        stop: bool,
    ) -> None: ...

    def watching(self) -> AbstractContextManager[dict]:
        """While it is open, a call with the ``transformer_options`` that it gives is read."""

    def scores(self) -> list[dict[str, Tensor]]:
        """For each part of ``rows`` and each space, (L, B, K, N) float32; none if there is a ``gap``."""

    @property
    def gap(self) -> str | None:
        """After the call: what kept it from being read, for the user; None if nothing did."""
