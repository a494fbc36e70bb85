"""The stages of a pruning run: dense, pruned, recalibrated, fine-tuned; each measured and written as it is done."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from freqprune.jobs import assembly, trainers
from freqprune.jobs.config import FINETUNED, FOLDERS, FROM_SCRATCH
from freqprune.jobs.finetuning import finetune
from freqprune.jobs.loggers import log_results, log_stage, make_logger
from freqprune.jobs.outputs import explore_cut, name_of, tell
from freqprune.jobs.resuming import Interrupted, begin_anew, forget_files, undeployed
from freqprune.jobs.settings import Settings
from freqprune.networks import (
    OnnxModule,
    bytes_of,
    cost,
    export,
    fold_norms,
    latency_ms,
    load_network,
    load_pruned,
    save_pruned,
)
from freqprune.processes import from_first
from freqprune.pruning import (
    Cut,
    Kept,
    Material,
    Recipe,
    Verdict,
    cut,
    cut_in_steps,
    in_equal_parts,
    plan_cut,
    recalibrate_batch_norm,
    with_earlier,
)
from freqprune.reports import record, run_figures, save, show, tables, write_page
from freqprune.tagging import TagResponse, find_folds, in_sight
from freqprune.training import ImageData


class Run:
    """A pruning run: its settings, data, and the metrics gathered so far; in each of its processes, of which the first
    writes and speaks."""

    def __init__(self, settings: Settings, data: ImageData, device: torch.device, first: bool = True) -> None:
        self.settings, self.out, self.data, self.device = settings, settings.out, data, device
        self.first = first
        self.logger = make_logger(settings, self.out) if first else None
        self.example = data.normalize(data.pixels("val", 1)).to(device)
        self.metrics: dict[str, Any] = {}
        self.kept: dict[str, list[int]] = {}

    @property
    def sizes(self) -> list[int]:
        """Batch sizes to time."""
        recipe = self.settings.recipe
        found = self.settings.latency.sizes(recipe is not None and recipe.amount.by_time)
        # A run that is gone on with was cut by the time of its own.
        return sorted({*found, self.metrics.get("latency", {}).get("batch_size", found[0])})

    @property
    def trained(self) -> str:
        """Stage that the training of the cut network ends with."""
        return FROM_SCRATCH if self.settings.from_scratch else FINETUNED

    def measure(self, stage: str, net: nn.Module) -> None:
        """Cost and test accuracy of a stage."""
        self.metrics[stage] = {
            **cost(net, self._batch(max(self.sizes))),
            "test_accuracy": trainers.accuracy_of(self.settings, net, self.data),
        }
        log_stage(self.logger, stage, self.metrics[stage])

    def latencies(self, nets: dict[str, nn.Module]) -> None:
        """Time the networks in turn, at every batch size."""
        for stage in nets:
            self.metrics[stage]["latency_ms"] = {}
        # A run that goes on elsewhere does not time them again.
        self.metrics["timed_on"] = trainers.said_of(self.device)
        self.metrics["timed_runs"] = self.settings.latency.n_runs
        for size in self.sizes:
            ready = {stage: net.to(self.device) for stage, net in nets.items()}
            n_runs, bars = self.settings.latency.n_runs, assembly.bars()
            found = from_first(latency_ms, ready, self._batch(size), n_runs, progress=bars)
            for stage, value in found.items():
                self.metrics[stage]["latency_ms"][str(size)] = round(value, 4)

    def _folded(self, net: nn.Module) -> nn.Module:
        """The network as it is deployed."""
        return fold_norms(net, find_folds(net, self.example, []))

    def _batch(self, size: int) -> Tensor:
        pixels = self.data.pixels("val", min(size, len(self.data.split("val"))))
        return self.data.normalize(pixels.repeat(-(-size // len(pixels)), 1, 1, 1)[:size]).to(self.device)

    def write(self, net: nn.Module | None = None) -> None:
        """Keep the network and the metrics as they are now."""
        if not self.first:
            return
        if net is not None:
            normalization = assembly.normalization_of(self.data)
            size = self.data.split("val").pixels.shape[-2:]
            path, classes = self.out / "pruned.ckpt", self.data.classes
            save_pruned(path, net, self.kept, normalization, classes=classes, image_size=size)
        record.write_json(self.out / record.METRICS, self.metrics)

    def finish(self) -> None:
        """Write the report of the run and mark it as complete."""
        self.write()
        if not self.first:
            self.metrics["finished"] = True
            return
        if "pruned" in self.metrics:
            point = {name: (value, math.nan) for name, value in tables.percentages(self.metrics).items()}
            nothing = dict.fromkeys(run_figures.REMOVED, (0.0, math.nan))
            whole = {name: point["dense"] for name in point if name in tables.STAGES} | nothing
            line = {self.settings.scoring.criterion: [whole, point]}
            for over, name in (("cut", "accuracy_over_cut"), ("time_cut", "accuracy_over_time")):
                if over in point:
                    save(run_figures.accuracy_over_cut(line, over), self.out / "figures" / f"{name}.png")
        write_page(self.out)
        self.metrics["finished"] = True
        self.write()
        log_results(self.logger, self.out)

    def shrink(
        self,
        net: nn.Module,
        earlier: dict[str, list[int]],
        recipe: Recipe,
        response: TagResponse,
        verdict: Verdict | None = None,
    ) -> tuple[nn.Module, Kept]:
        """Cut in as many steps as asked for, each after tagging anew; returns the smaller network and its filters
        counted in `net`."""
        plan, chosen = plan_cut(net, self.example, recipe)
        stimulus, course = self.settings.stimulus, self.settings.course

        def cut_once(small: nn.Module, now: Recipe, step: int) -> Cut:
            # Until something has gone, as its share may be less than what goes at once, it is the network that came.
            known = response if small is net else None
            done = cut(small, self._material(), now, stimulus, known, assembly.bars())
            if small is net and self.first:
                begin_anew(self.out)
            return replace(done, net=done.net.to(memory_format=torch.channels_last))

        def between(small: nn.Module, step: int) -> nn.Module:
            self._recalibrate(small)
            if not course.step_epochs:
                return small
            return finetune(self.settings, self.data, small, net, course.step_epochs, f"step{step + 1}")[0]

        done = cut_in_steps(plan, chosen, recipe, course.steps, cut_once, between)
        small, ours = done.net, done.kept
        if done.dropped:
            self.metrics["dropped_blocks"] = done.dropped
        if done.promise is not None:
            self.metrics["latency"] = done.promise.record()
        stages = {"pruned": small}
        if self.settings.exports.fold:
            stages["folded"] = self._folded(small)
        for stage, one in stages.items():
            self.measure(stage, one)
        self.latencies({"dense": net, **stages})
        self.metrics["kept"] = {name: len(indices) for name, indices in ours.items()}
        # With those of layers that went altogether.
        self.metrics["widths"] = widths = dict(done.widths)
        title = f"Filters kept by {self.settings.scoring.criterion}"
        if self.first and widths:
            figure = run_figures.kept_per_layer(self.metrics["kept"], widths, title)
            save(figure, self.out / "figures" / "kept_per_layer.png")
        self.metrics["remarks"] = done.remarks
        self.kept = with_earlier(plan, small, ours, earlier)
        self.write(small)
        # The page counts in units of the dense network.
        known = {name: indices for name, indices in ours.items() if name in plan.graph.units}
        if self.first:
            explore_cut(self.settings, self._title(net), response, verdict, plan, done.scores, known, done.dropped)
        return small, ours

    def recover(self, net: nn.Module, small: nn.Module, ckpt_path: Path | None = None) -> nn.Module:
        """Re-estimate batch norms, fine-tune (from a checkpoint on, if given), export; what an interrupted run had done
        is not done again."""
        if "recalibrated" not in self.metrics and self._recalibrate(small):
            self.metrics["recalibrated"] = {"test_accuracy": trainers.accuracy_of(self.settings, small, self.data)}
            log_stage(self.logger, "recalibrated", self.metrics["recalibrated"])
            self.write(small)
        if self.settings.finetune_epochs:
            folder, epochs = FOLDERS[self.trained], self.settings.finetune_epochs
            small, had = finetune(self.settings, self.data, small, net, epochs, folder, ckpt_path)
            self.metrics[self.trained] = {"test_accuracy": trainers.accuracy_of(self.settings, small, self.data)}
            self.metrics[self.trained]["epochs"] = had
            log_stage(self.logger, self.trained, self.metrics[self.trained])
            self.write(small)
        self._deploy(net, small)
        return small

    def _deploy(self, net: nn.Module, small: nn.Module) -> None:
        """Write the files that were asked for, and measure what they are as networks."""
        exports = self.settings.exports
        deployed = {"folded": self._folded(small)} if exports.fold else {}
        last = deployed.get("folded", small)
        images = self._calibration().split(32) if exports.int8 else ()
        batches = [self.data.normalize(batch) for batch in images]
        exported = from_first(
            export, last, self.example, self.out, exports.onnx, exports.torch_export, calibration=batches
        )
        for stage, file in (("onnx", self.out / "model.onnx"), ("int8", self.out / "model.int8.onnx")):
            if file.name in exported:
                deployed[stage] = OnnxModule(file)
                self.metrics[stage] = {"file_bytes": bytes_of(file)}
        # Asked for now, or dropped by a longer training: its cost was not measured with the cut.
        untimed = "folded" in deployed and "latency_ms" not in self.metrics.get("folded", {})
        if untimed:
            self.metrics["folded"] = cost(last, self._batch(max(self.sizes)))
        for stage, one in deployed.items():
            self.metrics.setdefault(stage, {})["test_accuracy"] = trainers.accuracy_of(self.settings, one, self.data)
            log_stage(self.logger, stage, self.metrics[stage])
        if "onnx" in deployed or untimed:
            # Times are of one session: what was exported before is timed with the rest.
            files = {"onnx": "model.onnx", "int8": "model.int8.onnx"}
            there = {stage: OnnxModule(self.out / file) for stage, file in files.items() if stage in self.metrics}
            folded = {"folded": self._folded(small)} if "folded" in self.metrics else {}
            self.latencies({"dense": net, "pruned": small, **folded, **there, **deployed})
        if exported:
            self.metrics["exports"] = {**self.metrics.get("exports", {}), **exported}
        if deployed or exported:
            self.write()

    def go_on(self, net: nn.Module, earlier: Interrupted) -> tuple[dict[str, Any], dict[str, Any]]:
        """Go on with the fine-tuning of an interrupted run, as the unbroken run would have."""
        small = load_pruned(earlier.pruned).to(self.device).to(memory_format=torch.channels_last)
        self.metrics, self.kept = earlier.metrics, load_network(earlier.pruned).kept
        done = self.metrics.pop("finished", False)
        if self.first:
            if earlier.folder.resolve() != self.out.resolve():
                begin_anew(self.out)
                record.clear([self.out / record.FORECAST])
            earlier.hand_over(self.out, self.trained)
            self.write(small)
        # As the first has left the folder.
        self.metrics = from_first(forget_files, self.metrics, self.out)
        if self.trained in self.metrics:
            if self.first:
                show(f"{earlier.folder} is complete; its training is not repeated")
            # One that was stopped as it exported holds what was measured before its training.
            if not done or undeployed(self.metrics, self.settings.exports):
                self._deploy(net, small)
        else:
            if self.first and self.settings.finetune_epochs:
                # Those of a shorter training.
                record.clear([self.out / name for name in record.EXPORTED])
            small = self.recover(net, small, earlier.last)
        self.finish()
        self.tell(net, None)
        return self.metrics, {
            "response": None,
            "verdict": None,
            "kept": {k: torch.tensor(v) for k, v in self.kept.items()},
            "net": small,
        }

    def tell(self, net: nn.Module, verdict: Verdict | None) -> None:
        if self.first:
            tell(self.settings, self.metrics, self._title(net), verdict)

    def _title(self, net: nn.Module) -> str:
        share = tables.percentages(self.metrics)["cut"]
        kept_by, seed = self.settings.scoring.criterion, self.settings.common.seed
        return f"{name_of(net)}, filters kept by {kept_by}, {share:.1f} % of the MACs cut, seed {seed}"

    def _material(self) -> Material:
        train = self.data.split("train")
        n_labelled = min(self.settings.scoring.labelled_images, len(train))
        return Material(
            images=self.data.pixels("val", min(self.settings.showing.n_images, len(self.data.split("val")))),
            normalize=self.data.normalize,
            mean=self.data.mean,
            std=self.data.std,
            calibration=self._calibration(),
            labelled=(self.data.pixels("train", n_labelled), train.labels[:n_labelled]),
        )

    def _calibration(self) -> Tensor:
        """Pixels of the training images that cuts and the quantiser are calibrated on."""
        return self.data.pixels("train", min(self.settings.course.calibration_images, len(self.data.split("train"))))

    def _recalibrate(self, net: nn.Module) -> bool:
        course, recipe = self.settings.course, self.settings.recipe
        # Made up for in sequence, the norms' means are part of the solution.
        solved = course.bn_when == "auto" and recipe is not None and recipe.compensation == "sequential"
        none = not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
        if not course.bn_images or solved or none:
            return False
        images = self.data.split("train")
        count = min(course.bn_images, len(images))
        # The statistics of one image are none.
        chunks = in_equal_parts(images.pixels[:count], max(2, self.data.batch_size))
        if not chunks:
            return False
        shown = in_sight(chunks, "means and variances of the batch norms", assembly.bars())
        recalibrate_batch_norm(net, (self.data.normalize(chunk) for chunk in shown), self.device)
        return True
