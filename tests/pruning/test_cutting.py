"""One cut from images to a smaller network, and the callback that cuts during training."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from freqprune.errors import InputError
from freqprune.networks.blocks import dropped_blocks
from freqprune.networks.checkpoint import load_network
from freqprune.networks.profiling import cost, peak_memory
from freqprune.networks.registry import build_model
from freqprune.pruning.amount import Amount
from freqprune.pruning.cutting import Material, Recipe, cut, plan_cut
from freqprune.pruning.evidence import calibration, n_measured, shared_batches
from freqprune.pruning.recipe import Reconstruction
from freqprune.pruning.surgery import Plan
from freqprune.tagging.measurement import tag
from freqprune.tagging.stimulus import Stimulus
from freqprune.training.carrying import carry_over
from freqprune.training.classifier import Classifier
from freqprune.training.pruning_callback import TagPruning
from tests.pruning.test_heads import tokens

PIXELS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def material(**more: Any) -> Material:
    return Material(PIXELS[:2], lambda pixels: pixels * 2 - 1, [0.5] * 3, [0.5] * 3, **more)


def test_cut_selects_by_score_and_tells() -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet8"})
    done = cut(net, material(), Recipe(Amount(ratio=0.5, scope="layer"), criterion="amplitude"), Stimulus())
    for layer, score in done.scores.items():
        assert set(done.kept[layer].tolist()) == set(
            score.argsort(descending=True, stable=True)[: len(score) // 2].tolist()
        )
    assert done.remarks == []
    assert done.net.config["widths"] == {"layer1.0.conv1": 8, "layer2.0.conv1": 16, "layer3.0.conv1": 32}
    done = cut(net, material(), Recipe(Amount(macs_cut=0.05, multiple_of=32), criterion="l2"), Stimulus())
    assert any("lost no filter: layer1.0.conv1" in remark for remark in done.remarks)
    assert any("filters that go together allow no closer cut" in remark for remark in done.remarks)


def chain() -> nn.Sequential:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), *pooled).eval()


def test_a_cut_scores_by_the_components_that_are_asked_for() -> None:
    net, recipe = chain(), Recipe(Amount(ratio=0.5, scope="layer"), "amplitude", components=["f2"], layers="0")
    done = cut(net, material(), recipe, Stimulus())
    told = tag(net, PIXELS[:2], mean=[0.5] * 3, std=[0.5] * 3, layers=["0"])
    torch.testing.assert_close(done.scores["0"], told.amplitude("0", ["f2"])[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", ["snr", "redundancy", "logit_redundancy"])
def test_scores_follow_the_seed(criterion: str) -> None:
    net = chain()
    recipe = Recipe(Amount(ratio=0.5, scope="layer"), criterion, layers="0", calibrate_on="frames")
    one, again, other = (
        cut(net, material(calibration=PIXELS), replace(recipe, seed=seed), Stimulus()).scores["0"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_every_batch_of_a_calibration_sees_other_frames_and_as_many_as_asked_for() -> None:
    same = material(calibration=PIXELS[:1].expand(64, -1, -1, -1))
    recipe = Recipe(Amount(ratio=0.5))
    one, other = calibration(chain(), same, recipe, Stimulus())
    assert one.shape == other.shape
    assert not torch.equal(one, other)
    batches = calibration(chain(), same, replace(recipe, frames_an_image=4), Stimulus(), 40)
    assert [len(batch) for batch in batches] == [32 * 4, 8 * 4]


def test_what_a_cut_shows_the_network_is_normalized() -> None:
    net, half = chain(), Amount(ratio=0.5, scope="layer")
    labelled = (PIXELS, torch.arange(6) % 3)
    done = cut(net, material(labelled=labelled), Recipe(half, criterion="activation", layers="0"), Stimulus())
    with torch.no_grad():
        expected = net[:2](PIXELS * 2 - 1).mean((0, 2, 3))
    torch.testing.assert_close(done.scores["0"].float(), expected)
    done = cut(net, material(), Recipe(half, criterion="amplitude", layers="0"), Stimulus())
    with torch.no_grad():
        # Pixels p as 2 p - 1, by the first layer itself.
        net[0].bias -= net[0].weight.sum((1, 2, 3))
        net[0].weight *= 2
    folded = tag(net, PIXELS[:2], Stimulus(), layers=["0"]).amplitude("0", "fundamentals").sum(-1)
    torch.testing.assert_close(done.scores["0"], folded, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("calibrate_on", ["frames", "images", "both"])
def test_a_cut_calibrates_on_what_it_is_told(calibrate_on: str) -> None:
    recipe = Recipe(Amount(ratio=0.5), calibrate_on=calibrate_on)
    found = list(calibration(chain(), material(calibration=PIXELS), recipe, Stimulus()))
    kinds = ["images", "frames"] if calibrate_on == "both" else [calibrate_on]
    every = Stimulus().frames(PIXELS).transpose(0, 1) * 2 - 1
    for batch, kind in zip(found, kinds, strict=True):
        if kind == "images":
            assert torch.equal(batch, PIXELS * 2 - 1)
        else:
            assert not torch.allclose(batch, PIXELS * 2 - 1)
            assert any(torch.allclose(batch, frame) for frame in every)


def test_the_seed_of_a_run_picks_the_frames_and_positions_of_its_calibration() -> None:
    net, calibrated = chain(), material(calibration=PIXELS)
    recipe = Recipe(
        Amount(ratio=0.5),
        "l2",
        compensation="sequential",
        layers="0",
        reconstruction=Reconstruction(rounds=0, positions=8),
    )
    one, again, other = (
        next(calibration(net, calibrated, replace(recipe, seed=seed), Stimulus())) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    # On images nothing but the positions is drawn.
    one, again, other = (
        cut(net, calibrated, replace(recipe, seed=seed, calibrate_on="images"), Stimulus()).net[2].weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("size", "n_images"), [(32, 256), (64, 64), (224, 16)])
def test_a_change_of_the_logits_is_measured_on_as_many_pixels_as_256_small_images_have(
    size: int, n_images: int
) -> None:
    shape, recipe = torch.Size((1, 3, size, size)), Recipe(Amount(ratio=0.5))
    assert n_measured(recipe, shape) == n_images
    assert n_measured(replace(recipe, measured_images=5), shape) == 5


@pytest.mark.parametrize("calibrate_on", ["frames", "images", "both"])
def test_compensated_cut(calibrate_on: str) -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet8", "stage_widths": [4, 4, 8]})
    recipe = Recipe(
        Amount(ratio=0.4, scope="layer"),
        criterion="redundancy",
        compensation="least_squares",
        calibrate_on=calibrate_on,
        frames_an_image=4,
    )
    done = cut(net, material(calibration=PIXELS), recipe, Stimulus())
    plain = cut(
        net,
        material(calibration=PIXELS),
        Recipe(Amount(ratio=0.4, scope="layer"), criterion="redundancy", calibrate_on=calibrate_on, frames_an_image=4),
        Stimulus(),
    )
    assert {k: v.tolist() for k, v in done.kept.items()} == {k: v.tolist() for k, v in plain.kept.items()}
    assert not torch.equal(done.net.layer2[0].conv2.weight, plain.net.layer2[0].conv2.weight)
    with pytest.raises(InputError, match="needs calibration images"):
        cut(net, material(), recipe, Stimulus())


def test_filters_are_not_called_redundant_for_want_of_samples() -> None:
    """A linear layer that is seen once an image: from 6 images any of its 16 inputs follow from 5 others."""
    torch.manual_seed(0)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), *pooled)
    recipe = Recipe(Amount(ratio=0.25, scope="layer"), criterion="redundancy", calibrate_on="images")
    done = cut(net, material(calibration=PIXELS), recipe, Stimulus())
    assert done.kept["0"].tolist() != list(range(8))
    assert "2" not in done.kept
    assert any("worst 6, which lacks 11: 2 keep their filters" in remark for remark in done.remarks)
    done = cut(net, material(calibration=torch.rand(32, 3, 16, 16)), recipe, Stimulus())
    assert len(done.kept["2"]) == 12
    assert done.remarks == []
    much = replace(recipe, amount=Amount(macs_cut=0.9))
    with pytest.raises(InputError, match=r"macs_cut = 0.9 cannot be reached.*lacks 11: 2 keep their.*importance=l2"):
        cut(net, material(calibration=PIXELS), much, Stimulus())
    with pytest.raises(InputError, match=r"worst 6, which lacks 11: nothing can be said.*calibration_images"):
        cut(net, material(calibration=PIXELS), replace(recipe, layers="2"), Stimulus())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "snrr"}, "must be one of .* did you mean snr"),
        ({"compensation": "lstsq"}, "compensation must be one of"),
        ({"calibrate_on": "noise"}, "calibrate_on must be one of"),
        ({"frames_an_image": 0}, "frames_an_image must be at least 1"),
        ({"measured_images": 0}, "measured_images must be at least 1"),
    ],
)
def test_recipe_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(Amount(ratio=0.5), **settings)


def test_peak_memory_of_a_chain_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
    ).eval()
    x = torch.zeros(1, 1, 10, 10)
    # Weights, input, and the two largest maps that live together.
    assert peak_memory(net, x) == 4 * (4 + 8 + 2 + 100) + 4 * (400 + 200)
    found = cost(net, torch.zeros(3, 1, 10, 10))
    assert found["memory_bytes"] == {"3": 4 * 14 + 3 * 4 * (100 + 600)}
    assert found["file_bytes"] > 4 * 14


class Foreign(pl.LightningModule):
    """Someone else's module: its own names, Adam beside another parameter, and a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = build_model({"name": "resnet8", "stage_widths": [4, 8, 8]})
        self.temperature = nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(sum(p.numel() for p in self.backbone.parameters()))
        return nn.functional.cross_entropy(self.backbone(batch[0]) * self.temperature, batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.backbone(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def loaders() -> list[DataLoader[Any]]:
    data = TensorDataset(torch.rand(24, 3, 32, 32), torch.arange(24) % 10)
    return [DataLoader(data, 8), DataLoader(data, 8)]


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 3, **more: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        num_sanity_val_steps=0,
        **more,
    )


RECIPE = Recipe(Amount(ratio=0.25, scope="layer"), criterion="amplitude")
WITH_BLOCKS = Recipe(Amount(macs_cut=0.55, min_filters=4), criterion="logit_error", blocks=True, calibrate_on="images")


def test_callback_prunes_during_fit(tmp_path: Path) -> None:
    module, pruning = Foreign(), TagPruning(RECIPE, [1, 2], n_images=2)
    run = trainer(tmp_path, pruning, enable_checkpointing=False)
    run.fit(module, *loaders())
    sizes = sorted(set(module.seen), reverse=True)
    assert len(sizes) == 3
    assert [module.seen.count(size) for size in sizes] == [3, 3, 3]
    in_optimizer = {p for group in run.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == set(module.parameters())
    assert set(run.optimizers[0].state) == set(module.parameters())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)
    assert {layer: len(indices) for layer, indices in pruning.kept_of_dense.items()} == module.backbone.config["widths"]


def test_momentum_of_kept_filters_is_carried_over() -> None:
    torch.manual_seed(0)
    net = build_model({"name": "resnet8", "stage_widths": [4, 4, 8]})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.rand(4, 3, 8, 8)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    kept = {"layer2.0.conv1": torch.tensor([1, 3])}
    small = Plan(net, x).apply(kept)
    momentum = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in net.named_parameters()}
    carry_over(optimizer, net, small, kept, x)
    found = {name: optimizer.state[p]["momentum_buffer"] for name, p in small.named_parameters()}
    assert torch.equal(found["layer2.0.conv1.weight"], momentum["layer2.0.conv1.weight"][[1, 3]])
    assert torch.equal(found["layer2.0.bn1.bias"], momentum["layer2.0.bn1.bias"][[1, 3]])
    assert torch.equal(found["layer2.0.conv2.weight"], momentum["layer2.0.conv2.weight"][:, [1, 3]])
    assert torch.equal(found["linear.weight"], momentum["linear.weight"])
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(small.parameters())
    optimizer.zero_grad()
    small(x).square().mean().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
@pytest.mark.parametrize("recipe", [RECIPE, WITH_BLOCKS], ids=["filters", "blocks"])
def test_a_run_pruned_on_its_way_resumes(recipe: Recipe, tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    unbroken = Foreign()
    cutting = TagPruning(recipe, [1], n_images=2)
    run = trainer(tmp_path, cutting, saving)
    run.fit(unbroken, *loaders_by_seed())
    assert bool(cutting.dropped[0]) == bool(recipe.blocks)
    assert {p for group in run.optimizers[0].param_groups for p in group["params"]} == set(unbroken.parameters())
    assert set(run.optimizers[0].state) == set(unbroken.parameters())
    again = Foreign()
    pruning = TagPruning(recipe, [1], n_images=2)
    trainer(tmp_path, pruning, enable_checkpointing=False).fit(
        again, *loaders_by_seed(), ckpt_path=str(tmp_path / "epoch=1.ckpt"), weights_only=True
    )
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in unbroken.named_parameters()
    }
    for name, value in unbroken.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
    assert len(set(again.seen)) == 1


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_a_classifier_that_lost_blocks_on_its_way_is_what_its_checkpoint_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Classifier({"name": "resnet8", "stage_widths": [4, 8, 8]})
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    cutting = TagPruning(WITH_BLOCKS, [1], n_images=2)
    trainer(tmp_path, cutting, saving).fit(module, *loaders_by_seed())
    resumed = Classifier({"name": "resnet8", "stage_widths": [4, 8, 8]})
    again = trainer(tmp_path, TagPruning(WITH_BLOCKS, [1], n_images=2), epochs=4, enable_checkpointing=False)
    again.fit(resumed, *loaders_by_seed(), ckpt_path=str(tmp_path / "epoch=2.ckpt"), weights_only=True)
    again.save_checkpoint(tmp_path / "again.ckpt")
    x = torch.rand(2, 3, 32, 32)
    for path, net in ((tmp_path / "epoch=2.ckpt", module.net), (tmp_path / "again.ckpt", resumed.net)):
        stored = load_network(path).net
        loaded = Classifier.load_from_checkpoint(path, weights_only=True).net.eval()
        with torch.no_grad():
            for one in (stored, loaded):
                torch.testing.assert_close(one(x), net.eval()(x))
    # Of the blocks that went no filters are left.
    assert cutting.dropped[0]
    for block in cutting.dropped[0]:
        assert not any(name.startswith(f"{block}.") for name in cutting.kept_of_dense)


def loaders_by_seed() -> list[DataLoader[Any]]:
    torch.manual_seed(1)
    return loaders()


def test_callback_refuses(tmp_path: Path) -> None:
    for epochs in ([], [-1], [0.5]):
        with pytest.raises(InputError, match="epochs must be epochs"):
            TagPruning(RECIPE, epochs)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is no module of Foreign"):
        trainer(tmp_path, TagPruning(RECIPE, [0], network="net")).fit(Foreign(), *loaders())
    module = Foreign()
    module.second = nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match=r"2 children with convolutions \(backbone, second\); say which"):
        trainer(tmp_path, TagPruning(RECIPE, [0])).fit(module, *loaders())
    with pytest.raises(InputError, match="needs a validation loader"):
        trainer(tmp_path, TagPruning(RECIPE, [0], network="backbone"), limit_val_batches=0).fit(Foreign(), *loaders())


def test_distillation_by_hand() -> None:
    torch.manual_seed(0)
    teacher = build_model({"name": "resnet8", "stage_widths": [4, 4, 4]}).eval()
    student = Classifier(
        {"name": "resnet8", "stage_widths": [4, 4, 4]}, num_classes=10, teacher=teacher, distill=0.7, temperature=3.0
    )
    student.log = lambda *a, **k: None  # type: ignore[method-assign]
    x, y = torch.rand(5, 3, 8, 8), torch.arange(5)
    student.eval()
    with torch.no_grad():
        own, target = student(x), teacher(x)
        found = student.training_step((x, y), 0)
        soft = nn.functional.kl_div((own / 3).log_softmax(1), (target / 3).softmax(1), reduction="batchmean") * 9
        torch.testing.assert_close(found, 0.3 * nn.functional.cross_entropy(own, y) + 0.7 * soft)
    assert not any("teacher" in key for key in student.state_dict())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    with pytest.raises(InputError, match="needs a teacher"):
        Classifier({"name": "resnet8"}, distill=0.5)
    with pytest.raises(InputError, match=r"must lie in \[0, 1\], got 1.5"):
        Classifier({"name": "resnet8"}, teacher=teacher, distill=1.5)


class WithSize(nn.Module):
    """A block that is called with more than the map, as in PVT."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int], scale: float = 1.0) -> Tensor:
        return x + scale * self.b(self.a(x).relu())  # type: ignore[no-any-return]


def test_blocks_that_are_called_with_more_can_go() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.blocks = nn.ModuleList([WithSize() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, (14, 14), scale=0.5)
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    plan = Plan(Net().eval(), PIXELS, blocks=True)
    assert list(plan.blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    for name in plan.blocks:
        assert dropped_blocks(plan.apply({name: torch.tensor([], dtype=torch.long)})) == {name: []}


class Signals(nn.Module):
    """Maps, then a convolution over one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu().mean(2)).relu().mean(2))  # type: ignore[no-any-return]


def test_readers_in_one_dimension_are_named() -> None:
    torch.manual_seed(0)
    net, calibrated = Signals().eval(), material(calibration=PIXELS)
    with pytest.raises(InputError, match=r"a are read by others; leave them out with pruning.exclude=\[a\]"):
        cut(net, calibrated, Recipe(Amount(ratio=0.5, scope="layer"), "logit_error", layers="a"), Stimulus())
    recipe = Recipe(Amount(ratio=0.5, scope="layer"), criterion="l2", layers="a", compensation="least_squares")
    assert any("b is a Conv1d" in remark for remark in cut(net, calibrated, recipe, Stimulus()).remarks)
    recipe = replace(recipe, compensation="sequential")
    assert any("b runs more than once, or is no 2-D" in one for one in cut(net, calibrated, recipe, Stimulus()).remarks)


def test_an_amount_beyond_every_floor_is_refused_before_anything_is_measured() -> None:
    net = build_model({"name": "resnet8"})
    recipe = Recipe(Amount(macs_cut=0.5, scope="global", min_filters=8), layers="layer1.*.conv1", criterion="amplitude")
    with pytest.raises(InputError, match=r"pruning.macs_cut = 0.5 cannot be reached: with every layer at"):
        plan_cut(net, material().normalize(PIXELS[:1]), recipe)


@pytest.mark.parametrize(
    ("how", "n_images", "size", "batches"),
    [
        ({"criterion": "l2"}, 64, 32, None),
        ({"criterion": "l2", "compensation": "least_squares"}, 64, 32, 2),
        ({"criterion": "l2", "compensation": "least_squares"}, 65, 32, 3),
        ({"criterion": "l2", "compensation": "mean", "calibrate_on": "both"}, 64, 32, 4),
        # 64 images of 32 x 32 at once.
        ({"criterion": "l2", "compensation": "sequential"}, 128, 32, 2),
        ({"criterion": "l2", "compensation": "sequential", "calibrate_on": "both"}, 128, 32, 4),
        ({"criterion": "redundancy", "compensation": "sequential"}, 32, 32, 1),
        ({"criterion": "logit_error", "blocks": True, "measured_images": 1}, 64, 32, 1),
        ({"criterion": "logit_error", "blocks": True, "calibrate_on": "both"}, 128, 64, 8),
    ],
)
def test_batches_that_processes_share_are_counted(
    how: dict[str, Any], n_images: int, size: int, batches: int | None
) -> None:
    assert shared_batches(Recipe(Amount(macs_cut=0.3), **how), torch.zeros(n_images, 3, size, size)) == batches


def test_layers_seen_in_too_few_samples_are_made_up_for_by_their_mean() -> None:
    """Of 6 samples, least squares would leave nothing of a reader of 48 inputs but what these span."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)).eval()
    how = {"criterion": "l2", "compensation": "least_squares", "calibrate_on": "images"}
    recipe = Recipe(Amount(ratio=0.25, scope="layer"), **how)  # type: ignore[arg-type]
    done = cut(net, material(calibration=PIXELS), recipe, Stimulus())
    assert any("worst 4, which lacks 59: what they lost is made up for by its mean only" in one for one in done.remarks)
    assert torch.equal(done.net[4].weight, net[4].weight[:, done.kept["0"]])
    with torch.no_grad():
        torch.testing.assert_close(done.net(PIXELS * 2 - 1).mean(0), net(PIXELS * 2 - 1).mean(0), rtol=1e-4, atol=1e-5)
    done = cut(net, material(calibration=torch.rand(80, 3, 16, 16)), recipe, Stimulus())
    assert done.remarks == []
    assert not torch.equal(done.net[4].weight, net[4].weight[:, done.kept["0"]])


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if y.sum() > 0 else -y).mean((2, 3))  # type: ignore[no-any-return]


def test_what_cannot_be_made_up_for_or_measured_is_refused_before_anything_is_measured() -> None:
    half, image = Amount(ratio=0.5, scope="layer"), PIXELS[:1]
    with pytest.raises(InputError, match=r"torch\.export cannot follow"):
        plan_cut(Chooses(), image, Recipe(half, "l2", compensation="sequential"))
    large = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16 * 16, 10))
    with pytest.raises(InputError, match=r"'3' reads 16384 values, at most 8192 .*pruning\.exclude=0"):
        plan_cut(large, image, Recipe(half, "redundancy"))
    with pytest.raises(InputError, match=r"pruning\.ratio = 0\.99 asks for 111 of 112 filters.*only 109 can go"):
        plan_cut(build_model({"name": "resnet8"}), image, Recipe(Amount(ratio=0.99)))


def test_a_seed_of_the_positions_is_the_recipes_unless_it_has_one() -> None:
    torch.manual_seed(0)
    net, calibrated = chain(), material(calibration=torch.rand(40, 3, 16, 16))
    few = Recipe(Amount(ratio=0.5, scope="layer"), "l2", layers="0", compensation="sequential", calibrate_on="images")

    def solved(seed: int, recipe_seed: int) -> Tensor:
        how = Reconstruction(positions=8, seed=seed, rounds=0)
        return cut(net, calibrated, replace(few, reconstruction=how, seed=recipe_seed), Stimulus()).net[2].weight

    assert torch.equal(solved(0, 5), solved(5, 0))
    assert not torch.equal(solved(5, 0), solved(6, 0))


def test_layers_that_cannot_be_followed_are_named() -> None:
    net, x = tokens("talking"), torch.rand(2, 3, 32, 32)
    remarks = cut(net, Material(x, lambda p: p), Recipe(Amount(ratio=0.3), "l2"), Stimulus()).remarks
    assert any("1 layers keep their filters, as their channels cannot be followed: attn.qkv" in one for one in remarks)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"criterion": "amplitude", "compensation": "sequential"}, "compensation='sequential' needs calibration"),
        ({"criterion": "amplitude", "compensation": "least_squares"}, "compensation='least_squares' needs calibration"),
        ({"criterion": "logit_error", "compensation": "none"}, "criterion 'logit_error' needs calibration images"),
        ({"criterion": "taylor"}, r"criterion 'taylor' reads labelled images: pass Material\(labelled="),
    ],
)
def test_images_that_are_missing_are_asked_for_before_anything_is_measured(
    how: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freqprune.pruning.cutting.gather", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=message):
        cut(chain(), material(), Recipe(Amount(ratio=0.5, scope="layer"), **how), Stimulus())


def test_a_response_of_the_network_before_it_was_cut_is_refused() -> None:
    net, recipe = chain(), Recipe(Amount(ratio=0.5, scope="layer"), "amplitude", layers="0")
    first = cut(net, material(), recipe, Stimulus())
    with pytest.raises(
        InputError, match=r"scores of shape \(8,\), expected one for each of its 4 filters; what it reads"
    ):
        cut(first.net, material(), recipe, Stimulus(), first.response)


class Keeps(nn.Module):
    """Makes its bias once in eval mode, as the attention of LeViT does, and lets go of it when a mode is set."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.table, self.head, self.made = nn.Parameter(torch.randn(1, 3)), nn.Linear(6, 3), dict[int, Tensor]()

    def train(self, mode: bool = True) -> "Keeps":
        super().train(mode)
        self.made.clear()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.made:
            self.made[0] = self.table[:, [2, 0, 1]]
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3))) + self.made[0]


@pytest.mark.parametrize("criterion", ["taylor", "hessian", "logit_redundancy", "logit_error", "amplitude"])
def test_networks_that_keep_what_they_made_in_eval_mode_are_cut(criterion: str) -> None:
    torch.manual_seed(0)
    given = material(labelled=(PIXELS, torch.arange(6) % 3), calibration=PIXELS)
    done = cut(Keeps(), given, Recipe(Amount(ratio=0.25, scope="layer"), criterion), Stimulus(max_order=1))
    assert done.net.conv1.out_channels == 6
    copy.deepcopy(Plan(Keeps(), PIXELS[:1]).apply(done.kept, check=False))


def test_layers_over_windows_are_refused_where_a_cut_reads_them() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 4, 4)
            self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(torch.relu(self.stem(x))).flatten(2).mT
            windows = self.fc2(torch.relu(self.fc1(tokens.reshape(-1, 4, 8))))
            return windows.reshape(len(x), -1, 3).mean(1)

    half = Amount(ratio=0.5, scope="layer")
    with pytest.raises(InputError, match=r"fc1: .*pruning\.exclude=\[fc1\]"):
        plan_cut(Windows(), PIXELS[:1], Recipe(half, "amplitude"))
    done = cut(Windows(), material(), Recipe(half, "amplitude", exclude=["fc1"]), Stimulus(max_order=1))
    assert (done.net.stem.out_channels, done.net.fc1.out_features) == (4, 6)
    # Others need not read it.
    assert cut(Windows(), material(), Recipe(half, "l2"), Stimulus(max_order=1)).net.fc1.out_features == 3
