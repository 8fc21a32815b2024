"""The whole journey: a plan becomes parts, parts become frames.

    encode text, encode image -> denoise, step by step -> decode

One loop serves every family; what differs is in the family's functions (`framefit.families`), and how the parts
are arranged is in the plan's settings (`framefit.passes`). Where memory runs out, the plan comes down a rung
(`framefit.planning.ladder`), and what was under way begins again from the last finished step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from framefit import photo
from framefit.checkpoint import State
from framefit.errors import Cancelled, NotFinite
from framefit.families import Checkpoint, family_of, hub, lora
from framefit.families.files import Shapes, check_headers
from framefit.families.parts import IMAGE_ENCODERS, PRECISIONS, TEXT_ENCODERS, Parts, Read, Tensors, load_parts
from framefit.ledger import Ledger
from framefit.ledger.shortage import Shortage
from framefit.passes import apply_all, change, chunk, offload, quantize
from framefit.passes.guidance import guided
from framefit.passes.window import Estimate, correlated, fused
from framefit.plan import Chunk, Offload, Plan, Quantize
from framefit.planning.descent import Descent
from framefit.report import Rung
from framefit.schedule import Schedule
from framefit.video import Frame, Video

__all__ = ["Pipeline", "Step", "load"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step, just finished."""

    index: int
    """Steps taken so far, from 1 to `total`."""
    total: int
    expert: str
    seconds: float
    latents: torch.Tensor
    """(1, C, F, H, W), fp32."""
    preview: Callable[[], Frame]
    """The middle of the video as far as it is known, uint8 (H, W, 3); costs the decoding of one latent frame."""


def load(
    plan: Plan,
    checkpoint: Checkpoint,
    ledger: Ledger | None = None,
    *,
    rungs: tuple[Rung, ...] = (),
    fixed: frozenset[str] = frozenset(),
    ladder: bool = True,
) -> Pipeline:
    """Read the weights of `checkpoint` and arrange them as `plan` says, or one rung lower where they do not fit.

    Args:
        rungs, fixed, ladder: as in `Pipeline`.

    Raises:
        DoesNotFit: memory ran out, and there is no rung left.
        ModelMissing: the weights are not on this machine, or are incomplete.
        BadInput: a LoRA that does not fit them.
    """
    ledger = ledger or Ledger(plan.device.id)
    descent = Descent(plan, rungs, fixed, held=not ladder)
    with ledger.phase("load"):
        folder = hub.locate(checkpoint)
        check_headers(folder, checkpoint)
        while True:
            try:
                parts = _loaded(descent.plan, checkpoint, folder)
                return Pipeline(plan, parts, ledger, rungs=descent.rungs, fixed=fixed, ladder=ladder)
            except Exception as error:
                shortage = descent.shortage(error)
            descent.lower(shortage, None, ledger)
            _give_back(plan)


def _loaded(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Parts:
    needed = lora.shapes(checkpoint) if plan.request.loras else {}
    parts = load_parts(
        checkpoint, folder, dtype=PRECISIONS[plan.precision], device=torch.device(plan.device.id),
        on_host=plan.offload != "none", arrived=partial(_arrived, plan, needed),
    )  # fmt: skip
    try:
        return apply_all(parts, plan)
    except BaseException:
        parts.close()
        raise


def _arrived(plan: Plan, needed: Mapping[str, Shapes], parts: Parts, name: str, read: Read) -> None:
    """A component piece by piece: read, its LoRAs added, shrunk, and written where weights are to be on disk; so that
    not all of a denoiser, nor all components, need be in memory at once."""
    alone = Parts(parts.checkpoint, {name: parts[name]}, parts.device, parts.precision)
    settings = {type(setting): setting for setting in plan.settings}
    if isinstance(rows := settings.get(Chunk), Chunk):  # they say what is asked for at once, and so what lies together
        chunk.apply(alone, rows)
    loras = plan.request.loras if name in parts.checkpoint.experts else ()
    with lora.merging(parts, name, loras, needed) as merge:

        def finish(names: Collection[str]) -> None:
            read(names)
            merge(names)
            if isinstance(stored := settings.get(Quantize), Quantize):
                quantize.apply(alone, stored, names)

        place = settings.get(Offload)
        offload.keep(parts, name, place if isinstance(place, Offload) else Offload(value="none"), finish)


class Pipeline:
    """Loaded parts that turn a plan's photo and prompt into frames."""

    def __init__(
        self,
        plan: Plan,
        parts: Parts,
        ledger: Ledger | None = None,
        *,
        rungs: tuple[Rung, ...] = (),
        fixed: frozenset[str] = frozenset(),
        ladder: bool = True,
    ) -> None:
        """
        Args:
            parts: arranged as `plan` says after `rungs`.
            rungs: that the plan has come down already.
            fixed: types of settings that no rung moves.
            ladder: whether memory that runs out lowers the plan; else it is an error.
        """
        self.parts = parts
        self.ledger = ledger or Ledger(plan.device.id)
        self._descent = Descent(plan, rungs, fixed, held=not ladder)
        self._family = family_of(parts.checkpoint)

    @property
    def plan(self) -> Plan:
        """As it is now."""
        return self._descent.plan

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """That the plan has come down."""
        return self._descent.rungs

    def run(
        self,
        *,
        state: State | None = None,
        on_step: Callable[[Step], None] | None = None,
        save: Callable[[State], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Video:
        """Make the video; its frames are decoded as they are read.

        Args:
            state: where an earlier run stood; None begins at the beginning.
            on_step: called after every step.
            save: called with a state that the run can go on from, after encoding and after every step.
            cancelled: asked after every step and frame; True ends the run there.

        Raises:
            Cancelled: `cancelled` said so.
            DoesNotFit: memory ran out, and there is no rung left.
            NotFinite: the model produced NaN or infinity, in fp32 too.
        """
        if state is None:
            state = self.encode()
            if save:
                save(state)
        self.denoise(state, on_step=on_step, save=save, cancelled=cancelled)
        return self.video(state, save=save, cancelled=cancelled)

    def video(
        self,
        state: State,
        *,
        save: Callable[[State], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Video:
        """The finished latents as a video; its frames are decoded as they are read."""
        request = self.plan.request
        return Video(
            frames=self.decode(state, save=save, cancelled=cancelled),
            num_frames=request.num_frames, width=request.width, height=request.height, fps=request.fps,
        )  # fmt: skip

    @torch.no_grad()
    def encode(self) -> State:
        """Photo and prompt -> conditioning and the first, noisy latents."""
        request, parts, family = self.plan.request, self.parts, self._family
        first = self._photo(request.image)
        last = self._photo(request.last_image) if request.last_image else None

        def encode_image() -> tuple[torch.Tensor, Tensors]:
            parts.use(*IMAGE_ENCODERS)
            generator = torch.Generator().manual_seed(request.seed)
            latents, conditioning = family.encode_image(parts, request, first, last, generator)
            latents = correlated(parts, latents, generator)
            _check_finite(conditioning.values(), "the image encoder", parts.dtype("vae"))
            return latents, conditioning

        def encode_text() -> Tensors:
            parts.use(*TEXT_ENCODERS)
            conditioning = family.encode_text(parts, request, self.ledger.note)
            _check_finite(conditioning.values(), "the text encoder", parts.dtype("text_encoder"))
            return conditioning

        with self.ledger.phase("encode_text"):
            text = self._fitting(lambda: self._within_range(TEXT_ENCODERS, encode_text))
        with self.ledger.phase("encode_image"):
            latents, image = self._fitting(lambda: self._within_range(IMAGE_ENCODERS, encode_image))
        # contiguous, as they are after a resume: kernels round by memory layout
        conditioning = {name: tensor.contiguous() for name, tensor in (text | image).items()}
        return State(step=0, latents=latents, conditioning=conditioning, scheduler={}, rungs=self.rungs)

    @torch.no_grad()
    def denoise(
        self,
        state: State,
        *,
        on_step: Callable[[Step], None] | None = None,
        save: Callable[[State], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take the steps that are left, moving `state` along."""
        state.rungs = self.rungs
        schedule = self._schedule()
        fresh = schedule.state()
        for index in range(state.step, len(schedule)):
            expert = self._expert(schedule.timesteps[index], schedule)[0]
            following = self._following(schedule, index)
            if following != expert:  # its weights may be fetched while this one takes its last step
                self.parts.expect(following)
            began = time.perf_counter()
            with self.ledger.phase(f"denoise:{expert}"):
                step = partial(self._step, state, schedule, fresh)
                noisy, prediction, state.latents = self._fitting(step, state, save)
                state.step, state.scheduler = index + 1, schedule.state()
            seconds = time.perf_counter() - began
            if save:
                save(state)
            if on_step:
                preview = partial(
                    self._preview, partial(schedule.denoised, prediction, index, noisy), state.conditioning
                )
                on_step(Step(state.step, len(schedule), expert, seconds, state.latents, preview))
            if cancelled() and state.step < len(schedule):
                if save:  # once more: whoever saves now and then may have let this step pass
                    save(state)
                raise Cancelled(f"stopped after step {state.step} of {len(schedule)}.")

    def _step(
        self, state: State, schedule: Schedule, fresh: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The latents before the next step, its prediction, and the latents after it. Leaves `state` where it stands.

        Args:
            fresh: what the scheduler held before the first step.
        """
        state.move(self.parts.device)
        schedule.restore(fresh | state.scheduler)  # the same step may have broken off half-way
        t, noisy = schedule.timesteps[state.step], state.latents
        expert, scale = self._expert(t, schedule)
        estimate = partial(_finished, schedule, state.step, noisy)
        prediction = self.predict(expert, schedule.scaled(noisy, t), t, state.conditioning, scale, estimate)
        self.parts.use(self._following(schedule, state.step))  # they may come while this step is finished and saved
        return noisy, prediction, schedule.step(prediction, t, noisy)

    def decode(
        self,
        state: State,
        *,
        save: Callable[[State], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Frame]:
        """The finished latents as frames, uint8 (H, W, 3), one by one."""
        done = 0
        try:
            while True:
                shortage = overflow = None
                try:
                    for frame in islice(self._frames(state, cancelled), done, None):
                        _stop_if(cancelled)
                        done += 1
                        yield frame
                    return
                except NotFinite as error:
                    overflow = error.with_traceback(None)  # whose frames hold tensors
                except Exception as error:
                    shortage = self._descent.shortage(error)
                if overflow:
                    self._fitting(partial(self._to_fp32, ("vae",), overflow), state, save)
                if shortage:
                    self._lower(shortage, state, save)
        finally:
            self.parts.use()

    def close(self) -> None:
        """It makes no more videos: nothing of it is left on the device or on disk."""
        self.parts.close()

    def experts(self) -> tuple[str, ...]:
        """Who denoises at each step of the request."""
        schedule = self._schedule()
        return tuple(self._expert(t, schedule)[0] for t in schedule.timesteps)

    def rearrange(self, plan: Plan, fixed: frozenset[str]) -> None:
        """Arrange the loaded parts as `plan` says; no rung moves settings of the types `fixed`."""
        self.parts.use()
        change(self.parts, self.plan, plan)
        self._descent.plan, self._descent.fixed = plan, self._descent.fixed | fixed
        _give_back(plan)

    def unload(self) -> None:
        """Nothing is left of the parts: another pipeline is loaded in their place."""
        self.parts.close()
        self.parts.components.clear()
        _give_back(self.plan)

    def _photo(self, path: Path) -> Image.Image:
        request = self.plan.request
        return photo.fit(photo.load(path), request.width, request.height, request.fit)

    def _schedule(self) -> Schedule:
        request = self.plan.request
        scheduler = self.parts["scheduler"]
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        changed = {} if request.shift is None else {name: request.shift}
        return Schedule(type(scheduler).from_config(scheduler.config, **changed), request.steps, self.parts.device)

    def _following(self, schedule: Schedule, index: int) -> str:
        """Who takes the step after this one; after the last one, who took it."""
        return self._expert(schedule.timesteps[min(index + 1, len(schedule) - 1)], schedule)[0]

    def _expert(self, t: torch.Tensor, schedule: Schedule) -> tuple[str, float]:
        """Who denoises at `t`, and with which guidance: the first expert down to the boundary, the second below."""
        checkpoint = self.parts.checkpoint
        boundary = (checkpoint.boundary_ratio or 0.0) * schedule.train_timesteps
        index = 0 if len(checkpoint.experts) == 1 or t >= boundary else 1
        return checkpoint.experts[index], self.plan.request.guidance[index]

    def predict(
        self,
        expert: str,
        latents: torch.Tensor,
        t: torch.Tensor,
        conditioning: Tensors,
        scale: float,
        estimate: Estimate = lambda prediction, frames: prediction,
    ) -> torch.Tensor:
        """The guided prediction in fp32, (1, C, F, H, W).

        Args:
            estimate: asked between the windows of a long video; without one they are predicted, but do not go on
                where those before them are.
        """

        def forward(latents: torch.Tensor, conditioning: Tensors, branches: slice) -> torch.Tensor:
            prediction = self._family.predict(self.parts, expert, latents, t, conditioning, branches)
            _check_finite([prediction], f"the {expert} at timestep {t:g}", prediction.dtype)
            return prediction.float()

        def window(latents: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
            return guided(self.parts, partial(forward, latents, conditioning), scale)

        self.parts.use(expert)
        return self._within_range((expert,), lambda: fused(self.parts, window, latents, conditioning, estimate))

    @torch.no_grad()
    def _preview(self, denoised: Callable[[], torch.Tensor], conditioning: Tensors) -> Frame:
        """The middle latent frame, decoded on its own."""
        latents = denoised()
        self.parts.use("vae")
        middle = self._family.settle(latents, conditioning)[:, :, latents.shape[2] // 2].unsqueeze(2)
        chunks = self._family.decode(self.parts, middle)
        try:
            frame: Frame = next(chunk for chunk in chunks if len(chunk))[0].numpy()
        except Exception:
            self.parts.forget()
            raise
        return frame

    def _frames(self, state: State, cancelled: Callable[[], bool]) -> Iterator[Frame]:
        with self.ledger.phase("decode"):
            state.move(self.parts.device)
            self.parts.use("vae")
            latents = self._family.settle(state.latents, state.conditioning)
        for frames in self._timed(self._family.decode(self.parts, latents)):
            _stop_if(cancelled)
            yield from frames.numpy()

    def _timed(self, chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each chunk, with the work behind it booked as decoding."""
        while True:
            with self.ledger.phase("decode"), torch.no_grad():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _fitting(
        self, compute: Callable[[], T], state: State | None = None, save: Callable[[State], None] | None = None
    ) -> T:
        """`compute()`; where memory ran out, again and again with the plan a rung lower."""
        while True:
            try:
                return compute()
            except Exception as error:
                shortage = self._descent.shortage(error)
            self._lower(shortage, state, save)

    def _lower(self, shortage: Shortage, state: State | None, save: Callable[[State], None] | None) -> None:
        """One rung down, in place; `state`, where there is one, is kept with it."""
        self.parts.use()
        self.parts.forget()
        taken = False
        while not taken:
            before = self.plan
            self._descent.lower(shortage, None if state is None else state.step, self.ledger)
            taken = self._taken(before)
            _give_back(self.plan)
        if state is not None:
            state.rungs = self.rungs
            if save:
                save(state)

    def _taken(self, before: Plan) -> bool:
        """Whether the parts are as the plan says now; else, where the memory for it ran out, both are as `before`."""
        try:
            change(self.parts, before, self.plan)
            return True
        except Exception as error:
            shortage = self._descent.shortage(error)
        refused = self.plan
        self._descent.refuse(shortage, before, self.ledger)
        _give_back(refused)
        change(self.parts, refused, before)
        return False

    def _within_range(self, names: tuple[str, ...], compute: Callable[[], T]) -> T:
        """`compute()`; where fp16 overflowed, again with these components in fp32, where they stay."""
        try:
            return compute()
        except NotFinite as error:
            self._to_fp32(names, error)
            return compute()

    def _to_fp32(self, names: tuple[str, ...], error: NotFinite) -> None:
        half = [name for name in names if name in self.parts and self.parts.dtype(name) == torch.float16]
        if not half:
            raise error
        for name in half:
            self.parts.cast(name, torch.float32)
            self.parts.raised.add(name)
        self.ledger.note(f"{error} It runs in fp32 from here on ({', '.join(half)}).")


def _give_back(plan: Plan) -> None:
    """What nobody holds any more is free on the card, for blocks of any size."""
    gc.collect()
    if plan.device.id != "cpu":
        torch.cuda.empty_cache()


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("stopped while the frames were decoded.")


def _finished(
    schedule: Schedule, index: int, noisy: torch.Tensor, prediction: torch.Tensor, frames: slice
) -> torch.Tensor:
    """What `prediction`, of some latent frames of `noisy` at step `index`, says they will be."""
    return schedule.denoised(prediction, index, noisy[:, :, frames])


def _check_finite(tensors: Iterable[torch.Tensor], who: str, dtype: torch.dtype) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NotFinite(f"{who} produced NaN or infinity in {str(dtype).removeprefix('torch.')}.")
