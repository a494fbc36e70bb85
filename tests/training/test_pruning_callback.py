"""Pruning while a module of one's own trains: what is refused before epochs are lost, and what a checkpoint needs."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from freqprune.errors import InputError
from freqprune.networks.blocks import drop_blocks, dropped_blocks
from freqprune.networks.checkpoint import load_network, save_weights
from freqprune.networks.profiling import Latency
from freqprune.networks.registry import build_model, register_model
from freqprune.pruning.amount import Amount
from freqprune.pruning.cutting import Material, cut
from freqprune.pruning.recipe import Recipe
from freqprune.pruning.surgery import Plan
from freqprune.tagging.stimulus import Stimulus
from freqprune.training import pruning_callback
from freqprune.training.carrying import carry_over
from freqprune.training.classifier import Classifier
from freqprune.training.pruning_callback import TagPruning
from freqprune.training.tagging_callback import FrequencyTagging
from tests.counting import Counts
from tests.training.small import digits, trainer

RECIPE = Recipe(Amount(ratio=0.25, scope="layer"), criterion="amplitude")
WITHOUT_A_CALLBACK = "ignore:.*callbacks used to create the checkpoint.*"


class Flat(nn.Module):
    """Runs on images of one size only, and views its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, stride=2)
        self.linear = nn.Linear(6 * 12 * 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.linear(x.view(len(x), -1))  # type: ignore[no-any-return]


class Own(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.n_steps = Flat(), 0

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        self.n_steps += 1
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("val/loss", self.net(batch[0]).square().mean())

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("test/loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def loader(
    scale: float = 1.0, labels: bool = True, first: int = 0, dtype: torch.dtype = torch.int64
) -> DataLoader[Any]:
    images = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * scale
    numbers = (torch.arange(16) % 10 + first).to(dtype)
    return DataLoader(TensorDataset(images, *([numbers] if labels else [])), 8)


def cutting(recipe: Recipe = RECIPE, epochs: tuple[int, ...] = (1,)) -> TagPruning:
    return TagPruning(recipe, epochs, n_images=4, stimulus=Stimulus(max_order=1))


@pytest.mark.filterwarnings(WITHOUT_A_CALLBACK)
def test_a_network_of_one_image_size_resumes_and_is_tested_from_its_checkpoint(tmp_path: Path) -> None:
    first = Own()
    run = trainer(tmp_path, cutting(), max_epochs=2)
    run.fit(first, loader(), loader())
    assert first.net.conv1.out_channels == 3
    run.save_checkpoint(tmp_path / "last.ckpt")
    expected = run.test(first, loader(), verbose=False)
    # In another process, with a module that has not been cut.
    tested = trainer(tmp_path, cutting()).test(
        Own(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert tested == expected
    # Another callback finds the module cut already.
    tested = trainer(tmp_path, cutting()).test(
        first, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert tested == expected
    resumed = Own()
    trainer(tmp_path, cutting(), max_epochs=3).fit(
        resumed, loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert resumed.n_steps == 2
    assert resumed.net.conv1.out_channels == 3
    # In the same one, the module is cut already.
    run.fit_loop.max_epochs = 3
    run.fit(first, loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.n_steps == 4 + 2
    for name, value in first.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value), name


def test_a_second_module_begins_without_the_cuts_of_the_first(tmp_path: Path) -> None:
    callback = cutting()
    for _ in range(2):
        trainer(tmp_path, callback, max_epochs=2).fit(Own(), loader(), loader())
        assert len(callback.kept) == 1
    assert {name: len(kept) for name, kept in callback.kept_of_dense.items()} == {"conv1": 3, "conv2": 5}


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        (RECIPE, {"scale": 3.0}, "after undoing the normalisation .* give TagPruning the mean and std"),
        (Recipe(Amount(ratio=0.25), criterion="l2", layers="layr*"), {}, "layr"),
        (
            Recipe(Amount(ratio=0.25), criterion="taylor"),
            {"labels": False},
            r"no labels: let them be \(images, labels\)",
        ),
        (
            Recipe(Amount(ratio=0.25), criterion="taylor"),
            {"dtype": torch.float32},
            r"whole numbers in \[0, 9\], got tor",
        ),
        (Recipe(Amount(ratio=0.25), criterion="hessian"), {"first": 7}, r"in \[0, 9\], got torch.int64 in \[7, 10\]"),
    ],
)
def test_what_the_cut_would_refuse_is_refused_before_the_first_epoch(
    recipe: Recipe, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = Own()
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, cutting(recipe), max_epochs=2).fit(module, loader(**given), loader(**given))
    assert module.n_steps == 0


@pytest.mark.parametrize(
    ("criterion", "ends", "message"),
    [
        (
            "taylor",
            [nn.Linear(6, 1), nn.Flatten(0)],
            r"reads logits, \(n_images, n_classes\), and Sequential answers \(1,\)",
        ),
        ("taylor", [nn.Linear(6, 1)], "of two classes or more, and Sequential answers with 1 number an image"),
        ("logit_error", [nn.Unflatten(1, (1, 2, 3))], r"and Sequential answers \(1, 1, 2, 3\); use another criterion"),
        ("effect", [nn.Unflatten(1, (1, 2, 3))], r"and Sequential answers \(1, 1, 2, 3\); use another criterion"),
    ],
)
def test_answers_that_a_criterion_can_make_nothing_of_are_refused_before_the_first_epoch(
    criterion: str, ends: list[nn.Module], message: str, tmp_path: Path
) -> None:
    module = Own()
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    module.net = nn.Sequential(*layers, *ends)  # type: ignore[assignment]
    recipe = Recipe(Amount(ratio=0.25), criterion)
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, cutting(recipe), max_epochs=2).fit(module, loader(), loader())
    assert module.n_steps == 0
    # What reads none of it cuts.
    trainer(tmp_path, cutting(Recipe(Amount(ratio=0.25, scope="layer"), "activation")), max_epochs=2).fit(
        module, loader(dtype=torch.float32), loader(dtype=torch.float32)
    )
    assert module.net[0].out_channels == 3  # type: ignore[index]


def test_a_checkpoint_says_itself_what_the_network_takes(tmp_path: Path) -> None:
    class Pairs(Own):
        example_input_array = torch.zeros(1, 2, 1, 28, 28)

        def forward(self, pairs: Tensor) -> Tensor:
            return self.net(pairs.flatten(0, 1))  # type: ignore[no-any-return]

    run = trainer(tmp_path, cutting(), max_epochs=2)
    run.fit(Pairs(), loader(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = Pairs()
    trainer(tmp_path, cutting(), max_epochs=3).fit(
        again, loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert (again.n_steps, again.net.conv1.out_channels) == (2, 3)


def test_states_that_are_no_tensors_are_no_matter(tmp_path: Path) -> None:
    module = Own()
    layers = [nn.Conv2d(1, 4, 3), Counts(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)]
    module.net = nn.Sequential(*layers)  # type: ignore[assignment]
    trainer(tmp_path, cutting(), max_epochs=2).fit(module, loader(), loader())
    assert module.net[0].out_channels == 3  # type: ignore[index]


def test_hyper_parameters_of_others_are_left_as_they_are(tmp_path: Path) -> None:
    class Theirs(Own):
        def __init__(self, model: dict[str, Any]) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = build_model({"name": model["backbone"]})  # type: ignore[assignment]

    module = Theirs({"backbone": "resnet8", "smoothing": 0.1})
    images = DataLoader(TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8)), 8)
    trainer(tmp_path, cutting(), max_epochs=2).fit(module, images, images)
    assert module.hparams["model"] == {"backbone": "resnet8", "smoothing": 0.1}
    assert "blocks" not in module.hparams


def test_a_new_callback_for_a_module_that_was_cut_knows_what_its_shortcuts_pick(tmp_path: Path) -> None:
    recipe = Recipe(Amount(ratio=0.5, scope="layer"), "l2", streams=True)
    module, data = Classifier({"name": "resnet8"}, lr=0.1), digits()
    run = trainer(tmp_path, cutting(recipe, (0,)), max_epochs=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "first.ckpt")
    again = trainer(tmp_path, cutting(recipe, (0,)), max_epochs=2)
    again.fit(module, data, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    again.save_checkpoint(tmp_path / "second.ckpt")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_network(tmp_path / "second.ckpt").net.eval()(x), module.net.eval()(x))


@pytest.mark.parametrize("kind", ["Adam", "Adafactor"])
def test_state_of_another_shape_or_of_some_parameters_only_is_not_made_up(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Flat(), torch.rand(2, 1, 28, 28)
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=0.01)
    net.conv1.requires_grad_(False)
    net(x).square().mean().backward()
    optimizer.step()
    kept = {"conv2": torch.tensor([0, 2, 5])}
    small = Plan(net, x).apply(kept)
    carry_over(optimizer, net, small, kept, x)
    assert small.conv1.weight not in optimizer.state
    if kind == "Adam":
        assert optimizer.state[small.conv2.weight]["exp_avg"].shape == small.conv2.weight.shape
        assert optimizer.state[small.conv2.weight]["step"] == 1
    else:
        assert small.conv2.weight not in optimizer.state
    before = small.conv1.weight.detach().clone()
    small.requires_grad_(True)
    small(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(small.conv1.weight, before)


def test_tags_that_cannot_be_shown_are_refused_before_the_first_epoch(tmp_path: Path) -> None:
    for wrong, message in (
        ({"criterion": "snrr"}, "did you mean snr"),
        ({"criterion": "taylor"}, "criterion = taylor reads more than the tags"),
        ({"components": "f3"}, "components must name"),
        ({"criterion": "integration", "stimulus": Stimulus(max_order=1)}, "reads intermodulation components"),
    ):
        with pytest.raises(InputError, match=message):
            FrequencyTagging(every_n_epochs=10, **wrong)
    module = Own()
    with pytest.raises(InputError, match="layr"):
        trainer(tmp_path, FrequencyTagging(every_n_epochs=10, layers="layr*")).fit(module, loader(), loader())
    assert module.n_steps == 0


class TwoNames(Own):
    """Runs its layers under other names than those that are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(self.net.conv1, nn.ReLU(), self.net.conv2)


@pytest.mark.parametrize(
    ("callbacks", "settings", "message"),
    [
        ([], {"precision": "bf16-true"}, "cuts networks in float32, this one is in bfloat16"),
        ([pl.callbacks.StochasticWeightAveraging(0.01)], {}, "would go on averaging the old one"),
    ],
)
def test_what_would_go_on_with_the_old_network_is_refused(
    callbacks: list[pl.Callback], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = Own()
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, cutting(), *callbacks, max_epochs=2, **settings).fit(module, loader(), loader())
    assert module.n_steps == 0


def test_other_names_for_layers_and_lists_of_parameters_are_refused(tmp_path: Path) -> None:
    class Quasi(Own):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    callback = TagPruning(RECIPE, (1,), n_images=4, stimulus=Stimulus(max_order=1), network="net")

    class Shards(Own):
        def configure_optimizers(self) -> Any:
            class ZeroRedundancyOptimizer(torch.optim.SGD):
                """As PyTorch's looks from outside; its own needs a group of processes."""

                def consolidate_state_dict(self) -> None:
                    pass

            return ZeroRedundancyOptimizer(self.parameters(), lr=0.01)

    class Averages(Own):
        def __init__(self) -> None:
            super().__init__()
            self.ema = AveragedModel(self.net)

    class Listens(Own):
        def __init__(self, *given: Any) -> None:
            super().__init__()
            self.seen: Any = None
            self.net.conv1.register_forward_hook(partial(self._keep, *given) if given else self._keep)

        def _keep(self, *args: Any) -> None:
            self.seen = args[-1]

    for module, message in (
        (Averages(), r"Averages\.ema would go on averaging the old one"),
        (Listens(), r"a hook of net\.conv1 is a method of Listens"),
        (Listens(1), r"a hook of net\.conv1 is a method of Listens"),
        (TwoNames(), r"has layers of net\.\* as features.0"),
        (Quasi(), "of which LBFGS keeps a list"),
        (Shards(), "of which ZeroRedundancyOptimizer keeps a list"),
    ):
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, callback, max_epochs=2).fit(module, loader(), loader())
        assert module.n_steps == 0


def test_epochs_that_do_not_come_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = "epochs = [40]: this training begins with epoch 0, counted from 0 and ends after 2 epochs"
    trainer(tmp_path, cutting(epochs=(40,)), max_epochs=2).fit(Own(), loader(), loader())
    assert said in caplog.text
    caplog.clear()
    trainer(tmp_path, cutting(epochs=(40,)), fast_dev_run=True).fit(Own(), loader(), loader())
    assert "this training begins" not in caplog.text


def test_another_name_of_the_whole_network_is_of_the_smaller_one(tmp_path: Path) -> None:
    class Aliased(Own):
        def __init__(self) -> None:
            super().__init__()
            self.model = self.net
            self.scale, self.automatic_optimization = nn.Linear(1, 1), False

        def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:  # type: ignore[override]
            self.model(batch[0])

        def configure_optimizers(self) -> Any:
            # One that keeps lists, of parameters beside the network.
            return [super().configure_optimizers(), torch.optim.LBFGS(self.scale.parameters())]

    module = Aliased()
    trainer(tmp_path, cutting(epochs=(1,)), max_epochs=2).fit(module, loader(), loader())
    assert module.model is module.net
    assert sum(p.numel() for p in module.net.parameters()) < sum(p.numel() for p in Flat().parameters())


def test_every_optimizer_goes_on_with_its_part_of_the_smaller_network(tmp_path: Path) -> None:
    class Parts(Own):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:  # type: ignore[override]
            pass

        def configure_optimizers(self) -> Any:
            first, *others = self.net.children()
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (first, nn.ModuleList(others))]

    module, run = Parts(), trainer(tmp_path, cutting(epochs=(1,)), max_epochs=2)
    run.fit(module, loader(), loader())
    assert module.net.conv1.out_channels == 3
    held = [[id(p) for p in optimizer.param_groups[0]["params"]] for optimizer in run.optimizers]
    first, *others = module.net.children()
    assert held == [list(map(id, part.parameters())) for part in (first, nn.ModuleList(others))]


@pytest.mark.filterwarnings(WITHOUT_A_CALLBACK)
def test_a_checkpoint_of_a_cut_network_of_any_kind_is_read(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, num_classes: int = 10) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2)
            self.linear = nn.Linear(6, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))  # type: ignore[no-any-return]

    register_model("cut_while_trained", Net)
    module, run = Classifier({"name": "cut_while_trained"}), trainer(tmp_path, cutting(), max_epochs=2)
    run.fit(module, datamodule=digits())
    assert module.net.conv1.out_channels == 3
    run.save_checkpoint(tmp_path / "last.ckpt")
    save_weights(tmp_path / "weights.ckpt", tmp_path / "last.ckpt")
    images = torch.rand(2, 3, 32, 32)
    cuts = next(one for one in run.callbacks if isinstance(one, TagPruning))  # type: ignore[attr-defined]
    for name in ("last.ckpt", "weights.ckpt"):
        found = load_network(tmp_path / name)
        torch.testing.assert_close(found.net(images), module.net.eval()(images))
        # A further cut counts on from there.
        assert found.kept == cuts.kept_of_dense


def test_blocks_that_went_while_a_module_of_others_trained_are_known(tmp_path: Path) -> None:
    """Its own settings say nothing of them."""
    net = build_model({"name": "resnet14"}).eval()
    drop_blocks(net, {"layer1.1": []})
    gone = dropped_blocks(net)
    assert list(gone) == ["layer1.1"]
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    cuts = {"TagPruning": {"kept": [{}, {"layer1.0.conv1": [*range(16)]}], "dropped": [{}, gone], "shape": [3, 32, 32]}}
    torch.save({"state_dict": state, "hyper_parameters": {}, "callbacks": cuts}, tmp_path / "last.ckpt")
    images = torch.rand(2, 3, 32, 32)
    found = load_network(tmp_path / "last.ckpt", {"name": "resnet14"})
    torch.testing.assert_close(found.net(images), net(images))


def test_streams_count_on_when_the_block_that_named_them_has_gone() -> None:
    stream = ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]
    left = {"layer2.0": ["downsample"]}
    cuts = TagPruning(Recipe(Amount(macs_cut=0.25), "logit_error", streams=True, blocks=True), (0, 1, 2))
    state = {"kept": [{stream[0]: [0, 2, 4, 6]}, {}], "members": [{stream[0]: stream}, {}], "dropped": [{}, left]}
    cuts.load_state_dict(state)
    assert cuts.kept_of_dense == {stream[1]: [0, 2, 4, 6]}
    last = {"kept": [{stream[1]: [0, 3]}], "members": [{stream[1]: stream[1:]}], "dropped": [left]}
    cuts.load_state_dict({name: state[name] + last[name] for name in state})
    assert cuts.kept_of_dense == {stream[1]: [0, 6]}
    # Of earlier versions the layers are not known.
    cuts.load_state_dict({name: state[name] + last[name] for name in state if name != "members"})
    assert cuts.kept_of_dense == {stream[1]: [0, 3]}


class Bare(pl.LightningModule):
    """A module that keeps no hyper-parameters, as somebody writes who needs none, and has weights of its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_model({"name": "resnet8"})
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(10))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])  # type: ignore[no-any-return]

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings(WITHOUT_A_CALLBACK)
@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_of_modules_without_hyper_parameters_tell_of_cuts(weights_only: bool, tmp_path: Path) -> None:
    module, cuts = Bare(), TagPruning(Recipe(Amount(ratio=0.25), criterion="l2"), (0,), n_images=4)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=weights_only)
    trainer(tmp_path, cuts, saver, max_epochs=1, enable_checkpointing=True).fit(module, datamodule=digits())
    path, images = tmp_path / "epoch=0.ckpt", torch.rand(2, 3, 32, 32)
    found = load_network(path, {"name": "resnet8"})
    assert found.kept == cuts.kept_of_dense != {}
    torch.testing.assert_close(found.net(images), module.net.eval()(images))
    whole = Bare()
    trainer(tmp_path, TagPruning(cuts.recipe, (0,), n_images=4)).test(
        whole, datamodule=digits(), ckpt_path=path, weights_only=True, verbose=False
    )
    torch.testing.assert_close(whole.net.eval()(images), found.net(images))


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_networks_may_be_built_as_late_as_lightning_allows(hook: str, tmp_path: Path) -> None:
    class Late(Own):
        def __init__(self) -> None:
            super().__init__()
            del self.net

    def build(module: pl.LightningModule, *_: Any, **__: Any) -> None:
        if not hasattr(module, "net"):
            module.net = Flat()

    setattr(Late, hook, build)
    module, tagging = Late(), FrequencyTagging(n_images=2, network="net")
    trainer(tmp_path, cutting(), tagging, max_epochs=2).fit(module, loader(), loader())
    assert module.net.conv1.out_channels == 3
    assert tagging.latest["snr"]["conv1"].shape[0] == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [({"spatial": "maps"}, "spatial must be one of"), ({"layer": "x"}, "layer is no setting; .* did you mean layers")],
)
def test_tag_settings_of_a_recipe_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(Amount(ratio=0.25), tagging=given)
    Recipe(Amount(ratio=0.25), tagging={"where": "norm", "frames_a_batch": 4})


def test_components_that_the_stimulus_lacks_are_refused_before_the_first_epoch(tmp_path: Path) -> None:
    module = Own()
    with pytest.raises(InputError, match="components must name"):
        trainer(tmp_path, cutting(Recipe(Amount(ratio=0.25), "snr", components="f3")), max_epochs=2).fit(
            module, loader(), loader()
        )
    assert module.n_steps == 0


@pytest.mark.filterwarnings(WITHOUT_A_CALLBACK)
@pytest.mark.filterwarnings("ignore:.*checkpoint that ended before the epoch ended.*")
def test_what_later_cuts_cannot_reach_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first takes what a second cut of the same share would need."""
    recipe = Recipe(Amount(macs_cut=0.2), "l2", layers="layer3.0.conv1")
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    module, cuts = Bare(), TagPruning(recipe, (1, 2), n_images=4)
    trainer(tmp_path, cuts, saver, max_epochs=3, enable_checkpointing=True).fit(module, datamodule=digits())
    assert len(cuts.kept) == 1
    assert "nothing is cut in epoch 2: pruning.macs_cut = 0.2 cannot be reached" in caplog.text
    # From the middle of the epoch that began with the cut, and with no other to come.
    again = TagPruning(recipe, (1,), n_images=4)
    trainer(tmp_path, again, max_epochs=2).fit(
        Bare(), datamodule=digits(), ckpt_path=tmp_path / "step=12.ckpt", weights_only=True
    )
    assert again.kept == cuts.kept


@pytest.mark.filterwarnings(WITHOUT_A_CALLBACK)
def test_a_cut_that_is_due_after_a_checkpoint_of_the_last_batch_is_made(tmp_path: Path) -> None:
    """Lightning says of no epoch that it begins there."""
    recipe = Recipe(Amount(ratio=0.25), "l2")
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    cuts = TagPruning(recipe, (0, 1), n_images=4)
    whole = trainer(tmp_path, cuts, saver, max_epochs=2, enable_checkpointing=True)
    whole.fit(Bare(), datamodule=digits())
    assert len(cuts.kept) == 2
    assert whole.global_step == 2 * 8
    again = TagPruning(recipe, (0, 1), n_images=4)
    run = trainer(tmp_path, again, max_epochs=2)
    run.fit(Bare(), datamodule=digits(), ckpt_path=tmp_path / "step=8.ckpt", weights_only=True)
    assert run.global_step == 2 * 8
    assert len(again.kept) == 2
    assert again.kept[0] == cuts.kept[0]


def test_what_a_cut_by_time_asks_for_is_looked_at_before_the_first_epoch(tmp_path: Path) -> None:
    how = Latency(batch_size=2, folder=str(tmp_path))
    module = Own()
    with pytest.raises(InputError, match="asks for no less than the network takes already"):
        trainer(tmp_path, cutting(Recipe(Amount(latency_ms=1e6), "l2", blocks=False, latency=how)), max_epochs=2).fit(
            module, loader(), loader()
        )
    assert module.n_steps == 0


def test_a_later_cut_that_is_refused_for_any_reason_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error, made = InputError("the time is too short"), []

    def once(*args: Any, **more: Any) -> Any:
        if made:
            raise error
        made.append(1)
        return cut(*args, **more)

    monkeypatch.setattr(pruning_callback, "cut", once)
    cuts = cutting(epochs=(0, 1))
    trainer(tmp_path, cuts, max_epochs=2).fit(Own(), loader(), loader())
    assert len(cuts.kept) == 1
    assert f"nothing is cut in epoch 1: {error}" in caplog.text


def test_epochs_that_have_passed_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, max_epochs=2)
    module = Own()
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    trainer(tmp_path, cutting(epochs=(1,)), max_epochs=3).fit(
        module, loader(), loader(), ckpt_path=tmp_path / "dense.ckpt", weights_only=True
    )
    assert "this training begins with epoch 2, counted from 0 and ends after 3 epochs" in caplog.text
    caplog.clear()
    endless = {"max_epochs": -1, "max_steps": 7}
    trainer(tmp_path, cutting(epochs=(1,)), **endless).fit(
        module, loader(), loader(), ckpt_path=tmp_path / "dense.ckpt", weights_only=True
    )
    assert "begins with epoch 2, counted from 0, so that nothing is cut; name others\n" in caplog.text


def test_a_network_that_was_compiled_in_place_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Own()
    module.net.compile(backend="eager")
    trainer(tmp_path, cutting(), max_epochs=2).fit(module, loader(), loader())
    assert "after a cut it trains uncompiled" in caplog.text
    assert module.net.conv1.out_channels == 3


@pytest.mark.parametrize("criterion", ["taylor", "amplitude"])
def test_a_cut_while_training_is_that_of_the_same_images(criterion: str, tmp_path: Path) -> None:
    recipe = Recipe(Amount(ratio=0.25, scope="layer"), criterion)
    pixels, labels = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    given = DataLoader(TensorDataset((pixels - 0.4) / 0.2, labels), 8)
    module, short = Own(), Stimulus(max_order=1)
    material = Material(
        pixels[:4], lambda p: (p - 0.4) / 0.2, [0.4], [0.2], calibration=pixels[:4], labelled=(pixels[:4], labels[:4])
    )
    expected = cut(copy.deepcopy(module.net).eval(), material, recipe, short)
    cuts = TagPruning(recipe, (0,), n_images=4, mean=[0.4], std=[0.2], stimulus=short)
    trainer(tmp_path, cuts, max_epochs=1).fit(module, given, given)
    assert cuts.kept[0] == {name: kept.tolist() for name, kept in expected.kept.items()}


@pytest.mark.filterwarnings(WITHOUT_A_CALLBACK)
@pytest.mark.filterwarnings("ignore:.*checkpoint that ended before the epoch ended.*")
def test_an_epoch_that_was_cut_and_broke_off_in_its_first_batch_is_not_cut_again(tmp_path: Path) -> None:
    class Breaks(Bare):
        def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
            if self.trainer.current_epoch == 1:
                self.trainer.save_checkpoint(tmp_path / "broken.ckpt")
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    recipe = Recipe(Amount(ratio=0.25), "l2")
    first = TagPruning(recipe, (1,), n_images=4)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, first, max_epochs=2).fit(Breaks(), datamodule=digits())
    assert len(first.kept) == 1
    again = TagPruning(recipe, (1,), n_images=4)
    trainer(tmp_path, again, max_epochs=2).fit(
        Bare(), datamodule=digits(), ckpt_path=tmp_path / "broken.ckpt", weights_only=True
    )
    assert again.kept == first.kept


def test_a_folder_of_times_that_cannot_be_written_is_refused_before_the_first_epoch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = Recipe(Amount(latency_cut=0.3), "l2", blocks=False, latency=Latency(folder=str(tmp_path / "file")))
    module = Own()
    with pytest.raises(InputError, match="measured times cannot be kept in"):
        trainer(tmp_path, cutting(recipe), max_epochs=2).fit(module, loader(), loader())
    assert module.n_steps == 0
