"""What one evaluation of a model asks of a GPU, counted without one: PyTorch's fake tensors know shapes and
data types of every operation on a "cuda" device, but have no data.

Attention is counted as the one fused operation that it is on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from einops import rearrange
from setting import OtherSize, Scene, Size
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

# Operations that make the host wait for the device.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
COPIES = {"aten::_to_copy", "aten::copy_"}
# Bytes of a GPU, which some of ComfyUI's attention functions divide their work by.
_FREE = 2**36
# Neither views nor work for the device.
FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::_unsafe_view", "aten::lift_fresh"}


@dataclass(frozen=True)
class Account:
    """Of one evaluation.

    Attributes:
        operations: how many do work on the device; about one kernel each.
        waits: how often the host waits for the device.
        traffic: bytes that the operations read and write, each operand once.
        flops: of matrix products and attention.
        peak: bytes of activations alive at once, without the model's weights.
        kept: bytes alive on the device when the evaluation ends, its output included.
    """

    operations: int
    waits: int
    traffic: int
    flops: int
    peak: int
    kept: int

    def __sub__(self, other: Account) -> Account:
        return Account(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = self.traffic = self.alive = self.peak = 0
        self._storages: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors_in = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        tensors_out = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        name = func.name().split(".")[0]
        if name.startswith("prim::") or func.is_view:
            return out
        given = {t.untyped_storage()._cdata for t in tensors_in}
        for t in tensors_out:
            if t.device.type == "cuda" and t.untyped_storage()._cdata not in given:
                self._born(t.untyped_storage())
        if name in FREE:
            return out
        on_device = [t for t in (*tensors_in, *tensors_out) if t.device.type == "cuda"]
        if on_device:
            self.operations += 1
            self.traffic += sum(t.numel() * t.element_size() for t in on_device)
        # From ordinary memory, as to it.
        copied = {t.device.type for t in tensors_in if t.ndim} ^ {t.device.type for t in tensors_out}
        self.waits += name in WAITS or (name in COPIES and copied == {"cpu", "cuda"})
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._died, size)

    def _died(self, size: int) -> None:
        self.alive -= size


def account(size: Size, scene: Scene, stream=None, dtype: torch.dtype = torch.bfloat16) -> Account:
    """Counts one evaluation. ``stream(text, concepts)`` makes the concept stream that goes along, if any."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from second_attention import follow

    from concept_attention.core.architectures import flux1

    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(), torch.device("cuda"):
        model = Flux(
            in_channels=16,
            out_channels=16,
            vec_in_dim=size.pooled,
            context_in_dim=size.context,
            hidden_size=size.hidden,
            mlp_ratio=4.0,
            num_heads=size.heads,
            depth=size.depth,
            depth_single_blocks=size.depth_single,
            axes_dim=[16, 56, 56],
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            guidance_embed=True,
            txt_ids_dims=[],
            operations=comfy.ops.disable_weight_init,
            dtype=dtype,
            device="cuda",
        )
        batch = scene.batch
        x = torch.empty(batch, 16, scene.height // 8, scene.width // 8, dtype=dtype)
        timestep, guidance = torch.empty(batch), torch.empty(batch)
        context = torch.empty(batch, size.text_tokens, size.context, dtype=dtype)
        pooled = torch.empty(batch, size.pooled, dtype=dtype)
        options: dict = {"optimized_attention_override": _attention_of_the_model}
        with _counting() as counts:
            concept_stream = None
            if stream is not None:
                text = flux1.TextStream(model, timestep, guidance, dtype)
                concept_stream = stream(text)
                options["patches"] = follow(concept_stream, flux1.rotate)
            out = model(x, timestep, context, y=pooled, guidance=guidance, transformer_options=options)
            found = counts()
        del out
    return found


def other_account(
    size: OtherSize,
    scene: Scene,
    concepts: int = 0,
    first: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Account:
    """Counts one evaluation of a model of another family, with so many concepts: the ``first`` of a run, or
    one of those after it, which find kept what concepts become before the first layer."""
    import comfy.ops

    from concept_attention.core.architectures import family_of
    from concept_attention.core.observing.readers import reading_of
    from concept_attention.core.observing.readers.reading import Guard, Look, ModelCall

    module, _, name = f"comfy.ldm.{size.model}".rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(), torch.device("cuda"):
        model = kind(**size.unet, dtype=dtype, device="cuda", operations=comfy.ops.disable_weight_init)
        family = family_of(model)
        batch = scene.batch
        x = torch.empty(batch, *size.latent(scene.height, scene.width), dtype=dtype)
        context = torch.empty(batch, size.text_tokens, size.context, dtype=dtype)
        given = {"transformer_options": {"optimized_attention_override": _attention_of_the_model}}
        if size.pooled is not None:
            given["y"] = torch.empty(batch, size.unet["adm_in_channels"], dtype=dtype)
        if "num_tokens" in inspect.signature(model.forward).parameters:
            given["num_tokens"] = size.text_tokens
        if size.masked:
            given["attention_mask"] = torch.empty(batch, size.text_tokens)
        call = ModelCall(model.forward, (x, torch.empty(batch), context), given)
        with torch.device("cpu"):
            tokens = size.concepts(concepts, torch.Generator())
        look = Look(
            tokens.to(x.device),
            tuple(family.main_layers(model)),
            reading_of(family).SPACES[:1],
            known={},
        )

        def evaluation() -> tuple:
            with contextlib.ExitStack() as stack:
                options = call.options
                if concepts:
                    rows, grid = [slice(0, batch)], family.grid(model, x)
                    reading = reading_of(family)(
                        family, model, call, look, rows, grid, Guard(lambda error: False), False
                    )
                    options = stack.enter_context(reading.watching())
                args, kwargs = call.with_options(options)
                return model(*args, **kwargs), reading.scores() if concepts else []

        if concepts and not first:
            with _counting():
                evaluation()
        with _counting() as counts:
            out = evaluation()
            found = counts()
        del out
    return found


@contextlib.contextmanager
def _counting() -> Iterator[Callable[[], Account]]:
    """Of what is done inside; to be asked for at its end."""
    import comfy.model_management

    with (
        mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
        mock.patch.object(comfy.model_management, "get_free_memory", return_value=(_FREE, _FREE)),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _flops_of_bmm}) as flops,
        _Counter() as counter,
    ):
        yield lambda: Account(
            counter.operations,
            counter.waits,
            counter.traffic,
            flops.get_total_flops(),
            counter.peak,
            counter.alive,
        )


def _fused_attention(q, k, v, scale=None, **_):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


def _attention_of_the_model(func, q, k, v, heads, *_, skip_reshape=False, skip_output_reshape=False, **__):
    if not skip_reshape:
        q, k, v = (rearrange(x.flatten(2), "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
    out = _fused_attention(q, k, v)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def _flops_of_bmm(a, b, *_, out_shape=None, **__) -> int:
    """PyTorch's own count knows no ``out_dtype``."""
    return 2 * a[0] * a[1] * a[2] * b[2]
