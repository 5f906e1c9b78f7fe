"""Multi-head attention whose projections are layers: what `nn.MultiheadAttention` computes in one function."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SeparateAttention(nn.Module):
    """`nn.MultiheadAttention` in evaluation, with its projections as the layers q_proj, k_proj, v_proj and out_proj.

    Args:
        query, key, value, out: Weight and bias of each projection; weights `(E, E_in)`, biases `(E,)` or None.
        heads: Number of heads.
        batch_first: Whether tensors are `(N, L, E)`, not `(L, N, E)`.
        extra_key, extra_value: `bias_k` and `bias_v`, `(1, 1, E)`: one more position for all queries.
        zero_position: Whether there is one more position of zeros.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.2; argument names are torch's.
    """

    extra_key: Tensor | None
    extra_value: Tensor | None

    def __init__(
        self,
        query: tuple[Tensor, Tensor | None],
        key: tuple[Tensor, Tensor | None],
        value: tuple[Tensor, Tensor | None],
        out: tuple[Tensor, Tensor | None],
        heads: int,
        *,
        batch_first: bool,
        extra_key: Tensor | None = None,
        extra_value: Tensor | None = None,
        zero_position: bool = False,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj = linear_of(*query), linear_of(*key)
        self.v_proj, self.out_proj = linear_of(*value), linear_of(*out)
        self.embed_dim, self.num_heads, self.head_dim = len(query[0]), heads, len(query[0]) // heads
        self.batch_first, self.zero_position = batch_first, zero_position
        for name, tensor in (("extra_key", extra_key), ("extra_value", extra_value)):
            parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, parameter)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; `is_causal` is a hint on the mask, which counts."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        extra_key, extra_value = self.extra_key, self.extra_value
        if extra_key is not None and extra_value is not None:
            k = torch.cat([k, extra_key.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, extra_value.expand(v.shape[0], -1, -1)], 1)
        if self.zero_position:
            k, v = F.pad(k, [0, 0, 0, 1]), F.pad(v, [0, 0, 0, 1])
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        weights: Tensor | None = None
        if need_weights:
            logits = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = (logits if mask is None else logits + mask).softmax(-1)
            y = weights @ v
            if average_attn_weights:
                weights = weights.mean(1)
            if not batched:
                weights = weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, weights

    def _heads(self, x: Tensor) -> Tensor:
        """`(N, L, E)` as `(N, heads, L, E / heads)`."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, of_keys: Tensor | None, of_pairs: Tensor | None) -> Tensor | None:
        """Both masks as one term of the logits, `(N or 1, heads or 1, L, S)`; True is where nothing is looked at."""
        mask: Tensor | None = None
        if of_pairs is not None:
            of_pairs = additive(of_pairs, q)
            if of_pairs.dim() == 3 and of_pairs.shape[0] > 1:
                of_pairs = of_pairs.reshape(-1, self.num_heads, of_pairs.shape[1], of_pairs.shape[2])
            elif of_pairs.dim() == 3:
                of_pairs = of_pairs.unsqueeze(0)
            else:
                of_pairs = of_pairs[None, None]
            mask = F.pad(of_pairs, [0, k.shape[1] - of_pairs.shape[3]])
        if of_keys is not None:
            of_keys = additive(of_keys, q)[:, None, None, :]
            of_keys = F.pad(of_keys, [0, k.shape[1] - of_keys.shape[3]])
            mask = of_keys if mask is None else mask + of_keys
        return mask


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` in evaluation, without the road on which it computes all in one function.

    Args:
        layer: The layer whose parts it takes over, with its attention separated.
        activation: The activation between the linear layers.
    """

    def __init__(self, layer: nn.TransformerEncoderLayer, activation: nn.Module) -> None:
        super().__init__()
        self.norm_first = layer.norm_first
        self.self_attn, self.linear1, self.linear2 = layer.self_attn, layer.linear1, layer.linear2
        self.norm1, self.norm2, self.activation = layer.norm1, layer.norm2, activation

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As `nn.TransformerEncoderLayer.forward`."""
        if self.norm_first:
            src = src + self._attend(self.norm1(src), src_mask, src_key_padding_mask)
            return src + self._feed(self.norm2(src))
        src = self.norm1(src + self._attend(src, src_mask, src_key_padding_mask))
        y: Tensor = self.norm2(src + self._feed(src))
        return y

    def _attend(self, x: Tensor, mask: Tensor | None, of_keys: Tensor | None) -> Tensor:
        y: Tensor = self.self_attn(x, x, x, of_keys, False, mask)[0]
        return y

    def _feed(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear2(self.activation(self.linear1(x)))
        return y


class Encoder(nn.Module):
    """`nn.TransformerEncoder` in evaluation: its layers and its norm.

    Args:
        encoder: The encoder whose parts it takes over.
    """

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers = encoder.layers
        self.norm = nn.Identity() if encoder.norm is None else encoder.norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As `nn.TransformerEncoder.forward`."""
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask)
        y: Tensor = self.norm(src)
        return y


def plain_encoder(module: nn.Module) -> nn.Module | None:
    """What stands for one of torch's encoders or their layers; None for other modules, and for activations unknown."""
    if type(module) is nn.TransformerEncoder:
        return Encoder(module)
    if type(module) is not nn.TransformerEncoderLayer:
        return None
    function: Any = module.activation
    activation = function if isinstance(function, nn.Module) else {F.relu: nn.ReLU(), F.gelu: nn.GELU()}.get(function)
    return None if activation is None else EncoderLayer(module, activation)


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of truth values as one of 0 and minus infinity."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these tensors; a parameter stays the parameter that it is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = as_parameter(weight)
    layer.bias = None if bias is None else as_parameter(bias)  # type: ignore[assignment] # None is what torch takes
    return layer.eval()


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor as a parameter without gradient; itself if it is one."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def separate_attention(attention: nn.MultiheadAttention) -> SeparateAttention:
    """The same attention with its projections as layers."""
    packed: Any = attention.in_proj_weight
    weights = (
        (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        if packed is None
        else packed.chunk(3)
    )
    bias: Any = attention.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    query, key, value = zip(weights, biases, strict=True)
    return SeparateAttention(
        query,
        key,
        value,
        (attention.out_proj.weight, attention.out_proj.bias),
        attention.num_heads,
        batch_first=attention.batch_first,
        extra_key=attention.bias_k,
        extra_value=attention.bias_v,
        zero_position=attention.add_zero_attn,
    )
