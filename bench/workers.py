"""Worker processes that take one JSON task a line on stdin and answer one JSON line on stdout.

A process either interprets triton kernels or compiles them, never both, so what the main process cannot do runs here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

Task = dict[str, Any]
Answer = dict[str, Any]
Progress = Callable[[int, int, str], None]


def describe_error(error: BaseException) -> str:
    """An exception as one line without the paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _without_paths(f"{type(error).__name__}: {' '.join(lines[-2:])}")[:500]


def _without_paths(text: str) -> str:
    return re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+", "", text)


def serve(handle: Callable[[Task], Answer]) -> None:
    """The worker's side: answer every line of stdin until it closes. What `handle` prints goes to stderr.

    An answer that holds "last" ends the worker: it has found that it can do no more.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            if not line.strip():
                continue
            try:
                answer = handle(json.loads(line))
            except Exception as error:
                answer = {"error": describe_error(error)}
            out.write(json.dumps(answer) + "\n")
            out.flush()
            if "last" in answer:
                return


class _Worker:
    """One worker process and the file that collects its stderr."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | environment,
        )

    def ask(self, task: Task, seconds: float | None = None) -> Answer:
        """Send one task and wait for its answer; a worker that died answers with how it died.

        One that has no answer after `seconds` is killed: a kernel that hangs must not hold everything else.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.process.kill()

        alarm = threading.Timer(seconds, give_up) if seconds is not None else None
        line = ""
        if alarm is not None:
            alarm.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(task) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
        finally:
            if alarm is not None:
                alarm.cancel()
        if line:
            answer: Answer = json.loads(line)
            if "last" in answer:
                self.process.wait()
            return answer
        status = self.process.wait()
        if late.is_set():
            return {"error": f"no answer within {seconds:g} s"}
        self.errors.seek(0)
        tail = " ".join(self.errors.read().strip().splitlines()[-2:])
        return {"error": _without_paths(f"worker ended with status {status}: {tail}")[:500]}

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        # First the process: closing a pipe that another thread still reads would wait for that thread.
        if self.alive:
            self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.errors.close()


def run_tasks(
    module: str,
    tasks: Sequence[Task],
    *,
    jobs: int,
    environment: dict[str, str],
    label: Callable[[Task], str],
    progress: Progress | None = None,
    seconds_each: float | None = None,
    deadline: float | None = None,
) -> list[Answer]:
    """Answers to `tasks`, in their order, from `jobs` workers of `python -m module --worker`.

    A task that fails, takes its worker down or needs more than `seconds_each` is answered {"error": text}; the others
    go on in a fresh worker. Past `deadline` (time.monotonic) no task is begun: those that are left answer {"late": ""}.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(tasks)):
        waiting.put(index)
    answers: list[Answer] = [{"error": "not run"} for _ in tasks]
    lock = threading.Lock()
    done = 0
    stop = threading.Event()
    workers: set[_Worker] = set()

    def drain() -> None:
        nonlocal done
        worker: _Worker | None = None
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                break
            if deadline is not None and time.monotonic() > deadline:
                answers[index] = {"late": ""}
                continue
            if worker is None or not worker.alive:
                worker = _Worker(module, environment)
                with lock:
                    workers.add(worker)
            answer = worker.ask(tasks[index], seconds_each)
            with lock:
                answers[index] = answer
                done += 1
                if progress is not None and not stop.is_set():
                    progress(done, len(tasks), label(tasks[index]))

    threads = [threading.Thread(target=drain, daemon=True) for _ in range(max(1, min(jobs, len(tasks))))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for worker in workers:
            worker.close()
    return answers
