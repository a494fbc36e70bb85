"""Configuration → the objects of a run: output folder, data, network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from freqprune.errors import InputError
from freqprune.jobs.config import Common
from freqprune.jobs.settings import Settings
from freqprune.networks import (
    CIFAR10_CLASSES,
    CIFAR10_TRAIN,
    DEFAULT,
    HELD_OUT,
    Stored,
    build_model,
    cards,
    check_answers,
    config_of,
    device_of,
    evaluating,
    first,
    load_network,
    preprocessing,
    pretrained_path,
    rebuilt_from,
    trained,
)
from freqprune.processes import rank_and_size
from freqprune.reports import is_quiet, show
from freqprune.tagging import Progress, rounds
from freqprune.training import CIFAR10Data, ImageData, ImageFolderData

log = logging.getLogger(__name__)


def quiet() -> None:
    """Silence remarks of Lightning that do not apply here; its real warnings stay."""
    for logger in (
        "pytorch_lightning.utilities.rank_zero",
        "lightning.pytorch.utilities.rank_zero",
        "lightning_fabric.utilities.distributed",
        "onnx_ir",
        "onnxscript",
        "matplotlib.font_manager",
    ):
        logging.getLogger(logger).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*The number of training batches .* is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    # Every process measures its network on all test images; what is read off the tags is the same in all.
    warnings.filterwarnings(
        "ignore", ".*It is recommended to use `self.log.'(test|important|tagging)/.*sync_dist=True.*"
    )
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    # Resuming into a new run folder: the best checkpoint is then looked for among the epochs to come.
    warnings.filterwarnings("ignore", ".*The dirpath has changed from.*")
    # The parts of a job are one run of W&B.
    warnings.filterwarnings("ignore", ".*There is a wandb run already in progress.*")


def bars() -> Progress | None:
    """Bars for work that takes its time, unless the terminal is to be quiet; of several processes the first has
    them."""
    return None if is_quiet() or rank_and_size()[0] else rounds


def prepare_output(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        # Of several processes each tries.
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"output_dir = {out} cannot be written to ({error.strerror}); choose another with hydra.run.dir=FOLDER"
        ) from None
    return out


def seed(common: Common) -> None:
    """Start all generators from the seed, and set how exact matrix products are."""
    pl.seed_everything(common.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(common.matmul_precision)


def model_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the network is built from; without the name of the network that is trained where none is given."""
    return {key: value for key, value in model.items() if key != "fallback"}


def model_config(model: Mapping[str, Any]) -> dict[str, Any]:
    config = model_settings(model)
    if config["name"] is None:
        config = {"name": model["fallback"]}
        show(f"no ckpt given: training a dense {config['name']} first")
    build_model(config)
    return config


def stored_network(config: Mapping[str, Any], ckpt: str | None, pretrained: bool | str) -> Stored:
    """The trained network that a job begins with: of a library, of the package or from a file."""
    if trained(config):
        net = build_model(config).eval()
        found = preprocessing(config)
        normalization = {} if found is None else {"mean": list(found.mean), "std": list(found.std)}
        return Stored(net, rebuilt_from(config, net), normalization)
    if pretrained:
        path = pretrained_path() if pretrained is True else pretrained_path(pretrained)
    else:
        path = Path(ckpt or "")
    return load_network(path, None if config["name"] is None else config)


def warn_of_seen_images(pretrained: bool | str, data: ImageData) -> None:
    """Say so where a network of the package was trained on images that are held out for validation."""
    name = DEFAULT if pretrained is True else pretrained
    if not name or not data.validates or tuple(data.classes) != CIFAR10_CLASSES:
        return
    unseen = {key: round(1 - card.n_train / CIFAR10_TRAIN, 6) for key, card in cards().items()}
    # The split that it was trained on, or a smaller one by the same seed, of images in the same order.
    same = data.split_seed == 0 and isinstance(data, CIFAR10Data | ImageFolderData)
    if not same or data.val_fraction > unseen[name]:
        rank_zero_only(log.warning)(
            "%s was trained on images that are held out for validation here, whose accuracy is nothing to choose by; "
            "for that take pretrained=%s with data=cifar10 or image_folder, data.val_fraction=%g, data.split_seed=0",
            name, HELD_OUT, unseen[HELD_OUT],
        )  # fmt: skip


def data_settings(settings: Settings) -> dict[str, Any]:
    """Settings of the data, with what the network's trained weights take where nothing else is set."""
    return {**settings.data, **settings_of_weights(settings)}


def settings_of_weights(settings: Settings) -> dict[str, Any]:
    """Settings of the data that the network's trained weights bring, which a checkpoint does not know of."""
    found = preprocessing(model_settings(settings.model))
    if found is None:
        return {}
    given = settings.data
    own = {key: value for key, value in asdict(found).items() if key in given and given[key] is None}
    # Each of these pairs is set as a whole, or left.
    for pair in ({"mean", "std"}, {"image_size", "resize"}):
        if not pair <= own.keys():
            own = {key: value for key, value in own.items() if key not in pair}
    return own


def with_classes(config: Mapping[str, Any], data: ImageData) -> dict[str, Any]:
    given = config.get("num_classes")
    if given is None and trained(config):
        known = rebuilt_from(config, build_model(config)).get("num_classes")
        if known is None:
            # One of the user's own, which has an argument of that name.
            return {**config, "num_classes": len(data.classes)}
        if known != len(data.classes):
            raise InputError(
                f"the weights of {config['name']} tell {known} classes apart, the data have {len(data.classes)}; ask "
                f"for a new last layer with model.num_classes={len(data.classes)}"
            )
        return dict(config)
    if given is not None and given != len(data.classes):
        raise InputError(f"model.num_classes = {given}, but the data have {len(data.classes)} classes; leave it out")
    return {**config, "num_classes": len(data.classes)}


def load_data(settings: Mapping[str, Any]) -> ImageData:
    try:
        data = instantiate(settings, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    if not isinstance(data, ImageData):
        raise InputError(f"data._target_ must be a freqprune.training.ImageData, got {type(data).__name__}")
    data.setup()
    if not data.validates:
        rank_zero_only(log.warning)(
            "data.val_fraction=0: all training images are trained on; there is no validation accuracy and no best.ckpt,"
            " and filters are tagged on training images"
        )
    return data


def normalization_of(data: ImageData) -> dict[str, list[float]]:
    assert data.mean is not None
    assert data.std is not None
    return {"mean": data.mean, "std": data.std}


def check_match(net: nn.Module, data: ImageData, stored: Stored) -> None:
    """Raise InputError for data that are not those of a network, with all that differs; warn where classes have other
    names.

    Args:
        net: the network.
        data: its images.
        stored: what its file says of it.
    """
    wrong: list[str] = []
    classes, failed = config_of(net).get("num_classes"), None
    try:
        # Its last layer may be another than its config says.
        classes = _n_answers(net, data.normalize(data.pixels("val", 1)).to(device_of(net)))
    except InputError as error:
        # That it does not run may be for what is told here.
        failed = error
    if classes is not None and classes != len(data.classes):
        wrong.append(
            f"the network tells {classes} classes apart, the data have {len(data.classes)}; use the data it was "
            f"trained on (data=...), or a part of them with data.n_classes={classes} and folders named by the number "
            "of their class"
        )
    for name, value in stored.normalization.items():
        here = getattr(data, name)
        if len(value) != len(here):
            wrong.append(
                f"the network was trained with {name} {value}, one value a channel, and the data have {len(here)} "
                "channels; use the data it was trained on (data=...)"
            )
            break
        if max(abs(a - b) for a, b in zip(value, here, strict=True)) > 1e-3:
            pair = " ".join(
                f"data.{key}={[round(v, 4) for v in values]}".replace(" ", "")
                for key, values in stored.normalization.items()
            )
            wrong.append(
                f"the network was trained with {name} {value}, the data are normalised with {here}; use {pair}"
            )
            break
    if wrong:
        raise InputError("; ".join(wrong))
    other = [pair for pair in zip(stored.classes, data.classes, strict=False) if pair[0] != pair[1]]
    if other:
        rank_zero_only(log.warning)(
            "%d of %d classes have other names than the network was trained with, the first is %r there and %r in the "
            "data: accuracies are wrong unless they mean the same in the same order",
            len(other), len(data.classes), *other[0],
        )  # fmt: skip
    if other_size := stored.other_size(*data.split("val").pixels.shape[-2:]):
        rank_zero_only(log.warning)(
            f"{other_size}: unless that is meant, prepare them as in its training (data, data.image_size)"
        )
    if failed is not None:
        raise failed


def _n_answers(net: nn.Module, example: Tensor) -> int:
    """Classes that a network answers for; InputError if it does not, see `check_answers`."""
    check_answers(net, example)
    with evaluating(net), torch.no_grad():
        answer = first(net(example))
    if answer.dim() != 2:
        raise InputError(
            f"{type(net).__name__} must return logits, (n_images, n_classes), got {tuple(answer.shape)}: register a "
            "network around it whose forward does"
        )
    return int(answer.shape[1])


def check_classes(net: nn.Module, data: ImageData, example: Tensor) -> None:
    """Raise InputError for a network to train that answers for another number of classes than the data have."""
    n_classes, answers = len(data.classes), _n_answers(net, example)
    if answers != n_classes:
        raise InputError(
            f"the network answers for {answers} classes, the data have {n_classes}: what its name was registered with "
            f"is called with num_classes={n_classes}, and has to heed that"
        )


def check_sizes(net: nn.Module, data: ImageData, example: Tensor, epochs: int | None) -> None:
    """Run a network on images as they are and in every size that is trained on in so many epochs.

    Raises:
        InputError: if it does not run on one of them.
    """
    check_answers(net, example)
    resizing = data.progressive_resizing
    if resizing is None or epochs is None or epochs < 1:
        return
    whole = data.training_size()
    for sides in sorted({resizing.sides(epoch, epochs, *whole) for epoch in range(epochs)}):
        try:
            check_answers(net, nn.functional.interpolate(example, size=sides))
        except InputError as error:
            raise InputError(
                f"data.progressive_resizing has images of {' x '.join(map(str, sides))} on the way: {error}; raise "
                "size_increment to what the network's sides have to be multiples of, or initial_scale, or leave "
                "progressive_resizing out for networks of one size"
            ) from error
