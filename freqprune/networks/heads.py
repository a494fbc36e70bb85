"""Attention heads: the modules that hold them, and what a module without some of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freqprune.errors import InputError

# What modules call the number of their heads, and the width of all of them together.
_NUMBERS, _WIDTHS = ("num_heads", "n_heads"), ("attn_dim", "all_head_dim")
# Parameters of torch.nn.MultiheadAttention and what they are here.
_NAMES = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias",
          "out_proj.weight": "proj.weight", "out_proj.bias": "proj.bias"}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """The heads of a module that makes queries, keys and values by one linear layer.

    Attributes:
        module: name of the module.
        qkv: name of that layer: all queries, then all keys, then all values, head after head in each.
        proj: name of the layer that reads the heads, one after the other.
        n_heads: number of heads.
        size: values of one head.
    """

    module: str
    qkv: str
    proj: str
    n_heads: int
    size: int

    def rows(self, heads: Sequence[int]) -> list[int]:
        """Outputs of `qkv` that make some heads."""
        width = self.n_heads * self.size
        return [part * width + column for part in range(3) for column in self.columns(heads)]

    def columns(self, heads: Sequence[int]) -> list[int]:
        """Inputs of `proj` that some heads write."""
        return [head * self.size + i for head in heads for i in range(self.size)]


def find_heads(model: nn.Module) -> dict[str, Heads]:
    """The modules of a network that look as if they held heads, by the name of their `qkv`: they count heads, and two
    of their layers have the shapes for it.

    Whether their forward can do with fewer heads is not asked here.
    """
    found = {}
    for name, module in model.named_modules():
        n_heads = next((getattr(module, key) for key in _NUMBERS if isinstance(getattr(module, key, None), int)), 0)
        layers = [(child, layer) for child, layer in module.named_children() if isinstance(layer, nn.Linear)]
        pairs = [
            (qkv, proj, width)
            for qkv, made in layers
            for proj, width in ((child, layer.in_features) for child, layer in layers)
            if n_heads > 0 and width % n_heads == 0 and made.out_features == 3 * width and qkv != proj
        ]
        if len(pairs) == 1:
            at = f"{name}." if name else ""
            qkv, proj, width = pairs[0]
            found[f"{at}{qkv}"] = Heads(name, f"{at}{qkv}", f"{at}{proj}", n_heads, width // n_heads)
    return found


def keep_heads(module: nn.Module, heads: Heads, keep: Sequence[int]) -> None:
    """Let a module count only some of its heads, and keep the parameters and buffers of these, in place; its linear
    layers are left."""
    width = heads.n_heads * heads.size
    for key, value in list(vars(module).items()):
        if key in _NUMBERS and value == heads.n_heads:
            setattr(module, key, len(keep))
        elif key in _WIDTHS and value == width:
            setattr(module, key, len(keep) * heads.size)
    own: list[tuple[str, Any]] = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for key, value in own:
        sides = [side for side, length in enumerate(value.shape) if length == heads.n_heads]
        if len(sides) != 1:
            continue
        kept = value.detach().index_select(sides[0], torch.tensor(list(keep), device=value.device))
        setattr(module, key, nn.Parameter(kept, value.requires_grad) if isinstance(value, nn.Parameter) else kept)


class HeadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` as two linear layers with the attention between them, so that its heads can be read
    and can go: PyTorch's own has no layer that makes queries, keys and values, and ties its heads to its width.

    Computes the same, without the weights of the attention, which it returns as None. Loads state dicts of PyTorch's.

    Args:
        old: the module; its parameters are taken over.
    """

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.batch_first = old.num_heads, old.head_dim, old.batch_first
        self.dropout = old.dropout
        self.qkv = nn.Linear(old.embed_dim, 3 * old.embed_dim, old.in_proj_bias is not None)
        self.proj = nn.Linear(old.embed_dim, old.embed_dim, old.out_proj.bias is not None)
        self.qkv.weight, self.proj.weight = old.in_proj_weight, old.out_proj.weight
        self.qkv.bias, self.proj.bias = old.in_proj_bias, old.out_proj.bias
        self.register_load_state_dict_pre_hook(_rename)
        self.train(old.training)

    # torch.nn.TransformerEncoderLayer asks for these, and by the first takes no way around `forward`.
    _qkv_same_embed_dim = False

    @property
    def in_proj_weight(self) -> Tensor:
        """Weight of `qkv`."""
        return self.qkv.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Bias of `qkv`."""
        return self.qkv.bias

    @staticmethod
    def can_be(old: nn.Module) -> bool:
        """Whether a module is one that this can stand for: queries, keys and values of one width, and no keys of its
        own."""
        return (
            type(old) is nn.MultiheadAttention and old._qkv_same_embed_dim and old.bias_k is None
            and not old.add_zero_attn
        )  # fmt: skip

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As `torch.nn.MultiheadAttention`: ``(n_images, n_tokens, width)`` if `batch_first`.

        Raises:
            InputError: if the weights of the attention are asked for, or for one sequence without a batch.
        """
        if query.dim() != 3:
            raise InputError(
                f"query must be of three dimensions, a batch of sequences, got {tuple(query.shape)}; give one sequence "
                "as a batch of one"
            )
        if need_weights:
            raise InputError(
                "need_weights = True asks for the weights of the attention, which HeadAttention does not make; pass "
                "False, or leave torch.nn.MultiheadAttention as it is (without open_heads)"
            )
        if query is key and key is value:
            parts = self.qkv(query).chunk(3, -1)
        else:
            biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
            rows = zip((query, key, value), self.qkv.weight.chunk(3), biases, strict=True)
            parts = tuple(F.linear(x, weight, bias) for x, weight, bias in rows)
        q, k, v = (self._by_head(x) for x in parts)
        dropout = self.dropout if self.training else 0.0
        mask = None if attn_mask is None else _added(attn_mask, q)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q)[:, None, None]
            mask = padding if mask is None else mask + padding
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None)
        x = (x.movedim(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)
        return self.proj(x), None

    def _by_head(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.movedim(2, 1) if self.batch_first else x.permute(1, 2, 0, 3)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of PyTorch's attention, True where it must not look, as what is added before its softmax."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def open_heads(model: nn.Module) -> nn.Module:
    """Replace every `torch.nn.MultiheadAttention` of a network by a `HeadAttention` with the same parameters, in place,
    so that its heads can be tagged and pruned.

    Returns:
        The network.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and HeadAttention.can_be(module):
            model.set_submodule(name, HeadAttention(module))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, HeadAttention) for m in module.modules()):
            # It would hand nested tensors to PyTorch's own, and look for its weights.
            module.enable_nested_tensor = module.use_nested_tensor = False
    return model


def by_new_names(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the parameters of `torch.nn.MultiheadAttention` under the names that they have in the
    `HeadAttention` modules of a network."""
    found = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, HeadAttention):
            _rename(module, found, f"{name}." if name else "")
    return found


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for old, new in _NAMES.items():
        if f"{prefix}{old}" in state:
            state[f"{prefix}{new}"] = state.pop(f"{prefix}{old}")
