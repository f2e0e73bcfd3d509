"""A progress bar with the time that remains."""

import contextlib
import time

import rich.console
import rich.progress

# Seconds until work that is usually short shows a bar.
SHOWN_AFTER = 2.0


@contextlib.contextmanager
def progress_bar(description, steps, verbose, more=0, after=0.0):
    """Show a bar while what is inside runs.

    Args:
        description: what runs.
        steps: how many there are; `None` where there is nothing to count.
        verbose: whether to show anything.
        more: how many steps follow where `steps` turn out not to be all. Defaults to `0`.
        after: seconds until which nothing is shown. Defaults to `0.0`.

    Yields:
        A function without arguments, to be called after each step.
    """
    # In a notebook rich wants a widget, which is not everywhere.
    console = rich.console.Console(force_jupyter=False)
    columns = [
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
    ]
    if steps is not None:
        columns += [rich.progress.TextColumn("remaining"), rich.progress.TimeRemainingColumn()]
    started = time.perf_counter()
    progress = rich.progress.Progress(*columns, console=console, disable=not verbose)
    task = progress.add_task(description, total=steps)

    def start():
        if not progress.live.is_started and time.perf_counter() - started >= after:
            progress.start()

    start()
    try:

        def advance():
            start()
            (bar,) = progress.tasks
            if more and bar.completed >= bar.total:
                progress.update(task, total=bar.total + more)
            progress.advance(task)

        yield advance
        (bar,) = progress.tasks
        progress.update(task, total=bar.completed or 1, completed=bar.completed or 1)
    finally:
        if progress.live.is_started:
            progress.stop()
