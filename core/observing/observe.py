"""Observing a MODEL: wrappers on a clone of its patcher, one Recording per sampling run.

Nothing is computed in the model's place and nothing of its own is changed. What sees the model at work is
put into a copy of ``transformer_options`` for each call of the diffusion model; see ``readers``.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..architectures import Family, check_text, family_of
from ..concepts import Concepts, ConceptTokens
from ..geometry import Grid
from .conditioning import Chunk, Conditionings
from .latents import History, remember, video_of
from .readers import reading_of
from .readers.reading import Complete, Guard, Look, ModelCall, Reading, uncompiled
from .recorder import Evaluation, Pass, Recorder
from .recording import BUDGET, RecordingError, unrecorded

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

KEY = "concept_attention"
WRAPPERS = (
    WrappersMP.OUTER_SAMPLE,
    WrappersMP.PREDICT_NOISE,
    WrappersMP.APPLY_MODEL,
    WrappersMP.DIFFUSION_MODEL,
)


@dataclass(frozen=True)
class WhatToRecord:
    """What is to be recorded of a model at work.

    Attributes:
        tokens: of each of ``concepts.all``.
        layers: their numbers in the model; if None, its family's main ones of a sampling run, and its default
            ones of existing images.
        spaces: out of the ``SPACES`` of ``reading_of`` the model's family; the first of them if None.
        attend_image, attend_concepts: see ``Look``.
        every: evaluations of the model from one that is recorded to the next. The first always is.
        budget: bytes that one recording may take, see ``Recorder``.
        reader: makes the ``Reading`` of each call instead of ``reading_of`` the family, with the same spaces.
    """

    concepts: Concepts
    tokens: ConceptTokens
    layers: Collection[int] | None = None
    spaces: Collection[str] | None = None
    attend_image: bool = True
    attend_concepts: bool = True
    every: int = 1
    budget: int = BUDGET
    reader: Callable[..., Reading] | None = None


def observe(
    model: ModelPatcher,
    what: WhatToRecord,
    *,
    listener: Callable[[Recorder], None] | None = None,
    maps_only: bool = False,
) -> ModelPatcher:
    """A clone of ``model`` whose sampling runs are recorded; ``recording_of`` finds them by LATENT.

    Observing an observed model replaces its concepts.

    Args:
        listener: called after every evaluation with what is being recorded.
        maps_only: nobody wants what is sampled. Evaluations end right after the last recorded layer and
            give zeros, and what fails while recording is raised.

    Raises:
        ValueError: the model is of no supported family, a layer or space does not exist, or ``every`` is
            less than 1.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    family = family_of(diffusion_model)
    check_text(model.model)
    depth = len(family.layers(diffusion_model))
    wanted = family.main_layers(diffusion_model) if what.layers is None else what.layers
    layers = tuple(sorted(set(wanted)))
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(f"This model has the layers 0 to {depth - 1}; asked to record {list(layers)}.")
    known = reading_of(family).SPACES
    spaces = known[:1] if what.spaces is None else tuple(what.spaces)
    unknown = set(spaces) - set(known)
    if unknown or not spaces:
        raise ValueError(f"Unknown spaces {sorted(unknown)}. {family.name} has: {'; '.join(known)}.")
    if what.every < 1:
        raise ValueError(f"Evaluations are recorded every 1 or more, not every {what.every}.")

    what = replace(what, layers=layers, spaces=spaces)
    channels = model.get_model_object("latent_format").latent_channels
    observer = _Observer(family, what, channels, listener, maps_only)
    observed = model.clone()
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        logging.warning(
            "Concept Attention: this MODEL has been through Concept Attention before. Only the concepts of "
            "the last node count: %s.",
            ", ".join(what.concepts.all),
        )
    for kind in WRAPPERS:
        observed.remove_wrappers_with_key(kind, KEY)
    observed.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, observer.outer_sample)
    observed.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, observer.predict_noise)
    observed.add_wrapper_with_key(family.entry, KEY, observer.model)
    return observed


class _Observer:
    """The wrappers."""

    def __init__(
        self,
        family: Family,
        what: WhatToRecord,
        channels: int,
        listener: Callable[[Recorder], None] | None,
        maps_only: bool,
    ) -> None:
        self.family = family
        self._reader = what.reader or reading_of(family)
        self.maps_only = maps_only
        self._what = what
        self._tokens = {torch.device("cpu"): what.tokens}
        self._channels = channels
        self._listener = listener
        self._runs: weakref.WeakKeyDictionary[CFGGuider, _Run] = weakref.WeakKeyDictionary()
        self._history = History()

    def _look(self, device: torch.device, layers: tuple[int, ...], known: dict | None) -> Look:
        """The tokens are copied to the device once: copying from ordinary memory waits for it."""
        what = self._what
        if device not in self._tokens:
            self._tokens[device] = what.tokens.to(device)
        tokens = self._tokens[device]
        return Look(tokens, layers, what.spaces, what.attend_image, what.attend_concepts, known)

    def outer_sample(
        self,
        executor,
        noise,
        latent_image,
        sampler,
        sigmas,
        denoise_mask=None,
        callback=None,
        *args,
        **kwargs,
    ):
        guider: CFGGuider = executor.class_obj
        shapes = kwargs.get("latent_shapes")
        try:
            recorder = self._recorder(guider, video_of(noise, shapes), sigmas)
            known = None if _weights_change(guider) else {}
            self._runs[guider] = _Run(recorder, self._listener, shapes, known)
        except Exception as error:
            recording = _reason(error)
        steps = _Steps(callback)
        try:
            samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, steps, *args, **kwargs)
        finally:
            run = self._runs.pop(guider, None)
        # Samplers move the result here next. Moved already, it stays the tensor that the LATENT holds.
        samples = samples.to(comfy.model_management.intermediate_device())
        if run is not None:
            try:
                recording = run.recorder.finish(steps.taken)
            except Exception as error:
                recording = _reason(error)
        origin = remember(samples, recording, by_content=False, shapes=shapes)
        if self.maps_only or not (steps.taken or (run and run.recorder.evaluated)):
            return samples  # which hold no picture that this run made
        self._history.add(origin)
        try:
            origin.know(video_of(samples, shapes))
            if steps.x0 is not None:
                # On the CPU, as the nodes do that hand it on: a GPU rounds otherwise.
                x0 = guider.model_patcher.model.process_latent_out(steps.x0.cpu())
                origin.know(video_of(x0, shapes))
        except Exception:
            logging.warning("Concept Attention will not recognise copies of this LATENT.", exc_info=True)
        return samples

    def _recorder(self, guider: CFGGuider, noise: Tensor, sigmas: Tensor) -> Recorder:
        model = guider.model_patcher.get_model_object("diffusion_model")
        pixels = guider.model_patcher.get_model_object("latent_format").spacial_downscale_ratio
        height, width = noise.shape[-2:]
        patch, grid = self.family.patch(model), self.family.grid(model, noise)
        return Recorder(
            self._what.concepts,
            self._what.layers,
            self.family.default_layers(model),
            sigmas,
            noise.shape[0],
            grid,
            (height * pixels, width * pixels),
            (height / (grid.rows * patch.rows), width / (grid.columns * patch.columns)),
            self.family.durations(model, noise),
            self._what.budget,
            self._what.every,
            len(self._what.spaces),
        )

    def predict_noise(self, executor, x, timestep, model_options, seed):
        run = self._runs.get(executor.class_obj)
        if run is None or run.recorder.failure is not None:
            return executor(x, timestep, model_options, seed)
        evaluation = run.recorder.evaluation(timestep)
        if not evaluation.armed:
            return executor(x, timestep, model_options, seed)

        guider = executor.class_obj
        model = guider.model_patcher.get_model_object("diffusion_model")
        patch = self.family.patch(model)

        def disarm(args):
            evaluation.armed = False
            return args["conds_out"]

        options = dict(model_options or {})
        options["transformer_options"] = {
            **options.get("transformer_options", {}),
            KEY: (evaluation, Conditionings(guider, x, run.shapes, patch, run.weights), run.known),
        }
        options["sampler_pre_cfg_function"] = [disarm, *options.get("sampler_pre_cfg_function", [])]
        try:
            with _eager(options, model):
                out = executor(x, timestep, options, seed)
        finally:
            evaluation.armed = False
        run.tell()
        return out

    def model(self, executor, *args, **kwargs):
        """Around one call of the model, further out or in, as its family says."""
        model = uncompiled(getattr(executor.class_obj, "diffusion_model", executor.class_obj))
        # DualModelGuider calls the negative's model with the positive's wrappers.
        if not self.family.matches(model):
            return executor(*args, **kwargs)
        call = ModelCall(executor.original, args, kwargs)
        evaluation, conditionings, known = call.options.get(KEY, (None, None, None))
        armed = evaluation is not None and evaluation.armed and evaluation.recorder.failure is None
        if not armed:
            return self._nothing(call) if self.maps_only else executor(*args, **kwargs)
        evaluation.calls += 1
        guard = Guard(partial(self._failed, evaluation.recorder))
        chunks: list[Chunk] = []
        with guard:
            chunks = conditionings.positive(call.options, evaluation.seen, call.x)
            if chunks:
                look = self._look(call.x.device, evaluation.recorder.layers, known)
                reading = self._reading(model, call, chunks, evaluation.recorder.grid, look, guard)
        if not chunks or guard.broken:
            return self._nothing(call) if self.maps_only else executor(*args, **kwargs)
        try:
            with reading.watching() as options:
                args, kwargs = call.with_options(options)
                out = executor(*args, **kwargs)
        except Complete:
            out = self._nothing(call)
        with guard:
            if not guard.broken:
                grid = self.family.grid(model, call.x)
                self._record(evaluation, look.layers, chunks, reading, grid)
        return out

    def _reading(
        self,
        model: nn.Module,
        call: ModelCall,
        chunks: list[Chunk],
        whole: Grid,
        look: Look,
        guard: Guard,
    ) -> Reading:
        grid = self.family.grid(model, call.x)
        if any(chunk.whole for chunk in chunks) and grid[1:] != whole[1:]:
            raise RuntimeError(
                f"the model was called on a tile of {grid.rows} x {grid.columns} patches; the image has "
                f"{whole.rows} x {whole.columns}, and tiled sampling cannot be recorded"
            )
        rows = [chunk.rows for chunk in chunks]
        stop = self.maps_only and self.family.may_stop
        return self._reader(self.family, model, call, look, rows, grid, guard, stop)

    def _record(
        self,
        evaluation: Evaluation,
        layers: tuple[int, ...],
        chunks: list[Chunk],
        reading: Reading,
        grid: Grid,
    ) -> None:
        if reading.gap:
            evaluation.recorder.leave_out(evaluation, reading.gap)
            return
        for chunk, scores in zip(chunks, reading.scores(), strict=True):
            scores, copied = _to_cpu({space: s.unflatten(-1, grid) for space, s in scores.items()})
            place = (chunk.weight, chunk.default, chunk.frames)
            evaluation.recorder.add(
                evaluation, Pass(chunk.batch, chunk.origin, layers, scores, copied, *place)
            )

    def _nothing(self, call: ModelCall) -> Tensor:
        """Zeros in the shape of what the model makes of a latent. Some take more channels than they give."""
        return call.x.new_zeros(len(call.x), self._channels, *call.x.shape[2:])

    def _failed(self, recorder: Recorder, error: Exception) -> bool:
        """Sampling is never lost to a failure here. It is raised when maps are asked for. With no sampling to
        be lost, it is raised at once."""
        if self.maps_only:
            return False
        logging.warning("Concept Attention stops recording this run.", exc_info=error)
        recorder.fail(f"{type(error).__name__}: {error}")
        return True


def _weights_change(guider: CFGGuider) -> bool:
    """Whether hooks patch the model's weights for some conditionings, or at some steps."""
    if getattr(guider.model_patcher, "forced_hooks", None) is not None:
        return True
    return any("hooks" in entry for conds in guider.conds.values() for entry in conds or [])


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
    """A sampling run, the shapes of its latents' parts, and the weights of its conditionings as far as they
    have been asked for; ``known`` as in ``Look``."""

    recorder: Recorder
    listener: Callable[[Recorder], None] | None
    shapes: Sequence[Sequence[int]] | None
    known: dict | None
    weights: dict[object, Tensor] = field(default_factory=dict)

    def tell(self) -> None:
        if self.listener is None or self.recorder.failure is not None:
            return
        try:
            self.listener(self.recorder)
        except Exception:
            logging.warning("Concept Attention stops showing maps of this run.", exc_info=True)
            self.listener = None


class _Steps:
    """The sampler's callback: how many steps it took, and the latent that the last one predicted (x0)."""

    def __init__(self, callback: Callable[..., object] | None) -> None:
        self._callback = callback
        self.taken = 0
        self.x0: Tensor | None = None

    def __call__(self, step: int, x0: Tensor, *args) -> object:
        self.taken += 1
        self.x0 = x0
        return None if self._callback is None else self._callback(step, x0, *args)


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


def _eager(model_options: dict, model: nn.Module):
    """torch.compile would capture the hooks of one call for all, or none at all, or compile anew for every
    call: observed evaluations of a compiled model, or of one with compiled blocks, run eagerly."""
    wrappers = model_options["transformer_options"].get("wrappers", {})
    compiled = "torch.compile" in wrappers.get(WrappersMP.APPLY_MODEL, {})
    compiled = compiled or any(isinstance(m, torch._dynamo.OptimizedModule) for m in model.modules())
    if compiled or model_options.get("torch_compile_kwargs"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
