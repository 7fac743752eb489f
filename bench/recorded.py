"""The layers that a model calls: the model is run once on tensors without values, and its calls are written down.

Calls are seen where torch hands them out, so modules, torch.nn.functional in a model's own forward, and tileconv's own
functions are all recorded. A ReLU directly behind a convolution or fully connected layer joins it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .calls import NoLayer, Settings, handler, is_own
from .layers import LayerError, Row
from .suites import Suite, of_rows

OWN_BATCH = 128  # for a model that comes without an example
EXTENT = 224


@dataclass(eq=False)
class Recorder(TorchFunctionMode):
    """The context in which a model's calls are written down."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    names: dict[nn.Module, str] = field(default_factory=dict)
    inside: list[nn.Module] = field(default_factory=list)
    makers: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    """By the id of a tensor: the tensor, which is so kept alive, and the place of the row that made it."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = handler(func)
        if read is None:
            self._other(func)
            return func(*args, **kwargs)
        try:
            found = read(*args, **kwargs)
        except NoLayer as reason:
            self._leave(f"{getattr(func, '__name__', func)} with {reason}")
            return func(*args, **kwargs)
        maker = self.makers.get(id(found[1])) if found else None  # looked up before an operation in place
        result = func(*args, **kwargs)
        if found is not None:
            self._write(*found, maker, result)
        return result

    def _write(self, op: str, input: Tensor, settings: Settings, maker: Any, result: Any) -> None:
        made = result[0] if isinstance(result, (tuple, list)) else result
        row = self.rows[maker[1]] if maker else None
        if op == "relu" and row is not None and "activation" not in row.settings and row.op in JOINED:
            self.rows[maker[1]] = replace(row, settings={**row.settings, "activation": "relu"})
            place = maker[1]
        else:
            kept = {name: value for name, value in settings.items() if name != "activation" or value}
            self.rows.append(Row(self._name(op), op, tuple(input.shape[1:]), kept, int(input.shape[0])))
            place = len(self.rows) - 1
            try:
                self.rows[-1].at(int(input.shape[0]))
            except LayerError as error:
                self.rows.pop()
                self._leave(f"{op}: {error}")
                return
        self.makers[id(made)] = made, place

    def _place(self) -> str:
        return self.names.get(self.inside[-1], "") if self.inside else ""

    def _name(self, op: str) -> str:
        place = self._place().replace("/", ".")
        plain = place if place and not list(self.inside[-1].children()) else f"{place}.{op}".lstrip(".")
        taken = {row.name for row in self.rows}
        number, name = 1, plain
        while name in taken:
            number += 1
            name = f"{plain}#{number}"
        return name

    def _other(self, func: Any) -> None:
        """Note a call that torch.nn.functional has and we have not; views, sums and the like are no layers."""
        name = getattr(func, "__name__", "")
        if is_own(func) or (name in LAYER_NAMES and not name.startswith("_")):
            self._leave(name)

    def _leave(self, what: str) -> None:
        place = self._place()
        kind = f" ({type(self.inside[-1]).__name__})" if self.inside else ""
        self.left_out.append(f"{place}{kind}: {what}" if place else what)


JOINED = ("conv2d", "conv1d", "conv_transpose2d", "linear")
NOT_LAYERS = ("pad", "one_hot", "relu", "relu_")
LAYER_NAMES = {name for name in dir(F) if callable(getattr(F, name)) and not name.startswith("_")} - set(NOT_LAYERS)


@contextlib.contextmanager
def _following(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Keeps the modules that are being called, innermost last."""
    recorder.names.update({module: name for name, module in model.named_modules()})
    handles: list[RemovableHandle] = []
    try:
        for module in recorder.names:
            handles.append(module.register_forward_pre_hook(lambda m, _: recorder.inside.append(m)))
            handles.append(module.register_forward_hook(lambda *_: _drop(recorder.inside)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop(stack: list[nn.Module]) -> None:
    stack.pop()


def record_model(model: nn.Module, inputs: tuple[Any, ...]) -> Recorder:
    """Run `model` on tensors like `inputs` that have no values; its parameters and buffers stay as they are.

    Raises ValueError where it needs values to choose its way, or fails.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), _following(recorder, model):
        empty = tuple(fake.from_tensor(value) if isinstance(value, Tensor) else value for value in inputs)
        # Parameters and buffers too: batch normalisation counts its batches in place.
        state: dict[str, Tensor] = {name: fake.from_tensor(value) for name, value in _state(model)}
        try:
            with recorder:
                torch.func.functional_call(model, state, empty)
        except DynamicOutputShapeException as error:
            raise ValueError(f"an output's size depends on values ({error}), which cannot be recorded") from None
        except DataDependentOutputException as error:
            raise ValueError(f"it looks at values to choose its way ({error}), which cannot be recorded") from None
        except Exception as error:
            text = str(error).strip().splitlines()
            shapes = ", ".join(str(tuple(v.shape)) for v in inputs if isinstance(v, Tensor))
            raise ValueError(
                f"it fails on an input of shape {shapes} ({type(error).__name__}: {text[0] if text else ''}); if that "
                "is not its input, let the callable return (model, example input)"
            ) from None
    return recorder


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@cache
def record(place: str) -> Suite:
    """The suite of the layers that the model of "module:callable" calls.

    callable is called without arguments and returns a torch.nn.Module, or (module, example input), the input a tensor
    or a tuple; without one, 128 images of 224x224 are taken, with the channels of the first convolution. Raises
    ValueError, with the nearest names, where there is no such module or callable, and where it returns something else.
    """
    model, inputs = _model(place, _callable(place))
    try:
        recorder = record_model(model, inputs)
    except ValueError as error:
        raise ValueError(f"from_model={place!r}: the model cannot be recorded: {error}") from None
    if not recorder.rows:
        left = f"; it calls {'; '.join(recorder.left_out)}" if recorder.left_out else ""
        raise ValueError(f"from_model={place!r}: the model calls no layer that there are kernels for{left}")
    batch = int(inputs[0].shape[0])
    rows = tuple(recorder.rows)

    def layers(asked: int | None) -> tuple[Any, ...]:
        if asked in (None, batch):
            return at_own(None)
        return tuple(row.at(_scaled(row, batch, asked or batch)) for row in rows)

    at_own = of_rows(rows, batch)
    name = place.rpartition(":")[2]
    left_out = tuple(dict.fromkeys(recorder.left_out))
    return Suite(name, f"{len(rows)} layers of {place}", place, layers, str(batch), left_out=left_out)


def _scaled(row: Row, batch: int, asked: int) -> int:
    """A row's leading extent for another batch: a linear layer of tokens has several rows an image."""
    assert row.batch is not None
    return max(1, row.batch * asked // batch)


def parted(place: str) -> tuple[str, str]:
    """The module and the callable of `module:callable`. Raises ValueError where one is missing."""
    module, _, path = place.partition(":")
    if not module or not path:
        raise ValueError(f"from_model={place!r} must be module:callable, such as mymodels:resnet")
    return module, path


def _callable(place: str) -> Callable[[], Any]:
    import tileconv.kernels  # noqa: F401 (first: it decides whether Triton interprets)

    from .networks import known

    module, path = parted(place)
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"from_model={place!r}: {module} cannot be imported ({type(error).__name__}: {error})"
        ) from None
    finally:
        if added:
            sys.path.remove(here)
    for part in path.split("."):
        names = [name for name in dir(found) if not name.startswith("_")]
        if not hasattr(found, part):
            known(f"from_model={place!r}: callable", part, [name for name in names if callable(getattr(found, name))])
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"from_model={place!r}: {path} is {_kind(found)}, and must be a callable")
    return found  # type: ignore[no-any-return]


def _model(place: str, make: Callable[[], Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model and its inputs."""
    try:
        made = make()
    except Exception as error:
        raise ValueError(f"from_model={place!r} fails when called ({type(error).__name__}: {error})") from None
    if isinstance(made, nn.Module):
        first = next((m for m in made.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise ValueError(f"from_model={place!r}: a model without Conv2d needs an example: return (model, input)")
        return made, (torch.empty(OWN_BATCH, first.in_channels, EXTENT, EXTENT, device=first.weight.device),)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        inputs = made[1] if isinstance(made[1], tuple) else (made[1],)
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() > 0 and inputs[0].shape[0] > 0:
            return made[0], inputs
    raise ValueError(
        f"from_model={place!r} returned {_kind(made)}: allowed are a torch.nn.Module and (module, input), the input a "
        "tensor or a tuple of tensors with a batch"
    )


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return f"an object of type {type(value).__name__}"
