"""A run that is killed goes on from its last finished step, to the same bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from framefit import checkpoint as checkpoints
from framefit.checkpoint import RunFolder, State, Writer
from framefit.device import state_folder
from framefit.errors import BadCheckpoint, BadInput, Cancelled
from framefit.families import Checkpoint, find
from framefit.families.files import fingerprint
from framefit.ledger import Ledger
from framefit.pipeline import Pipeline, load
from framefit.plan import Plan

STEPS = 6
FAMILIES = [
    "wan2.2-i2v-a14b",
    "wan2.2-ti2v-5b",
    "wan2.1-i2v-14b-480p",
    "easyanimate-v5.1-7b-inp",
    "easyanimate-v5-7b-zh-inp",
    "i2vgen-xl",
]


def open_pipeline(run: RunFolder) -> Pipeline:
    torch.set_num_threads(1)  # as in the processes that are killed: sums are split by threads
    row = find(run.plan.request.model)
    return load(run.plan, row, Ledger())


def run_until_killed(root: Path, id: str, step: int, state_home: str) -> None:
    """In a process of its own: go on with a run, note each step taken, and die once `step` is on disk."""
    os.environ["XDG_STATE_HOME"] = state_home
    run = RunFolder.open(root, id)
    writer = Writer(run, every_s=0, always=lambda _: True)

    def save(state: State) -> None:
        with (root / "taken").open("a") as file:
            file.write(f"{state.step} ")
        assert state.latents.is_contiguous()
        writer(state)
        if state.step == step:
            writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    open_pipeline(run).run(state=run.load(), save=save)


def new_run(root: Path, row: Checkpoint, plan: Plan) -> RunFolder:
    assert row.folder is not None
    return RunFolder.create(root, plan, fingerprint(row.folder), root / "out.mp4")


def killed(fork: ForkServerContext, run: RunFolder, step: int) -> None:
    process = fork.Process(target=run_until_killed, args=(run.path.parent, run.id, step, os.environ["XDG_STATE_HOME"]))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("id", FAMILIES)
def test_killed_at_every_step_the_latents_are_the_same_bits(
    id: str,
    tmp_path: Path,
    fork: ForkServerContext,
    tiny: Callable[[str], Checkpoint],
    make_plan: Callable[..., Plan],
) -> None:
    row = tiny(id)
    plan = make_plan(row, steps=STEPS, guidance=(3.0,))
    run = new_run(tmp_path, row, plan)
    whole = open_pipeline(run)
    expected = whole.encode()
    whole.denoise(expected)
    expected_frames = list(whole.decode(expected))
    run.release()
    for step in range(STEPS + 1):
        killed(fork, run, step)
        state = run.load()
        assert state is not None
        assert state.step == step
    taken = (tmp_path / "taken").read_text().split()
    assert taken == [str(step) for step in range(STEPS + 1)], "no step is taken twice"
    frames = list(open_pipeline(run).run(state=run.load()).frames)
    final = run.load()
    assert final is not None
    assert torch.equal(final.latents, expected.latents)
    assert all((a == b).all() for a, b in zip(frames, expected_frames, strict=True))


def test_a_run_that_reads_its_weights_from_disk_goes_on_after_a_kill(
    tmp_path: Path, fork: ForkServerContext, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan]
) -> None:
    row = tiny("wan2.2-i2v-a14b")
    plan = make_plan(row, steps=STEPS, settings={"offload": "disk"})
    run = new_run(tmp_path, row, plan)
    whole = open_pipeline(run)
    expected = whole.encode()
    whole.denoise(expected)
    whole.close()
    run.release()
    weights = state_folder() / "weights"
    assert not any(weights.iterdir())
    for step in (1, 4):  # of either expert
        killed(fork, run, step)
        assert sum(path.is_dir() for path in weights.iterdir()) == 1, "the dead one's; that of the one before is gone"
    pipeline = open_pipeline(run)
    state = run.load()
    assert state is not None
    assert state.step == 4
    pipeline.denoise(state)
    assert torch.equal(state.latents, expected.latents)
    pipeline.close()
    assert not any(weights.iterdir())


def write_for_ever(root: Path, id: str) -> None:
    run = RunFolder.open(root, id)
    state = run.load()
    assert state is not None
    for step in range(1_000_000):
        state.step = step
        state.latents = torch.full_like(state.latents, step)
        run.save(state)


def test_killed_at_any_moment_the_state_is_whole(
    tmp_path: Path, fork: ForkServerContext, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan]
) -> None:
    row = tiny("i2vgen-xl")
    run = new_run(tmp_path, row, make_plan(row))
    run.save(open_pipeline(run).encode())
    run.release()
    file = run.path / "step.safetensors"
    for delay in range(12):
        before = file.stat().st_mtime_ns
        process = fork.Process(target=write_for_ever, args=(tmp_path, run.id))
        process.start()
        while file.stat().st_mtime_ns == before:  # until it is at work
            time.sleep(0.001)
        time.sleep(0.0017 * delay)
        process.kill()
        process.join()
        state = run.load()
        assert state is not None
        assert bool((state.latents == state.step).all())


@pytest.fixture
def saved(tmp_path: Path, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan]) -> RunFolder:
    """A run that stands after its second step."""
    row = tiny("wan2.2-i2v-a14b")
    run = new_run(tmp_path, row, make_plan(row))
    pipeline = open_pipeline(run)

    class Stop(Exception):
        pass

    def save(state: State) -> None:
        run.save(state)
        if state.step == 2:
            raise Stop

    with pytest.raises(Stop):
        pipeline.run(save=save)
    return run


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, d) for name in ("step.safetensors", "conditioning.safetensors") for d in ("flipped", "cut", "empty")),
        ("conditioning.safetensors", "gone"),  # without a step the run has not begun, and that is no corruption
    ],
)
def test_a_corrupt_checkpoint_is_refused_by_name(saved: RunFolder, name: str, damage: str) -> None:
    file = saved.path / name
    content = file.read_bytes()
    if damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(BadCheckpoint, match=f"{name} is corrupt.*--restart"):
        saved.load()


def test_a_changed_fact_is_noticed_like_a_changed_tensor(saved: RunFolder) -> None:
    file = saved.path / "step.safetensors"
    content = file.read_bytes()
    assert content.count(b'\\"step\\": 2') == 1
    file.write_bytes(content.replace(b'\\"step\\": 2', b'\\"step\\": 3'))
    with pytest.raises(BadCheckpoint, match="hash"):
        saved.load()


def test_a_checkpoint_of_another_run_is_refused(
    saved: RunFolder, tmp_path: Path, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan]
) -> None:
    other = new_run(tmp_path, tiny("wan2.2-i2v-a14b"), make_plan(tiny("wan2.2-i2v-a14b"), seed=8))
    for name in ("step.safetensors", "conditioning.safetensors"):
        (other.path / name).write_bytes((saved.path / name).read_bytes())
    with pytest.raises(BadCheckpoint, match="belongs to another run"):
        other.load()


@pytest.mark.parametrize("id", ["20260101-000000-abcdef", "../../etc", "", "nonsense"])
def test_unknown_runs_are_answered_with_those_that_exist(saved: RunFolder, id: str) -> None:
    with pytest.raises(BadCheckpoint, match=saved.id):
        RunFolder.open(saved.path.parent, id)


def test_a_plan_that_cannot_be_read_is_said_so(saved: RunFolder) -> None:
    saved.release()
    (saved.path / "plan.json").write_text('{"plan": {}}')
    with pytest.raises(BadCheckpoint, match=r"plan of run .* cannot be read"):
        RunFolder.open(saved.path.parent, saved.id)


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan]
) -> None:
    (tmp_path / "file").write_text("")
    row = tiny("i2vgen-xl")
    with pytest.raises(BadInput, match=r"cannot be written.*--checkpoint-dir"):
        new_run(tmp_path / "file", row, make_plan(row))


def test_a_finished_run_leaves_nothing(saved: RunFolder) -> None:
    saved.discard()
    assert checkpoints.list_runs(saved.path.parent) == []


def test_a_run_is_one_process_at_a_time(saved: RunFolder) -> None:
    with pytest.raises(BadCheckpoint, match="another process"):
        RunFolder.open(saved.path.parent, saved.id)
    saved.release()
    again = RunFolder.open(saved.path.parent, saved.id)
    assert again.load() is not None


def test_the_writer_writes_what_is_due_and_keeps_one_under_way(
    saved: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved.load()
    assert state is not None
    written: list[int] = []

    def slowly(state: State) -> None:
        time.sleep(0.02)
        written.append(state.step)

    monkeypatch.setattr(saved, "save", slowly)
    writer = Writer(saved, every_s=1000, always=lambda state: state.step in (0, 5))
    for step in range(6):
        state.step = step
        writer(state)
    writer.wait()
    assert written == [0, 5]
    every = Writer(saved, every_s=0, always=lambda _: False)
    for step in range(3):
        state.step = step
        every(state)
        assert len(written) >= 2 + step, "the state before is on disk when the next one is taken"
    every.wait()
    assert written[2:] == [0, 1, 2]


def test_what_goes_wrong_beside_the_computation_is_raised(saved: RunFolder) -> None:
    state = saved.load()
    assert state is not None
    saved.path.rename(saved.path.with_name("gone"))
    writer = Writer(saved, every_s=0, always=lambda _: True)
    writer(state)
    with pytest.raises(BadInput, match=r"step checkpoint .* cannot be written"):
        writer.wait()


def test_a_restart_with_other_weights_never_takes_up_the_old_state(saved: RunFolder) -> None:
    saved.restart("others")
    assert not saved.has_state
    assert saved.load() is None
    saved.save(open_pipeline(saved).encode())
    state = saved.load()
    assert state is not None
    assert state.step == 0


def test_a_stop_between_two_saves_is_saved(saved: RunFolder) -> None:
    """The flag may come up after the step was passed over, in a listener for example."""
    saved.restart(saved.weights)
    stop: list[int] = []
    writer = Writer(saved, every_s=1000, always=lambda state: bool(stop) or state.step == 0)
    with pytest.raises(Cancelled):
        open_pipeline(saved).run(
            save=writer,
            on_step=lambda step: stop.append(1) if step.index == 2 else None,
            cancelled=lambda: bool(stop),
        )
    writer.wait()
    state = saved.load()
    assert state is not None
    assert state.step == 2


def test_an_interrupted_wait_is_taken_up_again(saved: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    state = saved.load()
    assert state is not None
    writer = Writer(saved, every_s=0, always=lambda _: True)
    state.step = 3
    writer(state)

    class Interrupted:
        def result(self) -> None:
            raise KeyboardInterrupt

    real = writer._pending
    monkeypatch.setattr(writer, "_pending", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        writer.wait()
    assert writer._pending is not None
    monkeypatch.setattr(writer, "_pending", real)
    writer.wait()
    again = saved.load()
    assert again is not None
    assert again.step == 3


def test_a_file_system_without_locks_is_run_on_unlocked(
    tmp_path: Path, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    row = tiny("i2vgen-xl")
    run = new_run(tmp_path, row, make_plan(row))
    assert RunFolder.open(tmp_path, run.id).id == run.id


def test_a_run_of_an_older_version_goes_on(
    tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan has fewer fields; its files know the run by that plan."""
    row, now = tiny("i2vgen-xl"), Plan.to_json

    def then(plan: Plan) -> dict[str, Any]:
        facts = now(plan)
        for name in ("origin", "budget_bytes", "vram_limit_bytes", "vram_others_bytes", "context_bytes"):
            del facts["device"][name]
        return facts

    monkeypatch.setattr(Plan, "to_json", then)
    state = State(step=1, latents=torch.ones(2), conditioning={"text": torch.ones(3)}, scheduler={})
    with new_run(tmp_path, row, make_plan(row)) as run:
        run.save(state)
    monkeypatch.undo()
    with RunFolder.open(tmp_path, run.id) as again:
        found = again.load()
        assert found is not None
        assert found.step == 1
        again.save(replace(found, step=2))
        loaded = again.load()
    assert loaded is not None
    assert loaded.step == 2
