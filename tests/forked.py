"""Processes that begin with the libraries imported, which takes ten times as long as what most of them do: they are
forked from a server that has imported them once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import multiprocessing as torch_multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["freqprune.jobs.cli", "freqprune.jobs.train", "freqprune.jobs.prune", "freqprune.jobs.explain"]
)


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(rank, *arguments)`` in two processes; an error of one of them is raised here."""
    torch_multiprocessing.start_processes(work, arguments, nprocs=2, start_method="forkserver")


def call(
    script: Path, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script as ``python script arguments`` would from a folder, and say what it said."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        settings = (str(script), arguments, str(cwd), dict(os.environ if env is None else env), str(out), str(err))
        process = FORKED.Process(target=_run, args=settings)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(script), *arguments], timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(
            [str(script), *arguments], int(process.exitcode or 0), out.read_text(), err.read_text()
        )


def fresh(
    script: Path, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The same in a process that imports everything anew, for those that start others."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False, timeout=timeout)


def _run(script: str, arguments: tuple[str, ...], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
