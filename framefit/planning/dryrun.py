"""A run without weights, card or arithmetic: the program itself on fake tensors, and what it would hold and do.

The parts are built as a run builds them, the passes applied, and the family's functions called under torch's
FakeTensorMode: encode, one guided prediction of every expert, decode. Of a row of equal blocks, or of equal calls, the
second stands for all that follow. cuDNN's workspace is added by a rule; what the allocator keeps is not here.
Stages that were traced before are passed over: what they give to others is known by its shape.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from math import prod
from typing import Any, cast

import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from framefit.families import Checkpoint, family_of
from framefit.families.parts import IMAGE_ENCODERS, PRECISIONS, TEXT_ENCODERS, Parts, Tensors
from framefit.families.parts import weights as weights_of
from framefit.ledger.allocator import MARK, PRODUCT, Block
from framefit.ledger.counts import Counts, Tally, count
from framefit.ledger.live import Live, Peak
from framefit.ledger.operators import channels_last
from framefit.ledger.transfer import Transfer, transfer_for
from framefit.passes import apply_all
from framefit.passes.guidance import guided
from framefit.passes.window import fused
from framefit.plan import Offload, Plan
from framefit.planning import alike, chunks
from framefit.planning.phase import Given, PhaseTrace
from framefit.planning.placed import Cut, Placed, cut, kept, placed, watch
from framefit.planning.spent import Spent
from framefit.planning.traces import STAGES
from framefit.schedule import Schedule
from framefit.testing import random_parts

__all__ = ["followed", "trace"]

CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten._convolution, torch.ops.aten.cudnn_convolution}
WITHOUT_BIAS = {torch.ops.aten.mm, torch.ops.aten.bmm}
PRODUCTS = WITHOUT_BIAS | {torch.ops.aten.addmm, torch.ops.aten.baddbmm}
VIEWS = {torch.ops.aten.view, torch.ops.aten._unsafe_view}
NORMS = {torch.ops.aten.native_layer_norm, torch.ops.aten.native_group_norm}
EIGHT = 8
"""Of channels in 16 bits, cuDNN's fast kernels take a multiple."""
FEW = 3
"""Equal blocks up to which all of them are traced."""
LARGEST = 8
"""Storages at the peak that are named."""
STEPS = 3
"""After which a scheduler remembers as much as it ever will."""
LATENTS = "latents"
"""Beside the conditioning that encoding the photo gives."""


def trace(plan: Plan, checkpoint: Checkpoint, known: Mapping[str, Given] | None = None) -> tuple[PhaseTrace, ...]:
    """The phases of `plan` in the order of a run, from encode_text to decode; a few seconds.

    Args:
        known: stage -> what it gives, of those that are not traced again.
    """
    known = known or {}
    twins = _twins(plan, checkpoint)
    plan, checkpoint = _without(twins, plan, checkpoint)
    # where some blocks stay and some stream, no block stands for another
    whole = checkpoint.experts if any(isinstance(s, Offload) and s.kept for s in plan.settings) else ()
    settings = tuple(s for s in plan.settings if any(s.touches(stage) for stage in STAGES if stage not in known))
    # a pass expects whatever its setting touches
    stages = {stage for stage in STAGES if stage not in known or any(s.touches(stage) for s in settings)}
    models = {name for stage in stages for name in _models(stage, checkpoint)}
    parts, standing = _fake(checkpoint, PRECISIONS[plan.precision], models, whole)
    parts = apply_all(parts, replace(plan, settings=settings))
    weights = kept(parts, standing)
    found = followed(parts, plan, weights, standing, cut(parts, weights, standing), known)
    return tuple(phase for each in found for phase in _for_twins(each, twins))


def followed(
    parts: Parts,
    plan: Plan,
    weights: Mapping[str, int],
    standing: Mapping[nn.Module, int],
    cuts: Mapping[str, Cut] | None = None,
    known: Mapping[str, Given] | None = None,
) -> tuple[PhaseTrace, ...]:
    """What `parts`, fake or real, hold and do on the way through the phases.

    Args:
        weights: component -> bytes of its weights.
        standing: block -> how many equal blocks it stands for.
        cuts: component -> its weights as offloading would cut them.
        known: as in `trace`.
    """
    cuts, known = cuts or {}, known or {}
    modules = {module: name for name, part in parts.components.items() for module, name in _named(name, part)}
    at_work: list[str] = []
    workspace = _workspace if plan.device.id != "cpu" else lambda *_: (0, 0)
    live = Live(_tensors(parts), lambda: at_work[-1] if at_work else "", workspace)
    tally = Tally(card=plan.device.id != "cpu")
    transfer = transfer_for(parts.device, _tensors(parts))
    moving = [(level, sizes) for each in cuts.values() for level, sizes in each.modules.items()]
    spent = Spent(tally)
    way = _Way(parts, plan, live, tally, known, transfer, spent)
    with ExitStack() as stack:
        stack.enter_context(_fakeness(parts))
        stack.enter_context(_following(modules, standing, moving, at_work, tally, spent))
        watch(parts, lambda bytes: tally.move("host_to_device", bytes))
        if "vae" in parts:
            stack.enter_context(alike.calls(parts["vae"], live, tally))
        stack.enter_context(chunks.once(tally))
        parts.pieces = replace(
            parts.pieces,
            each=partial(alike.tiles, tally, transfer, bool(parts.pieces.shelf)),
            over=partial(alike.groups, tally, transfer),
            made=partial(alike.latent_frames, live, tally),
            shelf=parts.pieces.shelf and partial(spent.shelf, transfer),
        )
        stack.enter_context(torch.no_grad())
        stack.enter_context(live)
        stack.enter_context(_AsOnCard(live, told="encode_text" in known) if tally.card else nullcontext())
        stack.enter_context(_Sound())  # type: ignore[no-untyped-call]
        count(way.go, tally)
        spent.end("block", "leaf")
    return tuple(
        replace(
            _phase(
                name, placed(parts, weights, standing, way.used[name]), peak, tally.phases.get(name, Counts()),
                way.after_one.get(name, 0),
            ),
            pieces={part: cuts[part].shared(spent.seconds) for part in way.used[name] if part in cuts},
            gives=way.gave.get(name, {}),
            shelf_bytes=way.shelved.get(name, 0),
            streams=way.streams.get(name, ()),
        )
        for name, peak in live.phases.items()
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Way:
    """The family's functions in the order of a run."""

    parts: Parts
    plan: Plan
    live: Live
    tally: Tally
    known: Mapping[str, Given]
    transfer: Transfer
    """Of what lies in RAM between two uses."""
    spent: Spent
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Phase -> the components that it needs."""
    gave: dict[str, Given] = field(default_factory=dict)
    shelved: dict[str, int] = field(default_factory=dict)
    """Phase -> bytes of RAM in which tensors lie between two uses."""
    streams: dict[str, tuple[tuple[float, int], ...]] = field(default_factory=dict)
    """Phase -> stages between which they move, as `PhaseTrace` has them."""
    after_one: dict[str, int] = field(default_factory=dict)
    """Phase -> as `PhaseTrace` has it."""

    @contextmanager
    def _phase(self, name: str, *needs: str) -> Iterator[None]:
        self.used[name] = needs
        before = self.transfer.returned_bytes, self.transfer.pieces_bytes
        with self.live.phase(name), self.tally.phase(name):
            self.parts.use(*needs)
            yield
            for there_and_back in ("device_to_host", "host_to_device"):
                self.tally.move(there_and_back, self.transfer.returned_bytes - before[0])
            self.streams[name] = self.spent.stages()
        self.shelved[name] = self.transfer.pieces_bytes - before[1]

    def _given(self, name: str, needs: Sequence[str], call: Callable[[], Tensors]) -> Tensors:
        """What an encoding gives: from a call, or where it was called before like that, without contents."""
        if name in self.known:
            return {key: torch.empty(shape, dtype=getattr(torch, of)) for key, (of, shape) in self.known[name].items()}
        with self._phase(name, *needs):
            made = call()
        self.gave[name] = {key: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in made.items()}
        return made

    def _text(self) -> Tensors:
        with unset_fake_temporarily():  # it asks how many tokens there are
            return family_of(self.parts.checkpoint).encode_text(self.parts, self.plan.request, lambda sentence: None)

    def _image(self) -> Tensors:
        request = self.plan.request
        photo = Image.new("RGB", (request.width, request.height))
        last = photo if request.last_image else None
        latents, image = family_of(self.parts.checkpoint).encode_image(
            self.parts, request, photo, last, torch.Generator()
        )
        return image | {LATENTS: latents}

    def go(self) -> None:
        parts, request = self.parts, self.plan.request
        family = family_of(parts.checkpoint)
        conditioning = self._given("encode_text", TEXT_ENCODERS, self._text)
        conditioning |= self._given("encode_image", IMAGE_ENCODERS, self._image)
        latents = conditioning.pop(LATENTS)
        conditioning = {name: tensor.contiguous() for name, tensor in conditioning.items()}
        between, remembered = _between_steps(parts["scheduler"])
        held = [torch.empty_like(latents) for _ in range(between)]
        latents = alike.zeroed(torch.empty_like(latents))  # a step's are newer than what is left of the one before
        experts = zip(parts.checkpoint.experts, request.guidance, strict=True)
        for expert, scale in experts if "denoise" not in self.known else ():

            def window(latents: torch.Tensor, conditioning: Tensors, expert: str = expert, scale: float = scale) -> Any:
                def forward(branches: slice) -> torch.Tensor:
                    return family.predict(parts, expert, latents, torch.tensor(900.0), conditioning, branches).float()

                return guided(parts, forward, scale)

            self.after_one[f"denoise:{expert}"] = between
            equal = alike.repeated(window, self.live, self.tally)
            with self._phase(f"denoise:{expert}", expert):
                prediction = fused(parts, equal, latents, conditioning, lambda prediction, frames: prediction)
                self.live.mark(MARK)  # the next expert comes here (`Pipeline._step`)
                following = alike.zeroed(torch.empty_like(latents))
                held[:2], latents = [latents, prediction], following
                del prediction, following
        del held[remembered:]
        if "decode" not in self.known:
            with self._phase("decode", "vae"):
                for chunk in family.decode(parts, family.settle(latents, conditioning)):
                    del chunk


def _between_steps(scheduler: Any) -> tuple[int, int]:
    """Tensors like the latents that lie on the device while a step is predicted, once a few were taken: the last step's
    input and prediction, and what the scheduler remembers; and of these what it remembers, until the end of the run."""
    with _disable_current_modes():
        schedule = Schedule(type(scheduler).from_config(scheduler.config), STEPS, torch.device("cpu"))
        latents = torch.ones(1, 1, 1, 1, 1)
        for t in schedule.timesteps:
            noisy, prediction = latents, torch.ones_like(latents)
            latents = schedule.step(prediction, t, noisy)
        state = [leaf for leaf in tree_leaves(schedule.state()) if isinstance(leaf, torch.Tensor)]
    alike = {id(tensor) for tensor in state if tensor.shape == latents.shape} - {id(latents)}
    return len(alike | {id(noisy), id(prediction)}), len(alike)


def _twins(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """Expert -> the one before it that is built alike and does as much, so that its trace differs by the name.

    None where weights are moved: there every phase knows of all of them.
    """
    if plan.offload != "none":
        return {}
    likeness = {
        name: (checkpoint[name].class_name, json.dumps(checkpoint[name].config, default=str), scale > 1)
        for name, scale in zip(checkpoint.experts, plan.request.guidance, strict=True)
    }
    first = {like: name for name, like in reversed(likeness.items())}
    return {name: first[like] for name, like in likeness.items() if first[like] != name}


def _without(twins: Collection[str], plan: Plan, checkpoint: Checkpoint) -> tuple[Plan, Checkpoint]:
    scales = zip(checkpoint.experts, plan.request.guidance, strict=True)
    guidance = tuple(scale for name, scale in scales if name not in twins)
    components = tuple(each for each in checkpoint.components if each.name not in twins)
    return replace(plan, request=replace(plan.request, guidance=guidance)), replace(checkpoint, components=components)


def _for_twins(phase: PhaseTrace, twins: Mapping[str, str]) -> Iterator[PhaseTrace]:
    """A phase as it is with the weights of the twins, and where it is of one that has some, theirs."""
    more = {twin: phase.weights_bytes[first] for twin, first in twins.items() if first in phase.weights_bytes}
    phase = replace(phase, weights_bytes={**phase.weights_bytes, **more})
    yield phase
    for twin, first in twins.items():
        if phase.name == f"denoise:{first}":
            yield replace(
                phase, name=f"denoise:{twin}", pieces={twin: phase.pieces[first]} if phase.pieces else {},
                held={what.replace(f" in {first}", f" in {twin}"): bytes for what, bytes in phase.held.items()},
            )  # fmt: skip


def _models(stage: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The components that a stage calls."""
    if stage == "denoise":
        return checkpoint.experts
    asked = {"encode_text": TEXT_ENCODERS, "encode_image": IMAGE_ENCODERS, "decode": ("vae",)}
    return asked[stage]


def _workspace(func: Any, args: Any, result: Any) -> tuple[int, int]:
    """Bytes that an operator takes on a card beside its tensors, as `Live` asks for them.

    cuDNN's fast kernels are channels-last: it copies the weight, channels-first input and output too, and what has
    another number of channels than a multiple of EIGHT in 16 bits. A kernel of one pixel is a product of matrices and
    takes none. So it was in what torch told of its allocations on an H200 (LOG, reserved bytes), but that a few take
    none, or some MiB more. A single picture counts as channels-first: torch gives a fake view of it other strides.
    Torch has copied an input with gaps before, as a slice of frames is (aten/src/ATen/native/Convolution.cpp,
    `input.contiguous`), and a norm's as well (native/cuda/layer_norm_kernel.cu, native/group_norm.cpp). A softmax that
    is safe where a row has no key asks every score whether it is one (native/transformers/attention.cpp).
    """
    if func._overloadpacket in CONVOLUTIONS:
        image, weight = args[:2]
        last = (image.ndim == 5 or len(image) > 1) and channels_last(image)
        gapless = image.is_contiguous() or channels_last(image)
        copied = [weight, *(t for t in (image, result) if not last or _padded(t) > t.nbytes)]
        pixel = prod(weight.shape[2:]) == 1
        return 0 if gapless else int(image.nbytes), 0 if pixel else sum(map(_padded, copied))
    if func._overloadpacket in NORMS:
        return 0 if args[0].is_contiguous() else int(args[0].nbytes), 0
    return 0, int(result.numel()) if func._overloadpacket is torch.ops.aten._safe_softmax else 0


def _padded(tensor: torch.Tensor) -> int:
    """Bytes of a copy whose channels are a multiple of EIGHT in 16 bits."""
    channels = tensor.shape[1]
    filled = -(-channels // EIGHT) * EIGHT if tensor.element_size() == 2 else channels
    return tensor.nbytes // channels * filled


def _adds_bias(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it may be a linear layer's: a vector of parameters, as wide as what it is added to."""
    if func is not torch.ops.aten.add.Tensor or kwargs or not isinstance(args[1], nn.Parameter):
        return False
    return bool(args[1].shape == args[0].shape[-1:])


class _AsOnCard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What fake tensors do otherwise than a card: what a convolution makes of channels-last is channels-last, where the
    CPU's, over frames, makes it otherwise; a linear layer adds its bias in place (native/Linear.cpp: not for
    subclasses of tensors); and `live` is told of the first product, where nobody was `told` before."""

    def __init__(self, live: Live, told: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live, self._told = live, told
        self._product = 0
        """Storage of what was made last, where it is a product without bias."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, product, self._product = func._overloadpacket, self._product, 0
        if product and _adds_bias(func, args, kwargs) and args[0].untyped_storage()._cdata == product:
            return args[0].add_(args[1])
        result = func(*args, **(kwargs or {}))
        if packet in WITHOUT_BIAS or (product and packet in VIEWS):
            self._product = result.untyped_storage()._cdata
        if packet in PRODUCTS and not self._told:
            self._told = True
            self._live.mark(PRODUCT)
        if packet in CONVOLUTIONS and isinstance(result, FakeTensor) and result.ndim == 5:
            image, frames = args[0], torch.channels_last_3d
            if image.is_contiguous(memory_format=frames) and not image.is_contiguous():
                return result.as_strided(
                    result.shape, torch.empty_like(result, device="meta", memory_format=frames).stride()
                )
        return result


class _Sound(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What the program asks of a value that is not there is answered as in a sound run: yes, it is finite."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True
        return func(*args, **(kwargs or {}))


def _fake(
    checkpoint: Checkpoint, dtype: torch.dtype, models: Collection[str] | None = None, whole: Sequence[str] = ()
) -> tuple[Parts, dict[nn.Module, int]]:
    """Fake parts, and for which blocks one stands for how many; `whole` have all."""
    parts = random_parts(checkpoint, dtype=dtype, device=torch.device("meta"), models=models)
    standing: dict[nn.Module, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, part in parts.components.items():
            if not isinstance(part, nn.Module):
                continue
            # nothing is left by layer
            if name not in whole and (name in checkpoint.experts or "T5Encoder" in checkpoint[name].class_name):
                standing |= _shortened(part)
            part.to_empty(device="cpu")
            if checkpoint[name].package == "transformers":
                cast(Any, part).tie_weights()
    parts.device = torch.device("cpu")
    return parts, standing


def _fakeness(parts: Parts) -> AbstractContextManager[object]:
    """In it what the program makes itself, as noise, is fake where the weights are."""
    first = next(_tensors(parts))
    return first.fake_mode if isinstance(first, FakeTensor) else nullcontext()


def _tensors(parts: Parts) -> Iterator[torch.Tensor]:
    for part in parts.components.values():
        if isinstance(part, nn.Module):
            yield from weights_of(part)


def _shortened(model: nn.Module) -> dict[nn.Module, int]:
    """Leave two of every row of more than a few equal blocks. Returns how many each second one stands for."""
    standing: dict[nn.Module, int] = {}
    for module in list(model.modules()):
        if not isinstance(module, nn.ModuleList) or len(module) <= FEW:
            continue
        kept: list[nn.Module] = []
        for _, run in groupby(module, key=_likeness):
            blocks = list(run)
            if len(blocks) > FEW:
                standing[blocks[1]] = len(blocks) - 1
                blocks = blocks[:2]
            kept += blocks
        module._modules = {str(i): block for i, block in enumerate(kept)}
    return standing


def _likeness(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that differ in nothing but the values of their weights."""
    return (type(block), *((name, p.shape, p.dtype) for name, p in block.named_parameters()))


def _named(name: str, part: Any) -> Iterator[tuple[nn.Module, str]]:
    if isinstance(part, nn.Module):
        for path, module in part.named_modules():
            yield module, f"{name}.{path}" if path else name


@contextmanager
def _following(
    modules: Mapping[nn.Module, str],
    standing: Mapping[nn.Module, int],
    moving: Sequence[tuple[str, Mapping[nn.Module, int]]],
    at_work: list[str],
    tally: Tally,
    spent: Spent,
) -> Iterator[None]:
    """Keep `at_work` the path of the module that computes; count what stands for several, and what would move."""

    def enter(module: nn.Module, args: Any) -> None:
        at_work.append(modules.get(module, at_work[-1] if at_work else ""))
        tally.times *= standing.get(module, 1)
        for level, sizes in moving:
            if module in sizes:
                tally.move(level, sizes[module])
                spent.begin(level, module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        at_work.pop()
        tally.times //= standing.get(module, 1)
        if "." not in modules.get(module, "."):  # a whole component
            spent.end("block", "leaf")

    handles = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _numbered(peak: Peak, newest: int) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """What a phase begins with, the `newest` last, and its blocks; numbered anew, whatever was traced before."""
    old = len(peak.begins) - newest
    begins = [*sorted(peak.begins[:old], key=lambda block: block[1]), *peak.begins[old:]]
    numbers = {mark: mark for mark, _ in (MARK, PRODUCT)}
    for number, _ in (*begins, *peak.blocks):
        numbers.setdefault(number, len(numbers) - 1)
    first, rest = (tuple((numbers[number], size) for number, size in of) for of in (begins, peak.blocks))
    return first, rest


def _phase(name: str, weights: Placed, peak: Peak, counts: Counts, after_one: int = 0) -> PhaseTrace:
    largest = sorted(peak.held, key=lambda held: -held.bytes)[:LARGEST]
    held: Counter[str] = Counter()
    for each in largest:
        held[f"{each.operator} {each.dtype}{list(each.shape)} in {each.module or 'the loop'}"] += each.bytes
    ways = ("elementwise", "host_to_device", "device_to_host", "block", "leaf")
    flops: dict[tuple[str, str], int] = {(kind, precision): n for (kind, precision), n in counts.flops.items()}
    begins, blocks = _numbered(peak, after_one + 1)
    return PhaseTrace(
        name=name, weights_bytes=weights.device_bytes, host_bytes=weights.host_bytes, onload_bytes=weights.onload_bytes,
        pinned_bytes=weights.pinned_bytes, disk_bytes=weights.disk_bytes, peak_bytes=peak.bytes, held=dict(held),
        flops=flops, bytes={way: counts.bytes[way] for way in ways}, work=dict(counts.work),
        shapes=tuple(sorted(counts.shapes)), rooms=weights.rooms,
        begins=begins, after_one=after_one, blocks=blocks,
    )  # fmt: skip
