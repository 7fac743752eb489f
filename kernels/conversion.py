"""Put an existing model on our kernels: swap its layers, fuse ReLUs, swap back, and say what runs where and why.

A layer is swapped by giving the module object our subclass as its class.  Parameters, buffers, hooks, flags and every
reference to the module thus stay as they are, and so does the object: an optimizer, a shared layer or a list that holds
the layer somewhere outside cannot tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tileconv.kernels import checks, layout, modules, modules_conv, modules_fused, modules_softmax
from tileconv.kernels.fusion import FUSED, POOLS, RELUS, Fusion
from tileconv.kernels.redirect import REDIRECTS

Model = TypeVar("Model", bound=nn.Module)
SWAPS: dict[type[nn.Module], tuple[str, type[nn.Module]]] = {
    nn.Conv2d: ("conv2d", modules.Conv2d),
    nn.Conv1d: ("conv1d", modules_conv.Conv1d),
    nn.ConvTranspose2d: ("conv_transpose2d", modules_conv.ConvTranspose2d),
    nn.Linear: ("linear", modules.Linear),
    nn.MaxPool2d: ("max_pool2d", modules.MaxPool2d),
    nn.MaxUnpool2d: ("max_unpool2d", modules.MaxUnpool2d),
    nn.AdaptiveMaxPool2d: ("adaptive_max_pool2d", modules.AdaptiveMaxPool2d),
    nn.AvgPool2d: ("avg_pool2d", modules.AvgPool2d),
    nn.LPPool2d: ("lp_pool2d", modules.LPPool2d),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", modules.AdaptiveAvgPool2d),
    nn.LocalResponseNorm: ("local_response_norm", modules.LocalResponseNorm),
    nn.ReLU: ("relu", modules.ReLU),
    nn.Dropout: ("dropout", modules.Dropout),
    nn.Softmax: ("softmax", modules_softmax.Softmax),
    nn.LogSoftmax: ("log_softmax", modules_softmax.LogSoftmax),
    nn.CrossEntropyLoss: ("cross_entropy", modules_softmax.CrossEntropyLoss),
    nn.Unfold: ("unfold", modules_conv.Unfold),
    nn.Fold: ("fold", modules_conv.Fold),
}
"""torch.nn's layers, the names of what they do, and ours: every layer of tileconv.kernels.nn that torch.nn has."""
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
OURS = (
    *(ours for _, ours in SWAPS.values()),
    modules.ConvReLU2d, modules.LinearReLU, modules.FusedReLU, modules_fused.ConvReLUMaxPool2d,
    modules_fused.FusedMaxPool2d,
)  # fmt: skip
OPS = (*(op for op, _ in SWAPS.values()), "fuse", "fuse_pool")
ORIGIN = "_tileconv_origin"  # in the __dict__ of a converted module, and so in its copies and pickles


@dataclass(frozen=True)
class Origin:
    """What revert() needs to know of a converted module."""

    type: type[nn.Module]
    channels_last: bool


# -- convert and revert ------------------------------------------------------------------------------------------------


def convert(
    model: Model,
    ops: Collection[str] | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Put the supported layers of `model` on our kernels, in place; returns `model`, also where it is itself a layer.

    Module objects, parameters, buffers, hooks, flags and state_dict keys stay.  Weights of convolutions become
    channels_last, and with them by PyTorch's rule the activations: a model that flattens these with `view` must say
    `flatten` or `reshape`, as for model.to(memory_format=torch.channels_last).  As there, what flattens weights or
    their gradients so refuses them: torch.optim.LBFGS and torch.nn.utils.parameters_to_vector.  torch.jit.trace needs
    torch.no_grad(): it can save no gradients of our kernels.

    ops: what to do, of the functions' names in `OPS` ("conv2d", "linear", "max_pool2d", "relu", ...), "fuse" and
    "fuse_pool"; None is all.  "fuse" makes one kernel of a Conv2d or Linear and the ReLU module, in place or not, that
    alone reads its output; an Identity takes the ReLU's place.  "fuse_pool" makes one layer of such a Conv2d, its ReLU
    and the MaxPool2d that alone reads the ReLU's output, so that training keeps less; Identities take the places of
    both.  The sequences come from torch.fx's symbolic trace of the model or, where it does not trace, of its parts,
    each of which is then taken to call its layers alone.  Layers with hooks are not fused.
    filter_fn: called as filter_fn(name, module) with each layer that would change; False keeps it.

    `explain` tells why a layer stayed.  Raises TypeError or ValueError for arguments of another kind; nothing has
    changed then.
    """
    _check_module("model", model)
    if isinstance(ops, str) or (ops is not None and not isinstance(ops, Collection)):
        raise TypeError(f"ops must be a collection of names, not {ops!r}; names are {', '.join(OPS)}")
    if unknown := [op for op in ops or () if op not in OPS]:
        raise ValueError(f"ops has {unknown[0]!r}: allowed are {', '.join(OPS)}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of (name, module), not {type(filter_fn).__name__}")

    wanted = set(OPS if ops is None else ops)
    names = {module: name for name, module in model.named_modules()}
    wishes = {
        module: _refusal(module) is None and (filter_fn is None or bool(filter_fn(name, module)))
        for module, name in names.items()
        if type(module) in (*SWAPS, *FUSED, *RELUS, *POOLS)
    }
    changes = {
        module: SWAPS[type(module)][1]
        for module, wish in wishes.items()
        if wish and type(module) in SWAPS and SWAPS[type(module)][0] in wanted
    }
    windows: dict[nn.Module, modules_fused.PoolWindow] = {}
    if wanted & {"fuse", "fuse_pool"} and wishes:
        fusion = Fusion(model)
        for layer, activation in fusion.pairs:
            if not wishes.get(layer) or not wishes.get(activation):
                continue
            pool = fusion.pools.get(activation)
            if "fuse_pool" in wanted and pool is not None and wishes.get(pool):
                windows[layer] = modules_fused.PoolWindow.of(pool)
                changes |= {
                    layer: modules_fused.ConvReLUMaxPool2d, activation: modules.FusedReLU,
                    pool: modules_fused.FusedMaxPool2d,
                }  # fmt: skip
            elif "fuse" in wanted:
                changes |= {layer: FUSED[type(layer)], activation: modules.FusedReLU}
    for module, ours in changes.items():
        _swap(module, ours)
    for module, window in windows.items():
        module.__dict__["pool"] = window
    return model


def revert(model: Model) -> Model:
    """Undo convert(), in place: every converted module has its own class and memory format again; returns `model`.

    Layers that were built as tileconv's stay.  Raises ValueError, and changes nothing, if a converted module has got
    another class since, as torch.nn.utils.parametrize gives it.
    """
    _check_module("model", model)
    converted = {name: module for name, module in model.named_modules() if ORIGIN in module.__dict__}
    for name, module in converted.items():
        if type(module) not in OURS:
            raise ValueError(f"{name or 'model'} has become a {type(module).__name__} since convert(): undo that first")
    for module in converted.values():
        origin: Origin = module.__dict__.pop(ORIGIN)
        if isinstance(module, modules.Conv2d) and not origin.channels_last:
            module.lay_out(torch.contiguous_format)
        if origin.type not in OURS:
            module.__dict__.pop("precision", None)
        if isinstance(module, modules_fused.ConvReLUMaxPool2d):
            del module.pool
        module.__class__ = origin.type
    return model


def _swap(module: nn.Module, ours: type[nn.Module]) -> None:
    weight = module.__dict__["_parameters"].get("weight")
    channels_last = weight is not None and weight.dim() == 4 and layout.is_channels_last(weight)
    module.__dict__.setdefault(ORIGIN, Origin(type(module), channels_last))
    module.__class__ = ours
    if isinstance(module, modules.Conv2d):
        module.lay_out(torch.channels_last)


def _refusal(module: nn.Module) -> str | None:
    """Why a layer cannot run on our kernels, if so."""
    kind = type(module)
    if kind not in SWAPS:
        base = next((base for base in SWAPS if isinstance(module, base)), None)
        if isinstance(module, OURS):
            return None
        if base is not None:
            return f"a subclass of torch.nn.{base.__name__}, which may compute something else"
        return f"tileconv has no kernel for {kind.__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode is {module.padding_mode!r}: only 'zeros' has a kernel"
    if isinstance(module, nn.Softmax | nn.LogSoftmax) and module.dim is None:
        return "its dim is None: PyTorch's guess of one is deprecated, and not made here"
    if isinstance(module, WEIGHTED):
        weight = module.weight
        if weight.dtype not in checks.FLOATING:
            return f"its weight is {weight.dtype}: kernels are for {', '.join(map(str, checks.FLOATING))}"
        if weight.layout != torch.strided or 0 in weight.shape:
            return f"its weight is {weight.layout} of shape {tuple(weight.shape)}: allowed is torch.strided, not empty"
    return None


def _check_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, not {type(value).__name__}")


# -- explain -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Where one layer, or one function called in a model's own code, runs."""

    name: str
    type: str
    where: str
    """ "tileconv" or "pytorch"."""
    reason: str


class Table(list[Row]):
    """Rows, readable as text."""

    def __str__(self) -> str:
        lines = [("name", "type", "where", "reason"), *((r.name, r.type, r.where, r.reason) for r in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in lines
        )


def explain(model: nn.Module, *example: Any) -> Table:
    """What runs on our kernels and what on PyTorch's, and why: one row a layer, and `str` of it is a table.

    With an example the model is called once as model(*example), in eval mode and without gradients: layers that this
    does not call are marked, convolutions with a max-pool say whether they ran as one kernel or as two, and calls of
    functions such as F.relu outside any layer have rows of their own.
    """
    _check_module("model", model)
    fusion = Fusion(model)
    called, functions, ways = _run(model, example) if example else (None, {}, {})
    rows = Table()
    for name, module in model.named_modules():
        if module._modules and not module._parameters and not isinstance(module, tuple(SWAPS)):
            continue  # a container
        where, reason = _verdict(name, module, model, fusion)
        if module in ways:
            reason = f"{reason} in {ways[module]}"
        if called is not None and module not in called:
            reason = f"{reason}; not called with this example" if reason else "not called with this example"
        rows.append(Row(name, type(module).__name__, where, reason))
    names = {module: name for name, module in model.named_modules()}
    for (module, function), count in functions.items():
        times = "" if count == 1 else f", {count} times"
        reason = f"a function call{times}: use_kernels() can take it"
        rows.append(Row(names[module], f"F.{function}", "pytorch", reason))
    return rows


def _verdict(name: str, module: nn.Module, model: nn.Module, fusion: Fusion) -> tuple[str, str]:
    refusal = _refusal(module)
    if refusal is not None:
        return "pytorch", refusal
    if type(module) in SWAPS:
        return "pytorch", "convert() would swap it"
    if isinstance(module, modules.FusedReLU | modules_fused.FusedMaxPool2d):
        return "tileconv", "done by the layer before it"
    if isinstance(module, modules_fused.ConvReLUMaxPool2d):
        return "tileconv", "with its ReLU and its max-pool"
    if isinstance(module, modules.ConvReLU2d | modules.LinearReLU):
        return "tileconv", "with its ReLU in one kernel"
    if type(module) in FUSED and (reason := fusion.reason(name, module, model)):
        return "tileconv", reason
    return "tileconv", ""


def _run(
    model: nn.Module, example: tuple[Any, ...]
) -> tuple[set[nn.Module], dict[tuple[nn.Module, str], int], dict[nn.Module, str]]:
    """The modules that a call reaches, the functions that containers call themselves, and how a fused pool runs."""
    inside = set(model.modules())
    called: set[nn.Module] = set()
    stack: list[nn.Module] = []
    functions: Counter[tuple[nn.Module, str]] = Counter()
    ways: dict[nn.Module, str] = {}

    def enter(module: nn.Module, arguments: Any) -> None:
        if module in inside:
            called.add(module)
            stack.append(module)
        if isinstance(module, modules_fused.ConvReLUMaxPool2d):
            ways[module] = module.how_it_runs(*arguments)

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        if module in inside:
            stack.pop()

    class Listen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in REDIRECTS and stack and type(stack[-1]) not in (*SWAPS, *OURS):
                functions[stack[-1], REDIRECTS[func][0]] += 1
            return func(*args, **(kwargs or {}))

    modes = {module: module.training for module in inside}
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        model.eval()  # leaves BatchNorm's statistics and the random state alone
        with torch.no_grad(), Listen():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return called, functions, ways
