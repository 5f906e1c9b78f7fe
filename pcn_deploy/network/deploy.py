"""The deploy form: exact rewrites that leave less to quantise and less to execute.

Each rewrite changes the modules it knows, in place, and returns how many it changed; `to_deploy` applies all of them
to a copy. Products of weights are formed in float64 and stored in the dtype of the weights.

Source of the algebra: arXiv 2112.13692 (LayerScale, aggregation); softmax is invariant to a constant added to all
logits, and its weights sum to one, hence biases of keys vanish and biases of values pass through. Bilinear
interpolation is linear and its weights sum to one, so a BatchNorm after it may move before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pcn_deploy.models.aggregation import Aggregation, AttentionPool2d, TokenBlock
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d, RelativeSelfAttention2d
from pcn_deploy.models.patchconvnet import PatchConvNet, TrunkBlock
from pcn_deploy.models.wrappers import unwrapped
from pcn_deploy.network.additions import separate_additions
from pcn_deploy.network.dataflow import DataFlow, is_plain_layer
from pcn_deploy.network.lifting import become, lift_products
from pcn_deploy.network.outputs import as_tuple
from pcn_deploy.network.reparametrization import fuse_reparametrizations
from pcn_deploy.network.sharing import share_weights
from pcn_deploy.tasks.distance import least_sqnr_db

log = logging.getLogger(__name__)


class AbsorbedAggregation(nn.Module):
    """`Aggregation` whose queries are constants: keys are absorbed into them, values into the output projection.

    Args:
        query: One row per class token, `(T, C)`: the attention logit of a patch is its product with the patch.
        weight: Value projection followed by the output projection, `(C, C)`.
        bias: Bias of both, `(C,)`.
        attend_token: Whether the tokens themselves are keys too.
        project_first: Project the patches before the weighted sum (cheaper when there are more tokens than patches).
    """

    def __init__(self, query: Tensor, weight: Tensor, bias: Tensor, *, attend_token: bool, project_first: bool) -> None:
        super().__init__()
        self.attend_token = attend_token
        self.project_first = project_first
        self.query = nn.Parameter(query, requires_grad=False)
        self.value = nn.Linear(weight.shape[1], weight.shape[0], bias=not project_first, device="meta")
        self.value.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        if not project_first:
            self.value.bias = self.bias

    def forward(self, tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """As `Aggregation.forward`; the weights do not depend on the batch's tokens, which are constants."""
        keys = torch.cat((tokens, patches), 1) if self.attend_token else patches
        weights = (self.query @ keys.transpose(1, 2)).softmax(-1)
        if self.project_first:
            return weights @ self.value(keys) + self.bias, weights
        return self.value(weights @ keys), weights


def _scale_rows(layer: nn.Conv2d | nn.Linear, gamma: Tensor) -> None:
    """Multiply the outputs of `layer` by `gamma`, `(C_out,)`."""
    layer.weight.data = layer.weight * gamma.reshape(-1, *[1] * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias.data = layer.bias * gamma


def fold_layer_scale(model: nn.Module, _images: Tensor | None = None) -> int:
    """Fold LayerScale into the layer before it: the last 1x1 of a trunk block, `attn.proj` and `mlp.fc2`."""
    folded = 0
    for module in model.modules():
        sites: list[tuple[str, nn.Module]] = []
        if isinstance(module, TrunkBlock):
            sites = [("gamma_1", module.attn.qkv_pos[-1])]
        elif isinstance(module, TokenBlock) and isinstance(module.attn, Aggregation):
            sites = [("gamma_1", module.attn.proj), ("gamma_2", module.mlp.fc2)]
        for name, layer in sites:
            gamma = getattr(module, name)
            if gamma is not None and isinstance(layer, nn.Conv2d | nn.Linear):
                _scale_rows(layer, gamma)
                module.register_parameter(name, None)
                folded += 1
    return folded


def fold_attention_scale(model: nn.Module, _images: Tensor | None = None) -> int:
    """Fold the factor 1 / sqrt(D) of the attention logits into the query projection."""
    folded = 0
    for module in model.modules():
        if isinstance(module, Aggregation) and module.scale != 1.0:
            _scale_rows(module.q, torch.full_like(module.q.bias, module.scale))
        elif isinstance(module, RelativeSelfAttention2d) and module.scale != 1.0:
            factors = torch.ones(module.conv_qkv.out_channels)
            start = module.dk if module.keys_first else 0
            factors[start : start + module.dk] = module.scale
            _scale_rows(module.conv_qkv, factors)
        else:
            continue
        module.scale = 1.0
        folded += 1
    return folded


def absorb_key_value(model: nn.Module, _images: Tensor | None = None) -> int:
    """Replace the aggregation by one whose query, key, value and output projections are merged.

    The queries are made from the class tokens alone, which are parameters, so they are constants:
    `q.(Wk x + bk) = (Wk^T q).x + const`, and the constant cancels in the softmax. As the weights sum to one,
    `Wp (sum_i a_i (Wv x_i + bv)) + bp = (Wp Wv) (sum_i a_i x_i) + (Wp bv + bp)`.
    """
    absorbed = 0
    for network in model.modules():
        if isinstance(network, PatchConvNet):
            block: nn.Module = network.blocks_token_only[0]
        elif isinstance(network, AttentionPool2d):
            block = network.block
        else:
            continue
        attn = block.attn
        if not isinstance(block, TokenBlock) or not isinstance(attn, Aggregation):
            continue
        query = attn.q(block.norm1(network.cls_token))[0].double() * attn.scale
        value, proj = attn.v, attn.proj
        dtype = proj.weight.dtype
        block.attn = AbsorbedAggregation(
            (query @ attn.k.weight.double()).to(dtype),
            (proj.weight.double() @ value.weight.double()).to(dtype),
            (proj.weight.double() @ value.bias.double() + proj.bias.double()).to(dtype),
            attend_token=attn.attend_token,
            project_first=network.cls_token.shape[1] > 1,
        )
        absorbed += 1
    return absorbed


def _pairs(model: nn.Module, images: Tensor) -> Iterator[tuple[str, str]]:
    """Names of (layer, BatchNorm2d) where the second alone reads the first, each called once."""
    flow = DataFlow(model, images[:1].clone())
    for path, calls in flow.calls.items():
        # exact type: a subclass may end in an activation
        if len(calls) > 1 or type(model.get_submodule(path)) is not nn.BatchNorm2d or len(calls[0].inputs) != 1:
            continue
        read = calls[0].inputs[0]
        alone = set(read.readers) == {path} and read not in flow.results
        made = flow.calls.get(read.maker, [])
        if alone and len(made) == 1 and made[0].output is read:
            yield read.maker, path


def fold_batch_norm(model: nn.Module, images: Tensor) -> int:
    """Fold each BatchNorm that alone reads a convolution, plain or augmented, into that convolution."""
    folded = 0
    for conv_path, norm_path in list(_pairs(model, images)):
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        if is_plain_layer(conv) and isinstance(conv, nn.Conv2d):
            become(conv, fuse_conv_bn_eval(conv, norm))
        elif isinstance(conv, AttentionAugmentedConv2d):
            _fold_into_augmented(conv, norm)
        else:
            continue
        become(norm, nn.Identity().eval())
        folded += 1
    return folded


def _fold_into_augmented(conv: AttentionAugmentedConv2d, norm: nn.BatchNorm2d) -> None:
    """Fold a BatchNorm into the last convolutions of both branches, each with its share of the channels."""
    split = conv.conv_out.out_channels
    conv.conv_out = fuse_conv_bn_eval(conv.conv_out, _channels_of(norm, slice(None, split)))
    conv.attention.attn_out = fuse_conv_bn_eval(conv.attention.attn_out, _channels_of(norm, slice(split, None)))


def _channels_of(norm: nn.BatchNorm2d, part: slice) -> nn.BatchNorm2d:
    """Some channels of a BatchNorm."""
    chosen = nn.BatchNorm2d(len(range(norm.num_features)[part]), norm.eps, affine=norm.affine).eval()
    for name, tensor in norm.state_dict(keep_vars=True).items():
        if tensor.ndim:
            getattr(chosen, name).data = tensor.data[part]
    return chosen


SAME_DB = 60.0
"""Least SQNR of the deploy form: each rewrite is exact but for the rounding of float32, which leaves 100 dB and more in
the networks of this package."""

Rewrite = Callable[[nn.Module, Tensor], int]

REWRITES: tuple[Rewrite, ...] = (
    fuse_reparametrizations,  # first: what computes a weight hides it from the others
    lift_products,  # a convolution that is no layer has no BatchNorm to be folded
    fold_batch_norm,
    separate_additions,  # what a residual branch ends in is seen when its BatchNorm is folded
    fold_layer_scale,
    fold_attention_scale,
    absorb_key_value,
)


def simplify(model: nn.Module) -> None:
    """Take away, in place, what training put into a network and evaluation does not need.

    Parts in a wrapper that computes nothing are unwrapped; SyncBatchNorm becomes BatchNorm2d, as it is in evaluation.
    """
    for path, module in list(model.named_modules()):
        vars(module).pop("_compiled_call_impl", None)  # TorchScript refuses a module that has it, even if it is None
        if path and unwrapped(module) is not module:
            model.set_submodule(path, unwrapped(module))
        if type(module) is nn.SyncBatchNorm:
            del module.process_group
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]


def to_deploy(model: nn.Module, images: Tensor) -> tuple[nn.Module, dict[str, int]]:
    """Apply every rewrite to a copy of the network, which shares the weights that no rewrite changed.

    Args:
        model: Network in evaluation mode; left as it is.
        images: float32 `(N, C, H, W)`, on which its data flow is looked at. A rewrite after which the network computes
            something else on them is left out: a network may look at its own modules, as in
            `isinstance(layer, nn.BatchNorm2d)`.

    Returns:
        The deploy form, without gradients, and how often each rewrite applied.
    """
    with torch.no_grad():
        expected = as_tuple(model(images.clone()))
    whole = _rewritten(model, REWRITES, images, expected)
    if whole is not None:
        return whole
    kept: list[Rewrite] = []
    deployed = share_weights(model)
    deployed.eval()
    applied = {rewrite.__name__: 0 for rewrite in REWRITES}
    for rewrite in REWRITES:
        with_it = _rewritten(model, (*kept, rewrite), images, expected)
        if with_it is None:
            log.info("%s is left out: with it, the network computes something else.", rewrite.__name__)
        else:
            kept.append(rewrite)
            deployed, applied = with_it[0], applied | with_it[1]
    return deployed, applied


def _rewritten(
    model: nn.Module, rewrites: tuple[Rewrite, ...], images: Tensor, expected: tuple[Tensor, ...]
) -> tuple[nn.Module, dict[str, int]] | None:
    """A rewritten copy, and how often each rewrite applied; None if it computes something else, or cannot run."""
    deployed = share_weights(model)
    deployed.eval()
    try:
        with torch.no_grad():
            applied = {rewrite.__name__: rewrite(deployed, images) for rewrite in rewrites}
            rewritten = as_tuple(deployed(images.clone()))
    except Exception as error:  # the network's own code, which may ask its modules for anything
        log.debug("The rewritten network cannot run: %r", error)
        return None
    finite = all(output.isfinite().all() for output in expected)
    pair = ([output.numpy() for output in outputs] for outputs in (expected, rewritten))
    same = not finite or least_sqnr_db(*pair) >= SAME_DB
    return (deployed, applied) if same else None
