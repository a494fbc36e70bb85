"""Which networks can be cut: 30 % of the filters of every unit that can go, proved, saved, rebuilt, trained one step.

python benchmarks/coverage.py --json coverage.json                     # all of torchvision, 40 families of timm
python benchmarks/coverage.py torchvision/resnet18 timm/convnext_atto  # these

A job of Hydra a network, side by side or over a cluster (any launcher of Hydra: joblib, submitit_slurm, ray):

python benchmarks/coverage.py --launcher joblib hydra.launcher.n_jobs=4 --json coverage.json

Rows are kept in --folder as they are done; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from result import publish
from rich.progress import track
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from freqprune import Amount, InputError, Plan, build_model, load_pruned, save_pruned, scores, select
from freqprune.pruning import Evidence
from freqprune.pruning.trials import misread_units

# Too large for 16 GB with gradients, two copies and their traces.
TOO_LARGE = ("regnet_y_128gf", "vit_h_14")


def torchvision_names() -> list[str]:
    """All classifiers of torchvision but the few that do not fit."""
    return [f"torchvision/{name}" for name in models.list_models(module=models) if name not in TOO_LARGE]


def timm_names(n_families: int) -> list[str]:
    """The smallest network of each family (a module of timm's), families by the number of their networks."""
    import timm

    families = Counter(timm.models.model_entrypoint(name).__module__ for name in timm.list_models())
    chosen = []
    for family, _ in families.most_common():
        members = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__ == family]
        smallest, least = None, float("inf")
        for name in members:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    size = sum(p.numel() for p in timm.create_model(name).parameters())
                except Exception:
                    continue
            if size < least:
                smallest, least = name, size
        if smallest is not None:
            chosen.append(f"timm/{smallest}")
        if len(chosen) == n_families:
            break
    return sorted(chosen)


def size_of(name: str) -> int:
    """Height and width of the network's input."""
    if name.startswith("timm/"):
        import timm

        return int(timm.get_pretrained_cfg(name.removeprefix("timm/")).input_size[-1])
    return 299 if "inception" in name else 224


def cut(name: str, share: float) -> dict[str, Any]:
    """One row of the table."""
    start = time.perf_counter()
    row: dict[str, Any] = {"name": name, "result": "ok"}
    try:
        torch.manual_seed(0)
        net = shaken(build_model({"name": name}).eval())
        x = torch.rand(2, 3, *[size_of(name)] * 2)
        plan = Plan(net, x)
        units = plan.choose(streams=True)
        misread = misread_units(plan, units)
        units = [unit for unit in units if unit not in misread]
        if not units:
            raise InputError(f"torch-pruning misreads the channels of {', '.join(misread)}, and nothing else can go")
        n_filters = {unit: plan.unit(unit).n_filters for unit in units}
        row["units"] = len(units)
        # Of all MACs, those of attention's products too, in which no unit has a part.
        counter = FlopCounterMode(display=False)
        net.requires_grad_(False)
        with torch.no_grad(), counter:
            net(x[:1])
        net.requires_grad_(True)
        total = counter.get_total_flops() / 2
        row["reachable"] = round((plan.macs({}) - plan.macs(dict.fromkeys(units, 1))) / total, 3)
        kept = select(
            scores("l2", Evidence(net, graph=plan.graph), units), Amount(ratio=share, scope="layer"), plan.macs
        )
        small = plan.apply(kept)
        row["cut"] = round((plan.macs({}) - plan.macs({unit: len(kept[unit]) for unit in kept})) / total, 3)
        assert any(len(kept[unit]) < n_filters[unit] for unit in kept)
        with tempfile.TemporaryDirectory() as folder:
            save_pruned(Path(folder) / "pruned.ckpt", small, kept, model={"name": name})
            again = load_pruned(Path(folder) / "pruned.ckpt")
        with torch.no_grad():
            torch.testing.assert_close(again(x), small(x), rtol=1e-3, atol=1e-4)
        step(small, x)
        if row["reachable"] < 0.25:
            row["result"] = f"less than a quarter of the MACs can go ({100 * row['reachable']:.0f} %)"
    except InputError as error:
        row["result"] = str(error).splitlines()[0]
    except Exception as error:
        row["result"] = f"crash: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


@torch.no_grad()
def shaken(net: nn.Module) -> nn.Module:
    """The network with everything that begins as a constant drawn: norms that are the identity, branches that begin at
    zero or 1e-6, so that a wrong channel anywhere shows in the answer."""
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.numel() < 2 or not (p == p.flatten()[0]).all():
                continue
            if p.numel() > 2 * max(p.shape):
                p.normal_(0, (p.numel() / len(p)) ** -0.5)
            elif "bias" in name:
                p.normal_(0, 0.1)
            else:
                p.uniform_(0.5, 1.5)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def step(net: nn.Module, x: torch.Tensor) -> None:
    """One step of fine-tuning, which every weight can take."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    answer = net(x)
    answer = answer if isinstance(answer, torch.Tensor) else answer[0]
    loss = nn.functional.cross_entropy(answer, torch.arange(len(x)))
    loss.backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| network | result | units | MACs that can go | cut | s |", "|---|---|---|---|---|---|"]
    for row in rows:
        shares = [f"{100 * row[key]:.1f} %" if key in row else "" for key in ("reachable", "cut")]
        result = row["result"].replace("|", "\\|")[:160]
        lines.append(f"| {row['name']} | {result} | {row.get('units', '')} | {' | '.join(shares)} | {row['seconds']} |")
    return "\n".join(lines) + "\n"


ConfigStore.instance().store("coverage", {"name": "???", "share": 0.3, "folder": "???"})


def file_of(folder: str, name: str) -> Path:
    """Where the row of a network is kept."""
    return Path(folder) / f"{name.replace('/', '-')}.json"


@hydra.main(version_base="1.3", config_path=None, config_name="coverage")
def job(cfg: DictConfig) -> None:
    """The row of one network, in a file."""
    hush()
    file_of(cfg.folder, cfg.name).write_text(json.dumps({**cut(cfg.name, cfg.share), "share": cfg.share}))


def is_done(folder: str, name: str, share: float) -> bool:
    """Whether there is a row of a network at this share; one that crashed is tried again."""
    row = row_of(folder, name)
    return row.get("share") == share and not row["result"].startswith("crash")


def row_of(folder: str, name: str) -> dict[str, Any]:
    path = file_of(folder, name)
    return json.loads(path.read_text()) if path.is_file() else {}


def spread(names: list[str], share: float, launcher: str, folder: str, settings: list[str]) -> list[dict[str, Any]]:
    """Rows by a sweep of Hydra, which stops at no network that crashes; those that are there are kept."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    left = [name for name in names if not is_done(folder, name, share)]
    if left:
        where = [f"folder={Path(folder).absolute()}", f"hydra.sweep.dir={folder}/jobs", f"hydra/launcher={launcher}"]
        sys.argv[1:] = ["-m", f"name={','.join(left)}", f"share={share}", *where, *settings]
        job()
    missing = [name for name in names if row_of(folder, name).get("share") != share]
    if missing:
        sys.exit(f"no row of {', '.join(missing)}: see {folder}/jobs; the same command tries them again")
    return [row_of(folder, name) for name in names]


def hush() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks; all of torchvision and 40 of timm if left out")
    parser.add_argument("--json", metavar="FILE", help="write the figures and the table here")
    parser.add_argument("--markdown", metavar="FILE", help="write the table here")
    parser.add_argument("--families", type=int, default=40, help="families of timm (40)")
    parser.add_argument("--share", type=float, default=0.3, help="share of the filters to remove (0.3)")
    parser.add_argument("--launcher", help="of Hydra, which then runs a job a network; its settings go with the names")
    parser.add_argument("--folder", default="multirun/coverage", help="for the rows of these jobs (multirun/coverage)")
    given = parser.parse_intermixed_args()
    hush()
    settings = [word for word in given.names if "=" in word]
    names = [word for word in given.names if "=" not in word] or [*torchvision_names(), *timm_names(given.families)]
    rows = []
    if given.launcher:
        rows = spread(names, given.share, given.launcher, given.folder, settings)
    else:
        for name in track(names, description="networks"):
            rows.append(cut(name, given.share))
            print(rows[-1], flush=True)
            gc.collect()
    found: dict[str, Any] = {}
    for library in ("torchvision", "timm"):
        mine = [row for row in rows if row["name"].startswith(library)]
        found |= {f"{library}_ok": sum(row["result"] == "ok" for row in mine), f"{library}_n": len(mine)}
    found["crashes"] = sum(row["result"].startswith("crash") for row in rows)
    if given.markdown:
        Path(given.markdown).write_text(as_table(rows))
    publish({**found, "networks": rows}, given.json)


if __name__ == "__main__":
    main()
