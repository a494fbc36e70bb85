"""Data sets in memory and the Lightning data modules over them."""

from freqprune.data.datamodule import CIFAR10Data, DigitsData, ImageData, ImageFolderData
from freqprune.data.sources import Images, Source

__all__ = ["CIFAR10Data", "DigitsData", "ImageData", "ImageFolderData", "Images", "Source"]
