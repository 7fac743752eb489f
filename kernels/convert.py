"""Put an existing model on our kernels: swap its layers, fuse ReLUs, swap back, and say what runs where and why.

A layer is swapped by giving the module object our subclass as its class.  Parameters, buffers, hooks, flags and every
reference to the module thus stay as they are, and so does the object: an optimizer, a shared layer or a list that holds
the layer somewhere outside cannot tell.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tileconv.kernels import checks, functional, layout, modules

Model = TypeVar("Model", bound=nn.Module)
SWAPS: dict[type[nn.Module], tuple[str, type[nn.Module]]] = {
    nn.Conv2d: ("conv2d", modules.Conv2d),
    nn.Linear: ("linear", modules.Linear),
    nn.MaxPool2d: ("max_pool2d", modules.MaxPool2d),
    nn.ReLU: ("relu", modules.ReLU),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", modules.AdaptiveAvgPool2d),
    nn.Dropout: ("dropout", modules.Dropout),
}
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: modules.ConvReLU2d,
    modules.Conv2d: modules.ConvReLU2d,
    nn.Linear: modules.LinearReLU,
    modules.Linear: modules.LinearReLU,
}
RELUS = (nn.ReLU, modules.ReLU)
OURS = (*(ours for _, ours in SWAPS.values()), modules.ConvReLU2d, modules.LinearReLU, modules.FusedReLU)
OPS = (*(op for op, _ in SWAPS.values()), "fuse")
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
    `flatten` or `reshape`, as for model.to(memory_format=torch.channels_last).

    ops: what to do, of "conv2d", "linear", "max_pool2d", "relu", "adaptive_avg_pool2d", "dropout" and "fuse"; None is
    all.  "fuse" makes one kernel of a Conv2d or Linear and the ReLU module, in place or not, that alone reads its
    output; an Identity takes the ReLU's place.  The pairs come from torch.fx's symbolic trace of the model or, where
    it does not trace, of its parts, each of which is then taken to call its layers alone.  Layers with hooks are not
    fused.
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
        if type(module) in (*SWAPS, *FUSED, *RELUS)
    }
    changes = {
        module: SWAPS[type(module)][1]
        for module, wish in wishes.items()
        if wish and type(module) in SWAPS and SWAPS[type(module)][0] in wanted
    }
    if "fuse" in wanted and wishes:
        for layer, activation in _Fusion(model).pairs:
            if wishes.get(layer) and wishes.get(activation):
                changes |= {layer: FUSED[type(layer)], activation: modules.FusedReLU}
    for module, ours in changes.items():
        _swap(module, ours)
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
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode is {module.padding_mode!r}: only 'zeros' has a kernel"
    if isinstance(module, nn.Conv2d | nn.Linear):
        weight = module.weight
        if weight.dtype not in checks.FLOATING:
            return f"its weight is {weight.dtype}: kernels are for {', '.join(map(str, checks.FLOATING))}"
        if weight.layout != torch.strided or 0 in weight.shape:
            return f"its weight is {weight.layout} of shape {tuple(weight.shape)}: allowed is torch.strided, not empty"
    return None


def _check_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, not {type(value).__name__}")


# -- which ReLUs can be fused ------------------------------------------------------------------------------------------


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_relu_function(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_)


class _Tracer(torch.fx.Tracer):
    """Goes into containers; layers, what has hooks and, if `shallow`, all submodules are calls in the graph."""

    def __init__(self, shallow: bool, inlined: set[nn.Module]) -> None:
        super().__init__()
        self.shallow, self.inlined = shallow, inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Hooks would be called with proxies, and see values that fusing takes away.
        leaf = self.shallow or not m._modules or _has_hooks(m) or super().is_leaf_module(m, module_qualified_name)
        if not leaf:
            self.inlined.add(m)
        return leaf


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Take back what a trace leaves behind: a forward that assigns to self would keep proxies there."""
    states = [(module, dict(module.__dict__)) for module in model.modules()]
    holders = [value for _, state in states for value in state.values() if type(value) in (dict, list)]
    contents = [(holder, holder.copy()) for holder in holders]
    try:
        yield
    finally:
        for module, state in states:
            module.__dict__.clear()
            module.__dict__.update(state)
        for holder, content in contents:
            holder.clear()
            holder.update(content) if isinstance(holder, dict) else holder.extend(content)


class _Fusion:
    """Pairs of a layer and the ReLU that alone reads its output, and why other layers with a ReLU are no such pair."""

    def __init__(self, model: nn.Module) -> None:
        self.pairs: list[tuple[nn.Module, nn.Module]] = []
        self.reasons: dict[nn.Module, str] = {}
        self.untraced: dict[nn.Module, str] = {}
        self._followers: dict[nn.Module, list[nn.Module | None]] = {}
        self._calls: Counter[nn.Module] = Counter()
        self._seen: set[nn.Module] = set()
        with _undisturbed(model):
            self._look_into(model)
        for layer, followers in self._followers.items():
            self._judge(layer, followers)

    def _look_into(self, module: nn.Module) -> None:
        if module in self._seen or not module._modules:
            return
        self._seen.add(module)
        inlined: set[nn.Module] = set()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):  # these only hold what others call
            for shallow in (False, True):
                inlined.clear()
                try:
                    graphs = self._graphs(module, _Tracer(shallow, inlined))
                except Exception as error:  # whatever the model's own code raises when it meets a proxy
                    self.untraced[module] = (
                        f"{type(module).__name__} does not trace ({_first_line(error).partition('. ')[0]})"
                    )
                else:
                    self.untraced.pop(module, None)
                    self._collect(module, graphs)
                    break
        self._seen |= inlined
        for descendant in (inside for part in (module, *inlined) for inside in part.children()):
            self._look_into(descendant)

    @staticmethod
    def _graphs(module: nn.Module, tracer: _Tracer) -> list[tuple[torch.fx.Graph, set[torch.fx.Node]]]:
        """A graph for each way through forward that its flags open: training or not, arguments given or left out.

        With each the nodes whose values forward keeps in attributes, which no edge of the graph shows.
        """
        parameters = inspect.signature(module.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        graphs = []
        modes = {inside: inside.training for inside in module.modules()}
        try:
            for training, concrete in itertools.product((True, False), ({}, defaults) if defaults else ({},)):
                for inside in modes:
                    inside.training = training
                graph = tracer.trace(module, concrete or None)
                kept = tree_leaves([list(inside.__dict__.values()) for inside in modes])
                graphs.append((graph, {value.node for value in kept if isinstance(value, torch.fx.Proxy)}))
        finally:
            for inside, training in modes.items():
                inside.training = training
        return graphs

    def _collect(self, module: nn.Module, graphs: list[tuple[torch.fx.Graph, set[torch.fx.Node]]]) -> None:
        calls: Counter[nn.Module] = Counter()  # the most in any one way through
        for graph, kept in graphs:
            called = {node: module.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
            calls |= Counter(called.values())
            for node, layer in called.items():
                if type(layer) not in FUSED:
                    continue
                relus = [u for u in node.users if _is_relu_function(u) or type(called.get(u)) in RELUS]
                if relus and (len(node.users) > 1 or node in kept):
                    self.reasons[layer] = "its output is read by more than its ReLU"
                elif relus and relus[0] not in called:
                    self.reasons[layer] = "its ReLU is a function call, which cannot be swapped"
                self._followers.setdefault(layer, []).append(called.get(relus[0]) if relus else None)
        self._calls += calls

    def _judge(self, layer: nn.Module, followers: list[nn.Module | None]) -> None:
        relu = followers[0]
        if layer in self.reasons or all(follower is None for follower in followers):
            return
        if relu is None or any(follower is not relu for follower in followers):
            self.reasons[layer] = "its output does not go to the same ReLU in every call"
        elif self._calls[layer] > 1:
            self.reasons[layer] = f"it is called in {self._calls[layer]} places"
        elif self._calls[relu] > 1:
            self.reasons[layer] = f"its ReLU is called in {self._calls[relu]} places"
        elif _has_hooks(layer) or _has_hooks(relu):
            self.reasons[layer] = "hooks on it or on its ReLU would see other values"
        else:
            self.pairs.append((layer, relu))

    def reason(self, name: str, layer: nn.Module, model: nn.Module) -> str:
        """Why `layer` is not fused; "" where no ReLU follows."""
        if layer in self.reasons:
            return f"ReLU not fused: {self.reasons[layer]}"
        if layer in self._followers:
            return ""
        while name:  # never met in a trace: the nearest module around it that did not trace
            name = name.rpartition(".")[0]
            if reason := self.untraced.get(model.get_submodule(name)):
                return f"not looked at for a ReLU to fuse: {reason}"
        return ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


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
    does not call are marked, and calls of functions such as F.relu outside any layer have rows of their own.
    """
    _check_module("model", model)
    fusion = _Fusion(model)
    called, functions = _run(model, example) if example else (None, {})
    rows = Table()
    for name, module in model.named_modules():
        if module._modules and not module._parameters and not isinstance(module, tuple(SWAPS)):
            continue  # a container
        where, reason = _verdict(name, module, model, fusion)
        if called is not None and module not in called:
            reason = f"{reason}; not called with this example" if reason else "not called with this example"
        rows.append(Row(name, type(module).__name__, where, reason))
    names = {module: name for name, module in model.named_modules()}
    for (module, function), count in functions.items():
        times = "" if count == 1 else f", {count} times"
        reason = f"a function call{times}: use_kernels() can take it"
        rows.append(Row(names[module], f"F.{function}", "pytorch", reason))
    return rows


def _verdict(name: str, module: nn.Module, model: nn.Module, fusion: _Fusion) -> tuple[str, str]:
    refusal = _refusal(module)
    if refusal is not None:
        return "pytorch", refusal
    if type(module) in SWAPS:
        return "pytorch", "convert() would swap it"
    if isinstance(module, modules.FusedReLU):
        return "tileconv", "done by the layer before it"
    if isinstance(module, modules.ConvReLU2d | modules.LinearReLU):
        return "tileconv", "with its ReLU in one kernel"
    if type(module) in FUSED and (reason := fusion.reason(name, module, model)):
        return "tileconv", reason
    return "tileconv", ""


def _run(model: nn.Module, example: tuple[Any, ...]) -> tuple[set[nn.Module], dict[tuple[nn.Module, str], int]]:
    """The modules that a call reaches, and the functions that containers call themselves."""
    inside = set(model.modules())
    called: set[nn.Module] = set()
    stack: list[nn.Module] = []
    functions: Counter[tuple[nn.Module, str]] = Counter()

    def enter(module: nn.Module, arguments: Any) -> None:
        if module in inside:
            called.add(module)
            stack.append(module)

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
    return called, functions


# -- use_kernels -------------------------------------------------------------------------------------------------------


def _relu_in_place(input: torch.Tensor) -> torch.Tensor:
    return functional.relu(input, inplace=True)


def _torch_dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    return functional.dropout(input, p, train)


def _named_self(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda self: function(self)


# What a TorchFunctionMode is handed.  F.max_pool2d is a switch between two functions of which one names itself, and
# F.conv2d and F.linear are the built-in functions themselves.
REDIRECTS: dict[Any, tuple[str, Callable[..., Any]]] = {
    torch.conv2d: ("conv2d", functional.conv2d),
    F.linear: ("linear", functional.linear),
    F.max_pool2d: ("max_pool2d", functional.max_pool2d),
    F.max_pool2d_with_indices: (
        "max_pool2d",
        lambda *args, **kwargs: functional.max_pool2d(*args[:6], **{**kwargs, "return_indices": True}),
    ),
    torch.max_pool2d: ("max_pool2d", functional.max_pool2d),
    F.adaptive_avg_pool2d: ("adaptive_avg_pool2d", functional.adaptive_avg_pool2d),
    F.relu: ("relu", functional.relu),
    torch.relu: ("relu", functools.partial(functional.relu, inplace=False)),
    torch.relu_: ("relu", _relu_in_place),
    torch.Tensor.relu: ("relu", _named_self(functional.relu)),
    torch.Tensor.relu_: ("relu", _named_self(_relu_in_place)),
    F.dropout: ("dropout", functional.dropout),
    torch.dropout: ("dropout", _torch_dropout),
}


@dataclass(eq=False)
class KernelMode(TorchFunctionMode):
    """What `use_kernels` returns: the context, and counts of what it did."""

    strict: bool = False
    taken: Counter[str] = field(default_factory=Counter)
    """Calls that went to our kernels, by function."""
    left: Counter[str] = field(default_factory=Counter)
    """Calls that were left with PyTorch, as "function: why"."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # PyTorch takes the mode off while it is in here, so what our own functions call is not redirected again.
        kwargs = kwargs or {}
        if func not in REDIRECTS:
            return func(*args, **kwargs)
        name, ours = REDIRECTS[func]
        try:
            result = ours(*args, **kwargs)
        except (TypeError, ValueError) as error:  # how our functions refuse arguments, before anything has run
            if self.strict:
                raise
            refused = _first_line(error)
        else:
            self.taken[name] += 1
            return result
        self.left[f"{name}: {refused}"] += 1
        return func(*args, **kwargs)  # what is wrong for PyTorch as well gets PyTorch's own error


def use_kernels(*, strict: bool = False) -> KernelMode:
    """A context in which calls of torch.nn.functional run on our kernels, in models' own code and in torch.nn's layers.

    Redirected are conv2d, linear, max_pool2d, adaptive_avg_pool2d, relu and dropout of torch.nn.functional, and
    torch's and Tensor's names for them.  What our kernels do not take (another dtype, device or layout) is left with
    PyTorch; with strict=True it raises our TypeError or ValueError instead.  `with use_kernels() as mode:` counts both
    in mode.taken and mode.left.  Nothing is fused, and contiguous weights are repacked in every call: convert()
    does better where a model is made of modules.
    """
    return KernelMode(strict)


__all__ = ["KernelMode", "Row", "Table", "convert", "explain", "revert", "use_kernels"]
