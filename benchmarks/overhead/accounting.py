"""What one evaluation of a Flux.1 asks of a GPU, counted without one: PyTorch's fake tensors know shapes and
data types of every operation on a "cuda" device, but have no data.

Attention is counted as the one fused operation that it is on a GPU.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from unittest import mock

import torch
from setting import Scene, Size
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

# Operations that make the host wait for the device.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
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
        copied_to_cpu = any(t.device.type == "cpu" for t in tensors_out) and any(
            t.device.type == "cuda" for t in tensors_in
        )
        self.waits += name in WAITS or copied_to_cpu
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
        with (
            mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
            FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _flops_of_bmm}) as flops,
            _Counter() as counter,
        ):
            concept_stream = None
            if stream is not None:
                text = flux1.TextStream(model, timestep, guidance, dtype)
                concept_stream = stream(text)
                options["patches"] = follow(concept_stream, flux1.rotate)
            out = model(x, timestep, context, y=pooled, guidance=guidance, transformer_options=options)
            kept = counter.alive
        del out
    return Account(
        counter.operations, counter.waits, counter.traffic, flops.get_total_flops(), counter.peak, kept
    )


def _fused_attention(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _attention_of_the_model(func, q, k, v, heads, **kwargs):
    return _fused_attention(q, k, v).transpose(1, 2).flatten(2)


def _flops_of_bmm(a, b, *_, out_shape=None, **__) -> int:
    """PyTorch's own count knows no ``out_dtype``."""
    return 2 * a[0] * a[1] * a[2] * b[2]
