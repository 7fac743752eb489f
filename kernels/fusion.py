"""Which layers, ReLUs and max-pools can become one: found in torch.fx's symbolic traces of a model."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from tileconv.kernels import modules

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: modules.ConvReLU2d,
    modules.Conv2d: modules.ConvReLU2d,
    nn.Linear: modules.LinearReLU,
    modules.Linear: modules.LinearReLU,
}
RELUS = (nn.ReLU, modules.ReLU)
POOLS = (nn.MaxPool2d, modules.MaxPool2d)


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


class Fusion:
    """Pairs of a layer and the ReLU that alone reads its output, and why other layers with a ReLU are no such pair.

    `pools` has, for the ReLU of a convolution's pair, the MaxPool2d that alone reads what the ReLU makes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pairs: list[tuple[nn.Module, nn.Module]] = []
        self.pools: dict[nn.Module, nn.MaxPool2d] = {}
        self.reasons: dict[nn.Module, str] = {}
        self.untraced: dict[nn.Module, str] = {}
        self._followers: dict[nn.Module, list[nn.Module | None]] = {}
        self._readers: dict[nn.Module, set[nn.Module | None]] = {}
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
                        f"{type(module).__name__} does not trace ({first_line(error).partition('. ')[0]})"
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
                if type(layer) in RELUS:
                    readers = {None} if node in kept else {called.get(user) for user in node.users}
                    self._readers.setdefault(layer, set()).update(readers)
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
            pool = next(iter(self._readers[relu])) if len(self._readers[relu]) == 1 else None
            if isinstance(layer, nn.Conv2d) and isinstance(pool, nn.MaxPool2d) and self._fits(pool):
                self.pools[relu] = pool

    def _fits(self, pool: nn.MaxPool2d) -> bool:
        return type(pool) in POOLS and self._calls[pool] == 1 and not pool.return_indices and not _has_hooks(pool)

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


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
