"""From a request to a file: plan, load, run, write, report; and from a crash or a finished file back again."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

from framefit import photo, planning, recipe, video
from framefit.checkpoint import RunFolder, State, Writer, default_root
from framefit.device import ALL, Budget, Device
from framefit.errors import BadCheckpoint, BadImage, BadInput, Cancelled, FramefitError, UsageError
from framefit.families import Checkpoint, find, hub
from framefit.families.files import fingerprint
from framefit.ledger import Ledger, StepLog
from framefit.ledger.shortage import Shortage
from framefit.pipeline import Pipeline, Step, load
from framefit.plan import QUALITIES, Estimate, Plan, Tier
from framefit.planning import changes, check_fits, estimated
from framefit.planning.choose import untouched
from framefit.planning.ladder import exhausted
from framefit.planning.length import beyond_trained
from framefit.report import PhaseReport, Report
from framefit.request import Request
from framefit.retry import Again, watch_for, watched
from framefit.video import Video

__all__ = ["Options", "check_runs", "generate", "prepare", "replay", "resume", "translated"]


DEFAULT_CRF = 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to run, apart from what to make."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; to plan, also a card of `framefit.cards`"""
    budget: Budget = ALL
    """Most that the run may take."""
    precision: str | None = None
    """bf16, fp16 or fp32; None: what the device computes best"""
    preset: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Explicit settings by type, e.g. {"guidance": "apart"}."""
    quality: str = "exact"
    """exact, near or fast: the weakest tier that a setting may have which nobody asked for."""
    fit: bool = True
    """Whether settings that nobody asked for follow what the card has, where the usual ones do not fit."""
    use_tuned: bool = True
    """Whether settings that are not explicit are what `framefit tune` found on this device, where it did."""
    crf: int | None = None
    """Quality of an MP4, 0 (best) to 51; None: 18, or what an interrupted run was to have."""
    overwrite: bool = False
    weights: str | None = None
    """Fingerprint that the weights are expected to have; others are run too, and told."""
    checkpoints: Path | None = field(default_factory=default_root)
    """Where step checkpoints go; None: none are kept, and a crash loses the run."""
    checkpoint_every_s: float = 0.0
    """Least seconds between two checkpoints; 0: every step."""
    log_every: int = 10
    """Steps between two lines of seconds and memory in the log "framefit", at INFO; 0: none."""
    on_step: Callable[[Step], None] = lambda step: None
    on_phase: Callable[[str], None] = lambda name: None
    cancelled: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise UsageError(f"--crf is {self.crf}, and must be from 0 to 51.")
        if self.log_every < 0:
            raise UsageError(f"--log-every is {self.log_every}, and must be 0 (never) or more steps.")
        if self.quality not in QUALITIES:
            raise UsageError(f"quality '{self.quality}' is unknown: use {', '.join(QUALITIES)}.")
        if not self.checkpoint_every_s >= 0:
            raise UsageError(f"--checkpoint-every is {self.checkpoint_every_s:g}, and must be 0 or more seconds.")


def prepare(request: Request, options: Options) -> tuple[Checkpoint, Plan]:
    """The model's row and the plan with what `options` say of it, for a card with the settings that fit there."""
    checkpoint, plan = _unfitted(request, options)
    return checkpoint, _fitted(plan, checkpoint, options)


def _unfitted(request: Request, options: Options) -> tuple[Checkpoint, Plan]:
    return planning.prepare(
        request, device=options.device, budget=options.budget, preset=options.preset, settings=options.settings,
        precision=options.precision, use_tuned=options.use_tuned,
    )  # fmt: skip


def _fitted(plan: Plan, checkpoint: Checkpoint, options: Options) -> Plan:
    """On the CPU a run begins at once where nothing says otherwise: there the weights are all that is looked at."""
    if plan.device.id == "cpu" or not options.fit:
        return planning.estimated(plan, checkpoint) if _weights_are_not_all(plan) else plan
    return planning.fitted(plan, checkpoint, tier=QUALITIES[options.quality])


def generate(request: Request, output: Path, options: Options | None = None) -> Report:
    """Make the video of `request` at `output`.

    Raises:
        FramefitError: its kinds are drawn in `framefit.errors`. Nothing is left half-written.
    """
    options = options or Options()
    checkpoint, plan = _unfitted(request, options)
    plan.device.check_here()
    return _made(checkpoint, _fitted(plan, checkpoint, options), output, options)


def replay(plan: Plan, output: Path, options: Options) -> Report:
    """Make the video of a saved plan: its settings and its seed, on the device that it names or another one.

    Args:
        options: of these the device (auto: the plan's own, with its limit), its limit, the output's, the
            checkpoints' and the listeners count.

    Raises:
        FramefitError: as `generate`; a photo or a LoRA is gone, or is another one.
        UsageError: the plan is for a card that is not of this machine, and no other device is given.
    """
    if options.device == "auto":
        plan.device.check_here()
    _check_photos(plan)
    _check_loras(plan)
    device, checkpoint = _device_to_resume_on(plan, options), find(plan.request.model)
    estimate = Estimate(weights_bytes=plan.estimate.weights_bytes, free_bytes=device.budget_bytes)
    known = {setting.type for setting in plan.settings}
    newer = (setting for setting in untouched(checkpoint) if setting.type not in known)
    plan = replace(plan, device=device, estimate=estimate, settings=(*plan.settings, *newer))
    return _made(checkpoint, plan, output, options)


def _weights_are_not_all(plan: Plan) -> bool:
    """Whether their bytes do not say what a run on the CPU takes: some lie in files, are smaller, or RAM is limited."""
    return plan.offload != "none" or plan.quantize != "none" or plan.device.ram_limit_bytes is not None


def _made(checkpoint: Checkpoint, plan: Plan, output: Path, options: Options) -> Report:
    if checkpoint.folder is not None:  # what a folder lacks is told before what it would need
        hub.locate(checkpoint)
    _check_output(plan, output, options)
    plan = check_runs(plan, checkpoint, QUALITIES[options.quality])
    weights = fingerprint(hub.locate(checkpoint))
    if options.weights not in (None, weights):
        logging.getLogger("framefit").warning(
            "the weights of %s are others than the file was made with (fingerprint %s, here %s): expect other frames.",
            checkpoint.id, options.weights, weights,
        )  # fmt: skip
    if options.checkpoints is None:
        return _execute(checkpoint, plan, weights, output, options, None)
    crf = DEFAULT_CRF if options.crf is None else options.crf
    with RunFolder.create(options.checkpoints.absolute(), plan, weights, output, crf) as run:
        return _execute(checkpoint, plan, weights, output, options, run)


def resume(id: str, output: Path | None, options: Options, *, restart: bool = False) -> Report:
    """Go on with the run `id` from its last finished step.

    Args:
        output: where the video goes; None: where the run was to put it.
        options: of these only the device (auto: the run's own, with its limit), the limit, the output's, the
            checkpoints' and the listeners count.
        restart: begin again from step 0, whatever the checkpoint holds.

    Raises:
        BadCheckpoint: there is no such run, its files are corrupt, or it was made with other weights.
    """
    with RunFolder.open((options.checkpoints or default_root()).absolute(), id) as run:
        output = output or run.output
        checkpoint = find(run.plan.request.model)
        plan = replace(run.plan, device=_device_to_resume_on(run.plan, options))
        weights = fingerprint(hub.locate(checkpoint))
        _check_output(plan, output, options)
        _check_loras(plan)
        if replace(options.budget, vram_bytes=None) != ALL:
            check_fits(plan if plan.estimate.phases else estimated(plan, checkpoint))
        if restart:
            _check_photos(plan)
            run.restart(weights)
        elif weights != run.weights:
            raise BadCheckpoint(
                f"run {id} was made with other weights of {checkpoint.id} (fingerprint {run.weights}, here {weights}): "
                f"add --restart to begin again from step 0 with these."
            )
        state = None if restart else run.load()
        if state is None:
            _check_photos(plan)
        return _execute(checkpoint, plan, weights, output, options, run, state)


def _device_to_resume_on(plan: Plan, options: Options) -> Device:
    if options.device == "auto":
        kept = options.budget.vram_bytes or plan.device.vram_limit_bytes
        return Device.find(plan.device.id, replace(options.budget, vram_bytes=kept))
    device = Device.find(options.device, options.budget)
    device.check_here()
    return device


def check_runs(plan: Plan, checkpoint: Checkpoint, tier: Tier = "exact") -> Plan:
    """`plan`, for a card with the estimate of every phase: seconds of planning before minutes of running.

    Raises:
        UsageError: the plan's card is not of this machine.
        DoesNotFit: the plan is not feasible; it says what would be, of a tier up to `tier`.
    """
    plan.device.check_here()
    if not plan.estimate.phases and (plan.device.id != "cpu" or _weights_are_not_all(plan)):
        plan = estimated(plan, checkpoint)
    dry = bool(plan.estimate.phases)
    check_fits(plan, changes(plan, checkpoint, tier=tier) if dry and not plan.feasible else ())
    return plan


def _execute(
    checkpoint: Checkpoint,
    plan: Plan,
    weights: str,
    output: Path,
    options: Options,
    run: RunFolder | None,
    state: State | None = None,
) -> Report:
    began = time.perf_counter()
    ledger = Ledger(plan.device.id, on_enter=options.on_phase)
    resumed = None if state is None else state.step
    if checkpoint.caution:
        ledger.note(checkpoint.caution)
    if warning := beyond_trained(plan, checkpoint):
        ledger.note(warning)
    writer = _writer(run, plan.request.steps, options) if run else None
    crf = options.crf if options.crf is not None else run.crf if run else DEFAULT_CRF
    try:
        with plan.device.capped(), _finishing(writer), contextlib.ExitStack() as stack:
            pipeline = load(plan, checkpoint, ledger, rungs=state.rungs if state else ())
            stack.callback(pipeline.close)
            go = partial(Pipeline.run, on_step=_listening(plan, options), cancelled=options.cancelled)
            if state is None:
                state = pipeline.encode()
                if writer:
                    writer(state)
            frames = go(pipeline, state=state, save=writer)
            if writer:
                writer.wait()
            write = partial(_written, checkpoint, weights, output, crf)
            findings = write(pipeline, frames, overwrite=options.overwrite)
            again = Again(
                pipeline, checkpoint, go, partial(write, overwrite=True), lambda error: translated(error, plan, ledger)
            )
            stack.callback(again.close)
            findings, retry = again.where(findings, state)
    except FramefitError as error:
        raise _resumable(error, run) from None
    except KeyboardInterrupt:
        raise _resumable(Cancelled("stopped at once."), run) from None
    except Exception as error:
        raise _resumable(translated(error, plan, ledger), run) from error
    if run:
        run.discard()
    return Report(
        video=output,
        plan=plan,
        seconds=time.perf_counter() - began,
        resumed_from_step=resumed,
        phases=tuple(
            PhaseReport(name=p.name, seconds=round(p.seconds, 4), peak_bytes=p.peak_bytes) for p in ledger.close()
        ),
        notices=tuple(ledger.notices),
        rungs=again.pipeline.rungs,
        findings=tuple(findings),
        retry=retry,
    )


def _written(
    checkpoint: Checkpoint, weights: str, output: Path, crf: int, pipeline: Pipeline, frames: Video, *, overwrite: bool
) -> Sequence[str]:
    """Returns what may be wrong with the video."""
    with pipeline.ledger.phase("write"):
        coming = iter(frames.frames)
        first = list(islice(coming, 1))  # until then the decode may come down a rung, and the file says what made it
        plan, watch = pipeline.plan, watch_for(pipeline.plan, checkpoint)
        recipe.remember(checkpoint, plan, weights)
        parameters = recipe.parameters(checkpoint, plan, weights, crf)
        frames = replace(frames, frames=watched(chain(first, coming), watch))
        video.write(frames, output, parameters=parameters, crf=crf, overwrite=overwrite)
        return watch.findings()


def _check_output(plan: Plan, output: Path, options: Options) -> None:
    request = plan.request
    video.check_output(
        output,
        overwrite=options.overwrite,
        width=request.width,
        height=request.height,
        num_frames=request.num_frames,
    )


def _listening(plan: Plan, options: Options) -> Callable[[Step], None]:
    """The log, and whoever else listens."""
    log = StepLog(plan.device.id, options.log_every)

    def on_step(step: Step) -> None:
        log(step.index, step.total, step.seconds)
        options.on_step(step)

    return on_step


def _writer(run: RunFolder, total: int, options: Options) -> Writer:
    """Writes the first and the last state, one that the user stopped at, and between them as often as asked."""
    return Writer(
        run,
        every_s=options.checkpoint_every_s,
        always=lambda state: state.step in (0, total) or options.cancelled(),
    )


@contextlib.contextmanager
def _finishing(writer: Writer | None) -> Iterator[None]:
    """Whatever ends the block, the last state is on disk before anybody is told how to go on from it."""
    try:
        yield
    except BaseException as error:
        if writer:
            try:
                writer.wait()
            except FramefitError as another:
                error.add_note(str(another))
        raise
    if writer:
        with contextlib.suppress(FramefitError):  # the video is there: nobody goes on from a state
            writer.wait()


def _resumable(error: FramefitError, run: RunFolder | None) -> FramefitError:
    """The same error, with the way to go on where there is a state to go on from; else the run's folder goes."""
    if run is None:
        return error
    if not run.has_state:
        run.discard()
        return error
    root = run.path.parent
    where = "" if root == default_root() else f" --checkpoint-dir {shlex.quote(str(root))}"
    error.add_note(f"Go on from the last finished step with: framefit run --resume {run.id}{where}")
    return error


def translated(error: Exception, plan: Plan, ledger: Ledger) -> FramefitError:
    """What a library raised, as one of ours."""
    phase = ledger.last or "load"
    if shortage := Shortage.told(error, plan.device.id):
        return exhausted(plan, (), phase, shortage)
    logging.getLogger("framefit").debug("unexpected error", exc_info=error)
    reason = " ".join(str(error).split()) or "no reason given"
    return FramefitError(f"the phase {phase} failed ({type(error).__name__}: {reason}).")


def _check_photos(plan: Plan) -> None:
    """A run that has not encoded its photos yet must find them as they were."""
    for name, digest in plan.photos.items():
        path = getattr(plan.request, name)
        if not path.is_file() or photo.sha256(path) != digest:
            raise BadImage(
                f"{path} is gone or is another photo than the run began with: put it back, or start a new run."
            )


def _check_loras(plan: Plan) -> None:
    """Whether or not it has encoded its photos, a run goes on with the weights it began with."""
    for wanted in plan.request.loras:
        if not wanted.file.is_file() or photo.sha256(wanted.file) != wanted.sha256:
            raise BadInput(
                f"{wanted.file} is gone or is another LoRA than the run began with: put it back, or start a new run."
            )
