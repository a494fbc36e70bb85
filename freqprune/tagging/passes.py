"""One way of showing images to a network, and the averages of what its layers answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from freqprune.errors import InputError
from freqprune.tagging.averages import Average
from freqprune.tagging.recording import Recorder
from freqprune.tagging.stimulus import Stimulus

TOGETHER = ""


def drawn(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Noise for frames of images, ``(n_images, *shape)``, frame by frame on the CPU: the same numbers for every size of
    batches and device."""
    # Threads are in no inference mode, whatever this one is in.
    with torch.inference_mode(False):
        noise = torch.empty(len(generators), *shape)

    def draw(generator: torch.Generator, frames: Tensor) -> None:
        for frame in frames:
            torch.randn(frame.shape, generator=generator, out=frame)

    # Each image has numbers of its own, and an accelerator would wait for one core.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, generators, noise))
    return noise


class Pass:
    """One way of showing the images: which frames, with how much noise, and the averages that come of it."""

    def __init__(
        self,
        layers: Sequence[str],
        which: Tensor,
        transform: Tensor,
        noise_std: float,
        stimulus: Stimulus,
        average: str,
        precision: torch.dtype,
    ) -> None:
        self.which, self.noise_std, self.stimulus = which, noise_std, stimulus
        # Two real products: complex times real would first copy the time courses into complex numbers.
        self.transform = torch.view_as_real(transform).flatten(1)
        bins = [c.bin for c in stimulus.components]
        self.widths: dict[str, int] = {}
        self.averages = {
            name: Average(bins, average, precision, with_power=noise_std > 0) for name in (TOGETHER, *layers)
        }

    def run(
        self,
        recorder: Recorder,
        images: Tensor,
        prepare: Callable[[Tensor], Tensor],
        limit: int,
        seed: int,
        numbers: Sequence[int],
    ) -> None:
        """Show a batch of images and add their spectra to the averages."""
        pieces: dict[str, list[Tensor]] = {}
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + n) for n in numbers] if self.noise_std else []
        for some in self.which.split(max(1, limit // len(images))):
            frames = self.stimulus.frames(images, some)
            if generators:
                frames = frames + self.noise_std * drawn(generators, frames.shape[1:]).to(frames)
            for layer, response in recorder(prepare(frames.flatten(0, 1))).items():
                pieces.setdefault(layer, []).append(response.unflatten(0, (len(images), len(some))))
        courses = {layer: torch.cat(pieces.pop(layer), dim=1) for layer in list(pieces)}
        for layer, course in courses.items():
            if not torch.isfinite(course).all():
                raise InputError(
                    f"layer {layer!r} answers with NaN or infinite values; check the weights and the normalisation"
                )
        if all(course.dim() == 3 for course in courses.values()):
            # One transform for the filters of all layers: many small ones cost more than they compute.
            self.widths = {layer: course.shape[2] for layer, course in courses.items()}
            self.averages[TOGETHER].update(self._spectra(torch.cat(list(courses.values()), dim=2)))
            return
        for layer, course in courses.items():
            # Image by image where positions are kept: their spectra are large.
            for image in course.split(1):
                self.averages[layer].update(self._spectra(image))

    def of(self, layer: str) -> Average:
        """The averages of one layer."""
        if not self.widths:
            return self.averages[layer]
        names = list(self.widths)
        start = sum(self.widths[name] for name in names[: names.index(layer)])
        return self.averages[TOGETHER].part(slice(start, start + self.widths[layer]))

    def _spectra(self, course: Tensor) -> Tensor:
        """Time courses ``(n_images, n_frames, ...)`` to complex spectra ``(n_images, ..., n_freqs)``."""
        # Apple's accelerator has no float64.
        course = course.cpu() if course.device.type == "mps" else course
        self.transform = self.transform.to(course.device)
        return torch.view_as_complex((course.movedim(1, -1).double() @ self.transform).unflatten(-1, (-1, 2)))

    def add_shares(self, device: torch.device) -> int:
        """Add up the sums of all processes of the group; returns the number of images of all of them."""
        import torch.distributed as dist

        if not dist.is_initialized():
            raise InputError(
                "share=True adds up over a torch.distributed group, but none is initialised; use share=False in a "
                "single process"
            )
        for average in self.averages.values():
            count = torch.tensor(average.n_images, device=device)
            dist.all_reduce(count)
            average.n_images = int(count)
            for name in average.sums:
                total = average.sums[name].contiguous()
                dist.all_reduce(torch.view_as_real(total) if total.is_complex() else total)
                average.sums[name] = total
        return max(average.n_images for average in self.averages.values())
