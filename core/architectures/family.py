"""What the observer asks of a model family: facts about its blocks, and how one of them is called."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..geometry import Grid, Patch

# What fits only the text that was given, or would stand beside the one token of the picture.
_NOT_ALONE = ("attention_mask", "guiding_frame_index", "image_cond", "ref_latent", "ref_latents")


class Family:
    """Defaults fit most models; a page overrides what differs. Families have no state."""

    name: ClassVar[str]
    model: ClassVar[str]
    """The class of the diffusion model, with its module below ``comfy.ldm``."""
    reader: ClassVar[Literal["patches", "blocks", "words", "prefixes"]]
    entry: ClassVar[Literal["diffusion_model", "apply_model"]] = "diffusion_model"
    """The wrapper (``WrappersMP``) around a call of the model. Models that call no DIFFUSION_MODEL wrapper
    are met one call further out."""
    encoders: ClassVar[tuple[str, ...]] = ()
    """Whose tokens are the concepts', as ComfyUI's tokenizers name their text encoders: the first that a CLIP
    has. Empty: of the only text encoder that the CLIP has."""
    loader: ClassVar[str]
    """How the text encoders are loaded, for error messages."""
    causal: ClassVar[bool] = False
    """Whether a token of the text encoder reads only what stands before it, so that the last token of a name
    stands for all of it."""
    guidance: ClassVar[bool] = False
    """Whether the model may take a guidance value (FluxGuidance)."""
    batched: ClassVar[bool] = True
    """Whether a call of the model may have more than one row."""
    timed: ClassVar[bool] = False
    """Whether what a text is before the first layer depends on the noise level."""
    may_stop: ClassVar[bool] = True
    """Whether a call of the model may be left after the last recorded block."""
    frame_length: ClassVar[int] = 1
    """How many frames of the video each frame of a latent stands for, but the first. ComfyUI's latent formats
    say it from 0.21 on."""
    layered: ClassVar[bool] = False
    """Whether the frames of a latent are layers of one picture, and no times of a video."""
    sound: ClassVar[bool] = False
    """Whether latents are pairs, a video and its sound."""

    def matches(self, model: nn.Module) -> bool:
        return self.distance(model) is not None

    def distance(self, model: nn.Module) -> int | None:
        """How far the model's class is from the family's among those that it is made from; None if it is not
        made from it."""
        path = f"comfy.ldm.{self.model}"
        classes = [f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__]
        return classes.index(path) if path in classes else None

    def sequence(self, encoded: dict[str, Any]) -> Tensor:
        """Of what a CLIP gives for a text, with what else goes into the conditioning, the tokens (T, C) that
        the model's text is made of."""
        return encoded["cond"][0]

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The blocks that concepts go through, in running order."""
        raise NotImplementedError

    def main_layers(self, model: nn.Module) -> range:
        """The layers that "all" stands for. Others are recorded only where their numbers are named."""
        return range(len(self.layers(model)))

    def default_layers(self, model: nn.Module) -> tuple[int, ...]:
        """The layers that maps are made from unless others are asked for: the last third of the main ones,
        until real weights show better ones."""
        depth = len(self.main_layers(model))
        return tuple(range(depth - -(-depth // 3), depth))

    def token_width(self, model: nn.Module) -> int:
        """C, the width of the text tokens that the model takes."""
        raise NotImplementedError

    def patch(self, model: nn.Module) -> Patch:
        """How much of a latent becomes one token."""
        size = model.patch_size
        return Patch(1, size, size) if isinstance(size, int) else Patch(*size)

    def grid(self, model: nn.Module, x: Tensor) -> Grid:
        """The tokens of a latent (B, C, H, W) or (B, C, F, H, W)."""
        return self.patch(model).grid(x)

    def durations(self, model: nn.Module, x: Tensor) -> tuple[int, ...]:
        """How many frames of the video each frame of ``grid`` stands for. The first frame of a latent is the
        video's first, each other ``frame_length`` frames (causal VAEs)."""
        frames, patch = x.shape[2] if x.ndim == 5 else 1, self.patch(model).frames
        durations = [1 if self.layered or frame == 0 else self.frame_length for frame in range(frames)]
        return tuple(sum(durations[start : start + patch]) for start in range(0, frames, patch))

    def embed(self, model: nn.Module, context: Tensor) -> Tensor | None:
        """What a text (R, T, C) becomes before the first layer, if the model has a function for that. None:
        the forward pass shows it, left at the first layer."""
        return None

    def alone(self, model: nn.Module, arguments: dict[str, Any], context: Tensor) -> dict[str, Any]:
        """Arguments for a call of the model on one token of the picture, with another text (R, T, C)."""
        rows = len(context)
        patch = self.patch(model)
        latents = (next(iter(arguments)), "c_concat")
        changed = {}
        for name, value in arguments.items():
            if name in ("context", "c_crossattn"):
                value = context
            elif name in _NOT_ALONE:
                continue
            elif name == "num_tokens":
                value = context.shape[1]
            elif isinstance(value, Tensor) and value.ndim:
                value = value[:1].expand(rows, *value.shape[1:])
                if name in latents:
                    value = value[..., : patch.rows, : patch.columns]
                    value = value[:, :, : patch.frames] if value.ndim == 5 else value
            changed[name] = value
        return changed


class BlockCall(NamedTuple):
    """One call of a block of ``model``: its arguments by name, how many tokens of text the model was given,
    and how many the picture has."""

    arguments: dict[str, Any]
    model: nn.Module
    text: int
    picture: int

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


class JointFamily(Family):
    """Text and picture attend to each other: concepts are more text, which only the observer sees.

    Shapes: B rows of the call, K concepts, T rows of text, D features.
    """

    reader = "blocks"
    text_first: ClassVar[bool] = True
    """Whether the text stands before the picture in the joint sequence."""
    text_result: ClassVar[int] = 1
    """Where in the results of a block the text stands, if the picture has one of its own."""

    def text(self, call: BlockCall) -> Tensor:
        """The text rows (B, T, D) of the block's input."""
        raise NotImplementedError

    def picture(self, call: BlockCall, length: int) -> slice:
        """Where the picture's own tokens lie in the joint sequence of ``length``."""
        start = self.text(call).shape[1] if self.text_first else 0
        return slice(start, start + call.picture)

    def text_start(self, call: BlockCall, length: int) -> int:
        """Where the text rows begin in the joint sequence of ``length``."""
        return 0 if self.text_first else self.picture(call, length).stop

    def keys(self, call: BlockCall, length: int) -> slice:
        """What of the joint sequence concepts attend to beside each other."""
        return self.picture(call, length)

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        """What of a block's arguments is different when the concepts ``hidden`` (B, K, D) are its text,
        beside one token of the picture (none where text and picture share all weights). Arguments that the
        call does not have do not matter: ComfyUI's versions differ in them.

        Args:
            positions: for each concept, the row of the text whose position it takes.
        """
        raise NotImplementedError

    def step(
        self, block: nn.Module, call: BlockCall, hidden: Tensor, positions: list[int], options: dict
    ) -> Tensor | None:
        """The concepts (B, K, D) after ``block``, or None if it gives no text.

        Args:
            hidden, positions: as in ``changes``.
            options: the ``transformer_options`` to call it with.
        """
        changes = self.changes(call, hidden, positions)
        arguments = {name: changes.get(name, value) for name, value in call.arguments.items()}
        out = block.forward(**{**arguments, "transformer_options": options})
        return out if isinstance(out, Tensor) else out[self.text_result]

    def embedded(self, call: BlockCall, tokens: int) -> Tensor:
        """Of the text rows at the first block, those that ``tokens`` given ones became."""
        return self.text(call)[:, self.given(call, tokens)]

    def given(self, call: BlockCall, tokens: int) -> slice:
        """Which of the text rows ``tokens`` given ones became."""
        return slice(0, tokens)

    def position(self, length: int, own: slice) -> int:
        """The row of a text that a concept takes the position of. Of its own prompt of ``length`` tokens
        ``own`` are its name's."""
        return own.start


class WordsFamily(Family):
    """The picture reads the text by cross-attention, and text never the picture: a concept is one more word.

    Layers are the modules of the cross-attention, or what they are part of. Shapes: N tokens of picture,
    W words, H heads of d features.
    """

    reader = "words"
    queries: ClassVar[str]
    """Within such a module, the one whose output the queries are."""
    keys: ClassVar[tuple[str, ...]]
    """Those that make keys of a text, in their order; the last one's output is the keys."""

    def heads(self, module: nn.Module) -> int:
        return module.heads

    def text(self, arguments: dict[str, Any]) -> Tensor:
        """The text (B, T, D) among a layer's arguments."""
        return arguments["context"]

    def own_length(self, context: Tensor) -> int:
        """How many tokens of a text (B, T, C) that a call of the model was given are the prompt's own."""
        return context.shape[1]

    def by_heads(self, module: nn.Module, made: Tensor, rows: int) -> Tensor:
        """Queries or keys (B, H, L, d) of B ``rows``, of what the module that makes them gives: as most do,
        (B, L, H * d) or (B, L, H, d)."""
        made = made if made.ndim == 4 else made.unflatten(-1, (self.heads(module), -1))
        return made.transpose(1, 2)

    def key(self, module: nn.Module, words: Tensor, arguments: dict[str, Any]) -> Tensor:
        """What the last module of ``keys`` gives for words (1, W, D) when the layer is called with
        ``arguments``."""
        for name in self.keys:
            words = module.get_submodule(name).forward(words)
        return words

    def modulated(self, module: nn.Module) -> bool:
        """Whether ``key`` depends on the arguments."""
        return False

    def mask(self, arguments: dict[str, Any]) -> Tensor | None:
        """Of the prompt's keys, as the module's attention function is given it."""
        return None

    def place(self, model: nn.Module, call: dict[str, Any], grid: Grid, queries: int) -> tuple[slice, Grid]:
        """Which of a layer's queries are the picture's in a call of the model with these arguments, and their
        grid in that layer."""
        return slice(0, grid.size), grid


class PrefixFamily(Family):
    """Text stands before the picture in one sequence, and never reads it; the picture reads all. Layers are
    the blocks."""

    reader = "prefixes"

    def given(self, model: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """The text (B, T, D) of a call of the model, as it is embedded."""
        raise NotImplementedError

    def start(self, arguments: dict[str, Any]) -> int:
        """Where the picture begins among the queries of the attention that reads all, in a call with these
        arguments."""
        raise NotImplementedError

    def keys(self, model: nn.Module, sequence: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Of each layer, the keys (1, H, T, d) that it makes of a text (T, C) alone."""
        raise NotImplementedError


def picked(table: Tensor, axis: int, rows: list[int]) -> Tensor:
    """Rows of a table of positions, some of them perhaps more than once. Their numbers stay on the host: it
    would wait for their copy to the device."""
    return torch.cat([table.narrow(axis, row, 1) for row in rows], axis)
