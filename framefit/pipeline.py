"""The whole journey: a plan becomes parts, parts become frames.

    encode text, encode image -> denoise, step by step -> decode

One loop serves every family; what differs is in the family's functions (`framefit.families`), and how the parts
are arranged is in the plan's settings (`framefit.passes`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from framefit import photo
from framefit.checkpoint import State
from framefit.errors import Cancelled, NotFinite
from framefit.families import Checkpoint, family_of, hub, lora
from framefit.families.files import check_headers
from framefit.families.parts import IMAGE_ENCODERS, PRECISIONS, TEXT_ENCODERS, Parts, Tensors, load_parts
from framefit.ledger import Ledger
from framefit.passes import apply_all
from framefit.passes.guidance import guided
from framefit.passes.window import Estimate, correlated, fused
from framefit.plan import Plan
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


def load(plan: Plan, checkpoint: Checkpoint, ledger: Ledger | None = None) -> Pipeline:
    """Read the weights of `checkpoint` and arrange them as `plan` says.

    Raises:
        ModelMissing: the weights are not on this machine, or are incomplete.
        BadInput: a LoRA that does not fit them.
    """
    ledger = ledger or Ledger(plan.device.id)
    with ledger.phase("load"):
        folder = hub.locate(checkpoint)
        check_headers(folder, checkpoint)
        parts = load_parts(
            checkpoint, folder, dtype=PRECISIONS[plan.precision], device=torch.device(plan.device.id),
            on_host=plan.offload != "none",
        )  # fmt: skip
        lora.merge(parts, plan.request.loras)
        return Pipeline(plan, apply_all(parts, plan), ledger)


class Pipeline:
    """Loaded parts that turn a plan's photo and prompt into frames."""

    def __init__(self, plan: Plan, parts: Parts, ledger: Ledger | None = None) -> None:
        self.plan = plan
        self.parts = parts
        self.ledger = ledger or Ledger(plan.device.id)
        self._family = family_of(parts.checkpoint)

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
            NotFinite: the model produced NaN or infinity, in fp32 too.
        """
        if state is None:
            state = self.encode()
            if save:
                save(state)
        self.denoise(state, on_step=on_step, save=save, cancelled=cancelled)
        request = self.plan.request
        return Video(
            frames=self.decode(state, cancelled=cancelled),
            num_frames=request.num_frames, width=request.width, height=request.height, fps=request.fps,
        )  # fmt: skip

    @torch.no_grad()
    def encode(self) -> State:
        """Photo and prompt -> conditioning and the first, noisy latents."""
        request, parts, family = self.plan.request, self.parts, self._family
        first = self._photo(request.image)
        last = self._photo(request.last_image) if request.last_image else None

        def encode_image() -> tuple[torch.Tensor, Tensors]:
            generator = torch.Generator().manual_seed(request.seed)
            latents, conditioning = family.encode_image(parts, request, first, last, generator)
            latents = correlated(parts, latents, generator)
            _check_finite(conditioning.values(), "the image encoder", parts.dtype("vae"))
            return latents, conditioning

        def encode_text() -> Tensors:
            conditioning = family.encode_text(parts, request, self.ledger.note)
            _check_finite(conditioning.values(), "the text encoder", parts.dtype("text_encoder"))
            return conditioning

        with self.ledger.phase("encode_text"):
            parts.use(*TEXT_ENCODERS)
            text = self._within_range(TEXT_ENCODERS, encode_text)
        with self.ledger.phase("encode_image"):
            parts.use(*IMAGE_ENCODERS)
            latents, image = self._within_range(IMAGE_ENCODERS, encode_image)
        # contiguous, as they are after a resume: kernels round by memory layout
        conditioning = {name: tensor.contiguous() for name, tensor in (text | image).items()}
        return State(step=0, latents=latents, conditioning=conditioning, scheduler={})

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
        state.move(self.parts.device)
        schedule = self._schedule()
        schedule.restore(state.scheduler)
        for index in range(state.step, len(schedule)):
            t = schedule.timesteps[index]
            expert, scale = self._expert(t, schedule)
            began = time.perf_counter()
            with self.ledger.phase(f"denoise:{expert}"):
                noisy = state.latents
                estimate = partial(_finished, schedule, index, noisy)
                prediction = self.predict(expert, schedule.scaled(noisy, t), t, state.conditioning, scale, estimate)
                if index + 1 < len(schedule):  # its weights may come while this step is finished and saved
                    self.parts.use(self._expert(schedule.timesteps[index + 1], schedule)[0])
                state.latents = schedule.step(prediction, t, noisy)
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

    def decode(self, state: State, *, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Frame]:
        """The finished latents as frames, uint8 (H, W, 3), one by one."""
        state.move(self.parts.device)
        latents = self._family.settle(state.latents, state.conditioning)
        done = 0
        try:
            while True:
                try:
                    for chunk in self._timed(islice(self._family.decode(self.parts, latents), done, None)):
                        done += 1
                        for frame in chunk.numpy():
                            if cancelled():
                                raise Cancelled("stopped while the frames were decoded.")
                            yield frame
                    return
                except NotFinite as error:
                    self._to_fp32(("vae",), error)
        finally:
            self.parts.use()

    def experts(self) -> tuple[str, ...]:
        """Who denoises at each step of the request."""
        schedule = self._schedule()
        return tuple(self._expert(t, schedule)[0] for t in schedule.timesteps)

    def _photo(self, path: Path) -> Image.Image:
        request = self.plan.request
        return photo.fit(photo.load(path), request.width, request.height, request.fit)

    def _schedule(self) -> Schedule:
        request = self.plan.request
        scheduler = self.parts["scheduler"]
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        changed = {} if request.shift is None else {name: request.shift}
        return Schedule(type(scheduler).from_config(scheduler.config, **changed), request.steps, self.parts.device)

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
        frame: Frame = next(iter(self._family.decode(self.parts, middle)))[0].numpy()
        return frame

    def _timed(self, chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each chunk, with the work behind it booked as decoding."""
        while True:
            with self.ledger.phase("decode"), torch.no_grad():
                self.parts.use("vae")
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

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
        self.ledger.note(f"{error} It runs in fp32 from here on ({', '.join(half)}).")


def _finished(
    schedule: Schedule, index: int, noisy: torch.Tensor, prediction: torch.Tensor, frames: slice
) -> torch.Tensor:
    """What `prediction`, of some latent frames of `noisy` at step `index`, says they will be."""
    return schedule.denoised(prediction, index, noisy[:, :, frames])


def _check_finite(tensors: Iterable[torch.Tensor], who: str, dtype: torch.dtype) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NotFinite(f"{who} produced NaN or infinity in {str(dtype).removeprefix('torch.')}.")
