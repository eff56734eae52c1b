"""Observing a MODEL: wrappers and hooks on a clone of its patcher, one Recording per sampling run.

Nothing is computed in the model's place and nothing of its own is changed. The hooks that see attention
are put into a copy of ``transformer_options`` for each call of the diffusion model: last of the
``attn1_patch`` list, so that they see the final q, k, v, and first of ``attn1_output_patch``, so that
they see the attention's output as it is, before guidance nodes edit it.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import get_area_and_mult
from torch import Tensor
from torch.nn import functional

from ..architectures import family_of
from ..concepts import Concepts
from .readers.stream import SPACES, ConceptStream
from .recording import BUDGET, Evaluation, Pass, Recorder, RecordingError, remember, unrecorded

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

KEY = "concept_attention"
WRAPPERS = (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.DIFFUSION_MODEL)


def observe(
    model: ModelPatcher,
    concepts: Concepts,
    tokens: Tensor,
    *,
    layers: Collection[int] | None = None,
    spaces: Collection[str] = ("output",),
    attend_image: bool = True,
    attend_concepts: bool = True,
    every: int = 1,
    budget: int = BUDGET,
    listener: Callable[[Recorder], None] | None = None,
    maps_only: bool = False,
) -> ModelPatcher:
    """A clone of ``model`` whose sampling runs are recorded; ``recording_of`` finds them by LATENT.

    Observing an observed model replaces its concepts.

    Args:
        tokens: one text encoder token for each of ``concepts.all``, (K, C).
        layers: the double-stream blocks to record; all of them by default.
        spaces: what to record, out of ``stream.SPACES``.
        attend_image, attend_concepts: see ``ConceptStream``.
        every: evaluations of the model from one that is recorded to the next. The first always is.
        budget: bytes that one recording may take before it keeps the default layers only.
        listener: called after every evaluation with what is being recorded.
        maps_only: nobody wants what is sampled. Evaluations end right after the last recorded layer and
            give zeros, and what fails while recording is raised.

    Raises:
        ValueError: the model is of no supported family, a layer or space does not exist, or ``every`` is
            less than 1.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    family = family_of(diffusion_model)
    depth = family.depth(diffusion_model)
    recorded = tuple(range(depth)) if layers is None else tuple(sorted(set(layers)))
    if not recorded or recorded[0] < 0 or recorded[-1] >= depth:
        raise ValueError(f"This model has the layers 0 to {depth - 1}; asked to record {list(recorded)}.")
    unknown = set(spaces) - set(SPACES)
    if unknown or not spaces:
        raise ValueError(f"Unknown spaces {sorted(unknown)}. Choose from: {'; '.join(SPACES)}.")
    if every < 1:
        raise ValueError(f"Evaluations are recorded every 1 or more, not every {every}.")

    stream = partial(
        ConceptStream,
        spaces=tuple(spaces),
        attend_image=attend_image,
        attend_concepts=attend_concepts,
    )
    observer = _Observer(family, concepts, tokens, recorded, stream, every, budget, listener, maps_only)
    observed = model.clone()
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        logging.warning(
            "Concept Attention: this MODEL has been through Concept Attention before. Only the concepts of "
            "the last node count: %s.",
            ", ".join(concepts.all),
        )
    for kind in WRAPPERS:
        observed.remove_wrappers_with_key(kind, KEY)
    observed.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, observer.outer_sample)
    observed.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, observer.predict_noise)
    observed.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, observer.diffusion_model)
    return observed


class _Recorded(BaseException):
    """Ends a call of the diffusion model whose last layer has been recorded. Not an ``Exception``: no other
    node's code on the way should take it for a failure that it can handle.

    ``_Observer.diffusion_model`` catches it. Added last, that wrapper is the innermost, and all that is
    skipped is the rest of the diffusion model's own forward pass: blocks, which keep no state between calls,
    and the patches in them. Offloaded weights are cast and released within each layer's call, never across
    layers, and Flux uses no prefetch queue, which would have to be emptied. What comes after the model
    (ControlNets, hooks, offloading) goes on as if it had returned.
    """


class _Observer:
    """The wrappers. ``stream(text, concepts=..., layers=...)`` makes one forward pass's concept stream."""

    def __init__(
        self,
        family: ModuleType,
        concepts: Concepts,
        tokens: Tensor,
        layers: tuple[int, ...],
        stream: Callable[..., ConceptStream],
        every: int,
        budget: int,
        listener: Callable[[Recorder], None] | None,
        maps_only: bool,
    ) -> None:
        self.family = family
        self.stream = stream
        self.maps_only = maps_only
        self._concepts = concepts
        self._layers = layers
        self._every = every
        self._tokens = {tokens.device: tokens}
        self._budget = budget
        self._listener = listener
        self._runs: weakref.WeakKeyDictionary[CFGGuider, _Run] = weakref.WeakKeyDictionary()

    def tokens_on(self, device: torch.device) -> Tensor:
        """The concepts' tokens. They are copied once: copying from ordinary memory waits for the device."""
        if device not in self._tokens:
            self._tokens[device] = next(iter(self._tokens.values())).to(device)
        return self._tokens[device]

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider: CFGGuider = executor.class_obj
        try:
            self._runs[guider] = _Run(self._recorder(guider, noise, sigmas), self._listener)
        except Exception as error:
            recording = _reason(error)
        try:
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            run = self._runs.pop(guider, None)
        # Samplers move the result here next. Moved already, it stays the tensor that the LATENT holds.
        samples = samples.to(comfy.model_management.intermediate_device())
        if run is not None:
            try:
                recording = run.recorder.finish()
            except Exception as error:
                recording = _reason(error)
        remember(samples, recording)
        return samples

    def _recorder(self, guider: CFGGuider, noise: Tensor, sigmas: Tensor) -> Recorder:
        model = guider.model_patcher.get_model_object("diffusion_model")
        latent_format = guider.model_patcher.get_model_object("latent_format")
        pixels = latent_format.spacial_downscale_ratio
        height, width = noise.shape[-2:]
        rows, columns = self.family.grid(model, noise)
        return Recorder(
            self._concepts,
            self._layers,
            self.family.default_layers(model),
            sigmas,
            noise.shape[0],
            (rows, columns),
            (height * pixels, width * pixels),
            (height / (rows * model.patch_size), width / (columns * model.patch_size)),
            self._budget,
            self._every,
        )

    def predict_noise(self, executor, x, timestep, model_options, seed):
        run = self._runs.get(executor.class_obj)
        if run is None or run.recorder.failure is not None:
            return executor(x, timestep, model_options, seed)
        evaluation = run.recorder.evaluation(timestep)
        if not evaluation.armed:
            return executor(x, timestep, model_options, seed)

        def disarm(args):
            evaluation.armed = False
            return args["conds_out"]

        options = dict(model_options or {})
        options["transformer_options"] = {
            **options.get("transformer_options", {}),
            KEY: (evaluation, _ConditioningChunks(executor.class_obj, x, run.weights)),
        }
        options["sampler_pre_cfg_function"] = [disarm, *options.get("sampler_pre_cfg_function", [])]
        try:
            with _eager(options, executor.class_obj.model_patcher.get_model_object("diffusion_model")):
                out = executor(x, timestep, options, seed)
        finally:
            evaluation.armed = False
        run.tell()
        return out

    def diffusion_model(self, executor, *args, **kwargs):
        # DualModelGuider calls the negative's model with the positive's wrappers.
        if not self.family.matches(executor.class_obj):
            return executor(*args, **kwargs)
        return self._diffusion_model(executor, *args, **kwargs)

    def _diffusion_model(
        self,
        executor,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},  # noqa: B006 - the signature of Flux.forward
        **kwargs,
    ):
        def call(options):
            return executor(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)

        def unobserved():
            return nothing() if self.maps_only else call(transformer_options)

        def nothing():
            return self.family.no_output(executor.class_obj, x)

        evaluation, chunks = transformer_options.get(KEY, (None, None))
        if evaluation is None or not evaluation.armed or evaluation.recorder.failure is not None:
            return unobserved()
        hooks = _Hooks(self, executor.class_obj, evaluation)
        evaluation.calls += 1
        with hooks.failing_quietly():
            for chunk in chunks.positive(transformer_options, evaluation, len(x)):
                hooks.follow(chunk, x, timestep, guidance)
        if not hooks.active:
            return unobserved()
        options = dict(transformer_options)
        patches = {name: list(patches) for name, patches in options.get("patches", {}).items()}
        patches.setdefault("attn1_patch", []).append(hooks.before_attention)
        patches.setdefault("attn1_output_patch", []).insert(0, hooks.after_attention)
        options["patches"] = patches
        try:
            out = call(options)
        except _Recorded:
            out = nothing()
        with hooks.failing_quietly():
            hooks.finish()
        return out


def _reason(error: Exception) -> str:
    """What the user is told when maps are asked for. The image is never lost to a failure to record, and
    the exception is not kept, since its traceback would keep the run's tensors."""
    if isinstance(error, RecordingError):
        logging.warning("%s", error)
        return str(error)
    logging.warning("Concept Attention stops recording this run.", exc_info=error)
    return unrecorded(f"{type(error).__name__}: {error}")


@dataclass
class _Run:
    """A sampling run, and the weights of its conditionings as far as they have been asked for."""

    recorder: Recorder
    listener: Callable[[Recorder], None] | None
    weights: dict[object, Tensor] = field(default_factory=dict)

    def tell(self) -> None:
        if self.listener is None or self.recorder.failure is not None:
            return
        try:
            self.listener(self.recorder)
        except Exception:
            logging.warning("Concept Attention stops showing maps of this run.", exc_info=True)
            self.listener = None


class _Chunk(NamedTuple):
    """One positive conditioning in a call of the model: its rows, the images that they are, and the area
    (height, width, y, x) of the latent that the call was cut down to. ``weight`` and ``default`` are as in
    ``Pass``."""

    rows: slice
    batch: slice | list[int]
    area: tuple[int, ...] | None
    weight: Tensor | None
    default: bool


class _ConditioningChunks:
    """Which chunks of a call of the model are the guider's positive conditionings.

    A chunk has the id of its conditioning, and its place in the guider's list: positive, negative; of
    DualCFGGuider negative, middle, positive. Ids are not always unique: conditionings that ComfyUI makes to
    match a positive's area get the positive's id.
    """

    def __init__(self, guider: CFGGuider, x: Tensor, weights: dict[object, Tensor]) -> None:
        self._guider, self._x, self._weights = guider, x, weights
        self._positives = {c.get("uuid"): c for c in guider.conds.get("positive") or []}
        self._place = 2 if "middle" in guider.conds else 0
        self._others = {
            c.get("uuid") for name, conds in guider.conds.items() if name != "positive" for c in conds or []
        }

    def positive(self, options: dict, evaluation: Evaluation, rows: int) -> list[_Chunk]:
        kinds = options.get("cond_or_uncond") or [0]
        uuids = options.get("uuids") or [None] * len(kinds)
        size = rows // len(kinds)
        window = options.get("context_window")
        batch: slice | list[int] = slice(0, size)
        if window is not None and getattr(window, "dim", None) == 0:
            batch = list(window.index_list)
            if (anchor := getattr(window, "causal_anchor_index", None)) is not None:
                batch.insert(0, anchor)  # an image from before the window that ComfyUI puts in front
        elif size != evaluation.recorder.batch:
            raise RuntimeError(
                f"the model was called with {size} images, the latent has {evaluation.recorder.batch}"
            )
        chunks = []
        for i, (kind, uuid) in enumerate(zip(kinds, uuids, strict=True)):
            if uuid in self._positives and uuid not in self._others:
                positive = True
            else:
                positive = kind == self._place and (uuid is None or uuid in self._positives)
            # The same conditioning twice in one evaluation is a pass that a guidance method added.
            if not positive or (window is None and uuid is not None and uuid in evaluation.seen):
                continue
            evaluation.seen.add(uuid)
            conditioning = self._positives.get(uuid, {})
            weight = self._weight(conditioning)
            chunks.append(
                _Chunk(
                    slice(i * size, (i + 1) * size),
                    batch,
                    conditioning.get("area"),
                    None if weight is None else weight[batch],
                    "default" in conditioning,
                )
            )
        return chunks

    def _weight(self, conditioning: dict) -> Tensor | None:
        """How much the sampler makes of each patch (B, 1, h, w) of what is predicted with a conditioning: its
        strength, mask and area, by ComfyUI's own rule. The same in every evaluation."""
        if conditioning.keys().isdisjoint(("area", "mask", "strength")):
            return None
        uuid = conditioning.get("uuid")
        if uuid not in self._weights:
            rule = ("area", "mask", "mask_strength", "strength")
            given = {name: conditioning[name] for name in rule if name in conditioning}
            pixels = self._x[:, :1]
            found = get_area_and_mult({**given, "model_conds": {}, "uuid": uuid}, pixels, None)
            patch = self._guider.model_patcher.get_model_object("diffusion_model").patch_size
            self._weights[uuid] = functional.avg_pool2d(found.mult.float(), patch, ceil_mode=True).cpu()
        return self._weights[uuid]


class _Hooks:
    """Follows the concept streams of one call of the diffusion model through its blocks."""

    def __init__(self, observer: _Observer, model, evaluation: Evaluation) -> None:
        self._observer, self._model, self._evaluation = observer, model, evaluation
        self._followed: list[tuple[_Chunk, tuple[int, int], ConceptStream]] = []
        self._layers = evaluation.recorder.layers

    @property
    def active(self) -> bool:
        return bool(self._followed) and self._evaluation.recorder.failure is None

    @contextlib.contextmanager
    def failing_quietly(self):
        """Sampling is never lost to a failure here. It is raised when maps are asked for. With no sampling to
        be lost, it is raised at once."""
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            raise  # ComfyUI's layers raise it when the user cancels
        except Exception as error:
            if self._observer.maps_only:
                raise
            logging.warning("Concept Attention stops recording this run.", exc_info=True)
            self._evaluation.recorder.fail(f"{type(error).__name__}: {error}")

    def follow(self, chunk: _Chunk, x: Tensor, timestep: Tensor, guidance: Tensor | None) -> None:
        observer = self._observer
        grid = observer.family.grid(self._model, x)
        if chunk.area is None and grid != self._evaluation.recorder.grid:
            raise RuntimeError(
                f"the model was called on a tile of {grid[0]} x {grid[1]} patches; the image has "
                "{} x {}, and tiled sampling cannot be recorded".format(*self._evaluation.recorder.grid)
            )
        text = observer.family.TextStream(
            self._model,
            timestep[chunk.rows],
            None if guidance is None else guidance[chunk.rows],
            x.dtype,
        )
        stream = observer.stream(text, concepts=observer.tokens_on(x.device), layers=self._layers)
        self._followed.append((chunk, grid, stream))

    # A block that another node compiled by itself would take the hooks into its graph.
    @torch.compiler.disable
    def before_attention(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        if extra_options.get("block_type") == "double" and self.active:
            with self.failing_quietly():
                for chunk, grid, stream in self._followed:
                    patches = _image_tokens(extra_options, grid)
                    stream.attend(
                        extra_options["block_index"],
                        *(t[chunk.rows, :, patches] for t in (q, k, v)),
                        rotate=lambda keys, p=patches, c=chunk: self._rotate(keys, pe, p, c),
                    )
        return {}

    def _rotate(self, keys: Tensor, pe: Tensor | None, patches: slice, chunk: _Chunk) -> Tensor:
        if pe is not None:
            pe = pe[chunk.rows if len(pe) > 1 else slice(None), :, patches]
        return self._observer.family.rotate(keys, pe)

    @torch.compiler.disable
    def after_attention(self, out, extra_options):
        if extra_options.get("block_type") == "double" and self.active:
            with self.failing_quietly():
                for chunk, grid, stream in self._followed:
                    patches = _image_tokens(extra_options, grid)
                    stream.score(extra_options["block_index"], out[chunk.rows, patches])
            if self._observer.maps_only and all(stream.complete for _, _, stream in self._followed):
                raise _Recorded
        return out

    def finish(self) -> None:
        for chunk, grid, stream in self._followed:
            if not stream.complete:
                continue  # a patch left blocks out: as if this evaluation had been skipped
            scores = {s: torch.stack(layers).unflatten(-1, grid) for s, layers in stream.scores.items()}
            scores, copied = _to_cpu(scores)
            origin = (0, 0)
            if chunk.area is not None:
                half = len(chunk.area) // 2
                origin = tuple(o // self._model.patch_size for o in chunk.area[half:][-2:])
            recorded = Pass(chunk.batch, origin, self._layers, scores, copied, chunk.weight, chunk.default)
            self._evaluation.recorder.add(self._evaluation, recorded)


def _image_tokens(extra_options: dict, grid: tuple[int, int]) -> slice:
    """The image's own tokens: after the text, before the tokens of reference images."""
    start = extra_options["img_slice"][0]
    return slice(start, start + grid[0] * grid[1])


def _to_cpu(scores: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Copies on the CPU. From CUDA they go to pinned memory without waiting, and the event tells when they
    have arrived."""
    if not any(s.is_cuda for s in scores.values()):
        return {space: s.cpu() for space, s in scores.items()}, None
    copies = {
        space: torch.empty_like(s, device="cpu", pin_memory=True).copy_(s, non_blocking=True)
        for space, s in scores.items()
    }
    copied = torch.cuda.Event()
    copied.record()
    return copies, copied


def _eager(model_options: dict, model: torch.nn.Module):
    """torch.compile would capture the hooks of one call for all, or none at all, or compile anew for every
    call: observed evaluations of a compiled model, or of one with compiled blocks, run eagerly."""
    wrappers = model_options["transformer_options"].get("wrappers", {})
    compiled = "torch.compile" in wrappers.get(WrappersMP.APPLY_MODEL, {})
    compiled = compiled or any(isinstance(m, torch._dynamo.OptimizedModule) for m in model.modules())
    if compiled or model_options.get("torch_compile_kwargs"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
