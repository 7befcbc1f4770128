"""The command line: each command parses, calls and prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from pipeline import databases
from pipeline.config import PARAMS_FILE, ConfigError, VaesweepError, config_path, load_settings, load_study, nearest, printable

if TYPE_CHECKING:
    from pipeline.executors import Advance
    from pipeline.stages.search import Step

EVERY_SECONDS = 15.0
TOLD_FROM = 0.03  # share of a search after which its time left is told
PARENT_POLL_SECONDS = 0.2
SECONDS_TO_END = 4.0  # after a signal
ORPHAN_SECONDS = 0.5  # in which a checkpoint may be taken
ONE_REQUEST_SECONDS = 1.0  # in which several signals are one request, as when a whole group is told to end

_ending = threading.Event()


class Group(click.Group):
    """Turns every error that a user can cause into one line and a non-zero exit."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (VaesweepError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
            if ctx.params.get("debug") or not _is_users(error):
                raise
            click.echo(f"vaesweep: {_one_line(error)}", err=True)
            _set_aside(error)
            _leave(ctx, 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1))


def _is_users(error: BaseException) -> bool:
    """Whether a user can have caused it: of errors in running, only that memory ran out."""
    if not isinstance(error, RuntimeError):
        return True
    if "torch" not in sys.modules:
        return False
    from pipeline.devices import out_of_memory

    return out_of_memory(error)


def _one_line(error: BaseException) -> str:
    return printable(" ".join(_told(error).split())) or "interrupted"


def _told(error: BaseException) -> str:
    """An OSError is the system's refusal: a folder that is read-only, a disk that is full."""
    if isinstance(error, (RuntimeError, MemoryError)):
        return " ".join(["memory ran out:", *str(error).splitlines()[:1]])
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _set_aside(error: BaseException) -> None:
    """Renames a damaged file: DVC trusts what it has seen before, and notices only that a file is missing."""
    artifacts = sys.modules.get("pipeline.artifacts")
    if artifacts and isinstance(error, artifacts.DamagedError):
        with contextlib.suppress(OSError):
            error.path.rename(f"{error.path}.damaged")


def _leave(ctx: click.Context, code: int) -> None:
    """Ends a command: at once where a thread is still busy with a database, which Python's own way to end would abort."""
    if any(thread.name == databases.THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ctx.exit(code)


def _study(ctx: click.Context, parameter: click.Parameter, name: str) -> str:
    """The name of a study whose file is right: mistakes are told before anything heavy is imported."""
    from pipeline.datasets import check_config

    if name in load_settings().every_search:
        raise ConfigError(f"{config_path(name)}: is a search, which `vaesweep search {name}` runs")
    check_config(name, load_study(name).data)
    return name


def _search(ctx: click.Context, parameter: click.Parameter, name: str) -> str:
    """The name of a listed search whose file is right."""
    from pipeline.datasets import check_config
    from pipeline.searches import load_search

    if name not in (known := load_settings().every_search):
        listed = f"{nearest(name, known)}; there are: {', '.join(known) or 'none'}"
        raise ConfigError(f"{PARAMS_FILE}: lists no search {name[:80]!r}{listed}")
    search, study = load_search(name)
    check_config(search.study or name, study.data if study else search.data)
    return name


def _with_data(ctx: click.Context, parameter: click.Parameter, name: str) -> str:
    """The name of a study, or of a search that has its data in its own file."""
    return (_search if name in load_settings().searches_alone else _study)(ctx, parameter, name)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Sweeps of variational autoencoders against plain autoencoders, a whole grid trained as one program.

    `dvc repro` runs all stages; each is a command here too.
    """
    if "DVC_STAGE" in os.environ:
        _die_with_dvc()


@main.command()
def code() -> None:
    """Write down what each stage's program is made of, for DVC."""
    from pipeline.stages import code as stage

    stage.run()


@main.command()
@click.argument("study", callback=_with_data)
def prepare(study: str) -> None:
    """Fetch or generate a study's data, verify and split it."""
    from pipeline.stages import prepare as stage

    stage.run(study)


@main.command()
@click.argument("study", callback=_study)
def train(study: str) -> None:
    """Train every cell of a study that has not been trained yet."""
    from pipeline.stages import train as stage

    with _stoppable() as stop:
        stage.run(study, _show, stop)


@main.command()
@click.argument("study", callback=_study)
def evaluate(study: str) -> None:
    """Measure a study's cells on the test set, clean and corrupted."""
    from pipeline.stages import evaluate as stage

    stage.run(study)


@main.command()
@click.argument("study", callback=_study)
def prune(study: str) -> None:
    """Find out which latent dimensions a study's decoders use."""
    from pipeline.stages import prune as stage

    stage.run(study)


@main.command()
@click.argument("search", callback=_search)
def search(search: str) -> None:
    """Search settings with Optuna, a batch of trials as stacks, halved at rungs."""
    from pipeline.stages import search as stage

    with _stoppable() as stop:
        stage.run(search, _show_search, stop)


@main.command()
def report() -> None:
    """Write reports/report.md and its figures from what the stages left on disk."""
    from pipeline.stages import report as stage

    stage.run()


@main.command()
@click.argument("study", callback=_study)
def plan(study: str) -> None:
    """Show what a study would train, and what that would cost, before anything is spent."""
    from pipeline.stages import plan as stage

    click.echo(stage.run(study))


@main.command()
def sync() -> None:
    """Upload to MLflow what it lacks; what is there already stays as it is."""
    from pipeline import tracking
    from pipeline.records import load_reconstruction

    settings = load_settings()
    synced = tracking.sync(tracking.MlflowTracker(), settings.studies, settings.every_search, load_reconstruction)
    for name, count in synced.changed.items():
        click.echo(f"{name}: {count} runs uploaded" if count else f"{name}: up to date")
    for note in synced.notes:
        click.echo(note, err=True)


@main.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def clean(dry_run: bool) -> None:
    """Remove cells from the store that no study or search of any scale uses, and checkpoints of such cells."""
    from pipeline.stages import clean as stage

    cells, size = stage.run(dry_run)
    click.echo(f"{cells} cells, {size / 1e6:.1f} MB {'would be removed' if dry_run else 'removed'}")


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port to listen on.")
def ui(host: str, port: int) -> None:
    """Open the MLflow UI on the runs of this project."""
    from pipeline import tracking

    tracking.become_ui(host, port)


def _show(name: str, advances: Iterable[Advance]) -> None:
    """A progress bar of one study's training on a terminal; a line now and then where there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return _show_lines(name, advances)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[cells]} cells"),
        TaskProgressColumn(),
        TextColumn("of updates"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[clock]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"train {name}", total=None, cells="", clock="")
        for advance in advances:
            cells = f"{advance.cells_done}/{advance.cells}"
            clock = "left" if advance.updates_done < advance.updates else "taken"
            progress.update(task, completed=advance.updates_done, total=advance.updates, cells=cells, clock=clock)


def _show_lines(name: str, advances: Iterable[Advance], every_seconds: float = EVERY_SECONDS) -> None:
    start = shown = time.monotonic()
    for advance in advances:
        now = time.monotonic()
        if now - shown >= every_seconds or advance.updates_done == advance.updates:
            left = (now - start) / max(1, advance.updates_done) * (advance.updates - advance.updates_done)
            done = f"{advance.cells_done}/{advance.cells} cells, {advance.updates_done}/{advance.updates} updates"
            click.echo(f"train {name}: {done}, {left:.0f} s left", err=True)
            shown = now


def _show_search(name: str, steps: Iterable[Step]) -> None:
    """A search's trials, its best value and the time left: on a terminal one line that changes, else a line now and then."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console, start = Console(stderr=True), time.monotonic()
    said, shown, first = "", -math.inf, None
    with (
        Live(console=console, transient=False, refresh_per_second=4)
        if console.is_terminal
        else contextlib.nullcontext() as live
    ):
        for step in steps:
            first = step.share if first is None else first
            now = time.monotonic()
            done = step.share - first
            left = (now - start) * (1 - step.share) / done if done > TOLD_FROM and step.share < 1 else None
            line = _in_words(name, step, left)
            if live:
                live.update(Text(line))
            elif step.doing != said or now - shown >= EVERY_SECONDS:
                click.echo(line, err=True)
                said, shown = step.doing, now


def _in_words(name: str, step: Step, left: float | None) -> str:
    at = step.standing
    counts = f"{at.ended}/{at.target} trials, {at.pruned} of them pruned" + (f", {at.failed} failed" if at.failed else "")
    best = f"best {at.best:.6g}" if at.best is not None else f"{at.front} on the front" if at.front else ""
    time_left = f"{left:.0f} s left" if left is not None else ""
    return f"search {name}: " + "; ".join(filter(None, (counts, best, step.doing, time_left)))


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], int | None]]:
    """While training: SIGINT and SIGTERM ask for a checkpoint and an end; a second one, or one not obeyed, ends at once."""
    asked: list[int] = []
    start = math.inf

    def ask(number: int, frame: Any) -> None:
        nonlocal start
        if time.monotonic() - start > ONE_REQUEST_SECONDS:
            os._exit(128 + number)
        start = min(start, time.monotonic())
        asked.append(number)
        _ending.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    numbers, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    obeyed = threading.Event()
    threading.Thread(target=_end_in_time, args=(numbers, obeyed), daemon=True).start()
    try:
        yield lambda: asked[0] if asked else None
        if asked:  # after the last checkpoint could be taken; whoever asked must still be obeyed
            from pipeline.executors import Interrupted

            raise Interrupted(asked[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(wakeup)
        if not asked:  # else the process must also end in time
            obeyed.set()


def _end_in_time(numbers: int, obeyed: threading.Event) -> None:
    """Ends the process where a signal is not obeyed: Python's own handlers wait while C does, as for a locked database."""
    number = os.read(numbers, 1)
    if number and not obeyed.wait(SECONDS_TO_END):
        click.echo("vaesweep: interrupted; the next run goes on from the last checkpoint", err=True)
        os._exit(128 + number[0])
    os.close(numbers)  # not before: another signal would find nobody who reads


def _die_with_dvc() -> None:
    """Ends this process within a second of the `dvc` that started it: killing `dvc repro` leaves its child running."""
    import psutil

    dvc = _dvc_ancestor()

    def gone() -> bool:
        # A process that nobody waits for stays a zombie, which psutil calls running.
        try:
            return dvc is None or not dvc.is_running() or dvc.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def watch() -> None:
        while not gone():
            time.sleep(PARENT_POLL_SECONDS)
        if _ending.is_set():
            return
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # they would end too, but later
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _dvc_ancestor() -> Any:
    """The nearest ancestor whose command line names DVC, which starts a stage's command through a shell; None if it is gone."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return next((parent for parent in psutil.Process().parents() if any("dvc" in part for part in parent.cmdline())), None)
    return None
