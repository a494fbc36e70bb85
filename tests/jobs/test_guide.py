"""The guide's commands and code, in its order and in one folder, with the work made smaller."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.forked import call, fresh

GUIDE = (ROOT / "docs" / "guide.md").read_text()
SMALLER = {
    "train.py": ["data.limit_train=96", "data.limit_test=20", "trainer.max_epochs=1", "tagging.epoch_images=2"],
    "prune.py": [
        "data.limit_train=96",
        "data.limit_test=20",
        "tagging.n_images=2",
        "latency.n_runs=1",
        "latency.batch_sizes=[1]",
        "pruning.measured_images=4",
        "pruning.calibration_images=16",
        "pruning.rounds=1",
    ],
}
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def smaller(line: str) -> list[str]:
    """Script and arguments."""
    words = [word for word in shlex.split(line) if not word.startswith("OMP_NUM_THREADS=")]
    if words[0] == "freqprune":
        return [str(Path(sys.executable).parent / "freqprune"), *words[1:]]
    assert words[0] == "python"
    if words[1] not in SMALLER:
        return [str(ROOT / words[1]), *words[2:]]
    more = [item for item in SMALLER[words[1]] if not ("image_folder" in line and item.startswith("data.limit"))]
    quiet = ["callbacks.progress=null"]
    return [str(ROOT / words[1]), *words[2:], *more, *quiet]


@pytest.mark.slow
def test_every_command_and_every_piece_of_code_runs(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for kind in ("cats", "dogs"):
            (tmp_path / "images" / split / kind).mkdir(parents=True)
            for number in range(40):
                Image.new("RGB", (40, 36), (number, 90, 200)).save(tmp_path / "images" / split / kind / f"{number}.png")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 15
    commands = []
    for number, (kind, text) in enumerate(blocks):
        (tmp_path / f"block{number}.py").write_text(text)
        commands += (
            [smaller(line) for line in text.replace("\\\n", " ").strip().splitlines()]
            if kind == "sh"
            else [[str(tmp_path / f"block{number}.py")]]
        )
    for command in commands:
        # What starts processes of its own starts afresh.
        own = any("launcher" in word or word == "trainer=ddp" for word in command)
        done = (fresh if own else call)(Path(command[0]), *command[1:], cwd=tmp_path, env=HERE)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if any(word.endswith(("train.py", "prune.py")) for word in command):
            assert ("next, for example:" in done.stdout) == ("-m" not in command)
    assert 'href="explore.html"' in (tmp_path / "runs" / "pruned" / "report.html").read_text()
    assert (tmp_path / "runs" / "pruned" / "explore.html").is_file()
    assert "| importance | seeds |" in (tmp_path / "sweep" / "sweep.md").read_text()
