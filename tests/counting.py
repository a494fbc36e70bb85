"""A module whose state is no tensor."""

from torch import nn


class Counts(nn.ReLU):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass
