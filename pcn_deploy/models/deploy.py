"""The deploy form: exact rewrites that leave less to quantise and less to execute.

Each rewrite changes the modules it knows, in place, and returns how many it changed; `to_deploy` applies all of them
to a copy. Products of weights are formed in float64 and stored in the dtype of the weights.

Source of the algebra: arXiv 2112.13692 (LayerScale, aggregation); softmax is invariant to a constant added to all
logits, and its weights sum to one, hence biases of keys vanish and biases of values pass through. Bilinear
interpolation is linear and its weights sum to one, so a BatchNorm after it may move before it.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel

from pcn_deploy.graph.diagnosis import obstacle
from pcn_deploy.models.aggregation import Aggregation, AttentionPool2d, TokenBlock
from pcn_deploy.models.attention_conv import AttentionAugmentedConv2d, RelativeSelfAttention2d
from pcn_deploy.models.patchconvnet import PatchConvNet, TrunkBlock
from pcn_deploy.models.reparametrization import fuse_reparametrizations
from pcn_deploy.parity import least_sqnr_db

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


def fold_layer_scale(model: nn.Module) -> int:
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


def fold_attention_scale(model: nn.Module) -> int:
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


def absorb_key_value(model: nn.Module) -> int:
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


class FlowTracer(fx.Tracer):
    """Traces the data flow between modules; does not look into attention, whose code depends on shapes."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        ours = isinstance(module, AttentionAugmentedConv2d | RelativeSelfAttention2d | TokenBlock)
        return ours or super().is_leaf_module(module, qualified_name)


def _traced_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of (module, module) where the second is the only reader of the first, each called once."""
    try:
        graph = FlowTracer().trace(model)
    except Exception as error:
        log.debug("BatchNorm is not folded, the network cannot be traced: %s", error)
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts = Counter(str(node.target) for node in calls)
    for node in calls:
        readers = list(node.users)
        if len(readers) == 1 and readers[0].op == "call_module":
            first, second = str(node.target), str(readers[0].target)
            if counts[first] == counts[second] == 1:
                yield first, second


def fold_batch_norm(model: nn.Module) -> int:
    """Fold each BatchNorm that alone reads a convolution, plain or augmented, into that convolution.

    Pairs are found in the data flow, where the network can be traced symbolically; elsewhere folding is left to the
    engine.
    """
    folded = 0
    for conv_path, norm_path in list(_traced_pairs(model)):
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        # exact types: a subclass may standardise its weights, or end in an activation
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None:
            continue
        if type(conv) is nn.Conv2d and not {"forward", "_conv_forward"} & vars(conv).keys():
            model.set_submodule(conv_path, fuse_conv_bn_eval(conv, norm))
        elif isinstance(conv, AttentionAugmentedConv2d):
            _fold_into_augmented(conv, norm)
        else:
            continue
        model.set_submodule(norm_path, nn.Identity())
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

REWRITES: tuple[Callable[[nn.Module], int], ...] = (
    fuse_reparametrizations,  # first: what computes a weight hides it from the others
    fold_batch_norm,
    fold_layer_scale,
    fold_attention_scale,
    absorb_key_value,
)


def share_weights(model: nn.Module) -> nn.Module:
    """Copy the modules of a network; the weights stay the same memory until one side is given new ones.

    Returns:
        The copy; its parameters need no gradient.

    Raises:
        ModelError: If it holds what cannot be copied.
    """
    memo: dict[int, object] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    memo.update(
        (id(parameter), nn.Parameter(parameter.detach(), requires_grad=False)) for parameter in model.parameters()
    )
    for module in model.modules():  # what was computed from parameters cannot be copied with its history
        memo.update((id(value), value.detach()) for value in _computed(vars(module)))
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the copying of the network's attributes raises
        reason = f"an attribute cannot be copied ({type(error).__name__}: {error})."
        advice = "make locks, files and the like where they are needed, not in the network; keep tensors in buffers."
        msg = "The network cannot be compiled"
        raise obstacle(msg, None, reason, advice) from error


def _computed(value: Any) -> Iterator[Tensor]:
    """The tensors in an attribute that were computed from parameters, in containers too."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _computed(item)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of wrappers that add nothing to it: `torch.compile`, data parallelism, averaged weights."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        inner: Any = model.module if isinstance(model, wrappers) else model._orig_mod
        model = inner
    return model


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


def to_deploy(model: nn.Module, images: Tensor | None = None) -> tuple[nn.Module, dict[str, int]]:
    """Apply every rewrite to a copy of the network, which shares the weights that no rewrite changed.

    Args:
        model: Network in evaluation mode; left as it is.
        images: float32 `(N, C, H, W)`; with them, a rewrite after which the network computes something else on them is
            left out. A network may look at its own modules, as in `isinstance(layer, nn.BatchNorm2d)`.

    Returns:
        The deploy form, without gradients, and how often each rewrite applied.
    """
    deployed, applied = _rewritten(model, REWRITES)
    if images is None or _computes_the_same(model, deployed, images):
        return deployed, applied
    kept: list[Callable[[nn.Module], int]] = []
    for rewrite in REWRITES:
        if _computes_the_same(model, _rewritten(model, (*kept, rewrite))[0], images):
            kept.append(rewrite)
        else:
            log.info("%s is left out: with it, the network computes something else.", rewrite.__name__)
    deployed, applied = _rewritten(model, tuple(kept))
    return deployed, {rewrite.__name__: applied.get(rewrite.__name__, 0) for rewrite in REWRITES}


def _rewritten(model: nn.Module, rewrites: tuple[Callable[[nn.Module], int], ...]) -> tuple[nn.Module, dict[str, int]]:
    deployed = share_weights(model)
    deployed.eval()
    with torch.no_grad():
        return deployed, {rewrite.__name__: rewrite(deployed) for rewrite in rewrites}


def _computes_the_same(model: nn.Module, deployed: nn.Module, images: Tensor) -> bool:
    """Whether a rewritten network agrees with the original; one that cannot run any more does not."""
    with torch.no_grad():
        expected: Tensor = model(images)
        try:
            found: Tensor = deployed(images)
        except Exception as error:  # the network's own code, which may ask its modules for anything
            log.debug("The rewritten network cannot run: %r", error)
            return False
    return not expected.isfinite().all() or least_sqnr_db([expected.numpy()], [found.numpy()]) >= SAME_DB
