"""Triton's interpreter, repaired: it computes like a GPU, answers faster, and tells of every access to memory.

Stock, it works on the raw bits of bf16, truncates fp32 -> bf16, computes tf32 in full fp32 and never reports an address
outside a tensor.  `repair()` mends that for the process; watch.py looks at launches.
Checked with Triton 3.6 to 3.9; an attribute that is missing is an error, never a repair left out.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.errors import InterpreterError

from tileconv.kernels import watch

Array = npt.NDArray[Any]
Handle = Any  # stock.TensorHandle: a numpy array and a Triton dtype

_FLOAT8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_FLOAT8_VALUES = {
    dtype: torch.arange(256, dtype=torch.uint8).view(torch_dtype).float().numpy()
    for dtype, torch_dtype in _FLOAT8.items()
}


def repair() -> None:
    """Repair the interpreter for the rest of the process; a second call does nothing.

    Raises RuntimeError where this Triton lacks something that the repairs replace.
    """
    if getattr(stock, "_tileconv_repaired", False):
        return
    if not tl.core.is_builtin(tl.tensor.__add__):
        raise RuntimeError("repair() was called inside a launch: call it before the first one")
    for replace in (_repair_options, _repair_arithmetic, _repair_reductions, _repair_memory, _repair_launches):
        replace()
    stock._tileconv_repaired = True


def _original(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        where = getattr(owner, "__name__", repr(owner))
        raise RuntimeError(
            f"Triton {triton.__version__}: the interpreter's {where} has no {name}, which tileconv's repair replaces; "
            "use Triton 3.6 to 3.9, or adapt tileconv/kernels/interpreter.py"
        )
    return getattr(owner, name)


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = _original(owner, name)
    replacement = make(original)
    replacement.__wrapped__ = original  # the tests compare the two
    setattr(owner, name, replacement)


# Numbers.  The interpreter holds bf16 as uint16 and fp8 as uint8.

_FEW_ELEMENTS = 1024  # below this, numpy's or the interpreter's own way is as fast as what replaces it


def _is_bf16(handle: Handle) -> bool:
    # Comparisons return a handle whose dtype is their operands' and whose data is bool.
    return bool(handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16)


def _is_narrow(handle: Handle) -> bool:
    """Whether to compute in fp32 and round: bf16 always; fp16 blocks, whose numbers this leaves alone, because numpy
    adds 512 K of them in 2.0 ms, and torch converts there and back in 0.1."""
    return _is_bf16(handle) or (handle.data.dtype == np.float16 and handle.data.size >= _FEW_ELEMENTS)


def _to_torch(array: Any, dtype: type[np.generic] | None = None) -> torch.Tensor:
    """The array as a tensor: a copy only where torch cannot share it (read-only, or negative strides)."""
    array = np.require(array, dtype, "W")
    return torch.from_numpy(array.copy() if min(array.strides, default=0) < 0 else array)


def _widen(handle: Handle) -> Array:
    """The values of a handle as numpy computes with them: all below fp32 as fp32, anything else unchanged."""
    data: Array = handle.data
    if _is_bf16(handle):
        bits = data.astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    if data.dtype == np.float16:
        return data.astype(np.float32) if data.size < _FEW_ELEMENTS else _to_torch(data).float().numpy()
    table: Array | None = _FLOAT8_VALUES.get(handle.dtype.scalar)
    return data if table is None else table[data]


def _narrow(values: Any, dtype: tl.dtype) -> Array:
    """fp32 as fp16, raw bf16 or raw fp8, rounded to nearest even; fp8 saturates, as a GPU's cvt.rn.satfinite does."""
    floats = _to_torch(values, np.float32)
    if dtype == tl.float16:
        return floats.half().numpy()
    if dtype == tl.bfloat16:
        return floats.bfloat16().view(torch.uint16).numpy()
    largest = torch.finfo(_FLOAT8[dtype]).max
    return floats.clamp(-largest, largest).to(_FLOAT8[dtype]).view(torch.uint8).numpy()


def _is_raw(dtype: tl.dtype) -> bool:
    return dtype == tl.bfloat16 or dtype in _FLOAT8


def _convert(source: Handle, target: tl.dtype) -> Handle:
    values = _widen(source)
    raw = _narrow(values, target) if _is_raw(target) else values.astype(stock._get_np_dtype(target))
    return stock.TensorHandle(raw, target)


def _repair_options() -> None:
    """No int32-overflow bookkeeping (tensor + 1: 53 us with it, 12 us without), and every GPU's dot precision."""
    builder = _original(stock, "interpreter_builder")
    allowed = (*_original(builder.options, "allowed_dot_input_precisions"), "bf16x3", "bf16x6")
    _original(builder.options, "sanitize_overflow")
    builder.options = dataclasses.replace(
        builder.options, sanitize_overflow=False, allowed_dot_input_precisions=tuple(dict.fromkeys(allowed))
    )


def _repair_arithmetic() -> None:
    builder = _original(stock, "InterpreterBuilder")
    for name, make in (
        ("cast_impl", _cast_impl),
        ("create_fp_to_fp", _create_fp_to_fp),
        ("binary_op", _binary_op),
        ("unary_op", _unary_op),
        ("create_clampf", _create_clampf),
        ("create_fma", _create_fma),
        ("create_dot", _create_dot),
    ):
        _wrap(builder, name, make)
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        _wrap(builder, name, partial(_binary, function))
    builder.get_bf16 = lambda self, value: stock.TensorHandle(_narrow([value], tl.bfloat16), tl.bfloat16)


def _binary(function: Callable[..., Array], _: Any) -> Any:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, function)


def _cast_impl(original: Any) -> Any:
    def cast_impl(self: Any, source: Handle, target: tl.dtype) -> Handle:
        wanted = target.scalar
        if _is_bf16(source) or _is_raw(wanted):
            return _convert(source, wanted)
        if source.data.size >= _FEW_ELEMENTS:  # 20 times faster than numpy's
            if source.data.dtype == np.float16 and wanted == tl.float32:
                return stock.TensorHandle(_widen(source), wanted)
            if source.data.dtype == np.float32 and wanted == tl.float16:
                return stock.TensorHandle(_narrow(source.data, wanted), wanted)
        return original(self, source, target)

    return cast_impl


def _create_fp_to_fp(original: Any) -> Any:
    def create_fp_to_fp(self: Any, source: Handle, target: tl.dtype, rounding: Any) -> Handle:
        stays = {source.dtype.scalar, target.scalar} & {tl.float8e4b15}
        if stays or rounding == stock._ir.ROUNDING_MODE.RTZ:
            return original(self, source, target, rounding)
        return _convert(source, target.scalar)

    return create_fp_to_fp


def _binary_op(original: Any) -> Any:
    def binary_op(self: Any, lhs: Handle, rhs: Handle, op: Callable[..., Array]) -> Handle:
        if not (_is_narrow(lhs) and _is_narrow(rhs)):
            return original(self, lhs, rhs, op)
        result, dtype = op(_widen(lhs), _widen(rhs)), lhs.dtype.scalar
        return stock.TensorHandle(result if result.dtype == bool else _narrow(result, dtype), dtype)

    return binary_op


def _unary_op(original: Any) -> Any:
    def unary_op(self: Any, arg: Handle, op: Callable[..., Array]) -> Handle:
        if not _is_narrow(arg):
            return original(self, arg, op)
        return stock.TensorHandle(_narrow(op(_widen(arg)), arg.dtype.scalar), arg.dtype.scalar)

    return unary_op


def _create_clampf(_: Any) -> Any:
    def create_clampf(self: Any, arg: Handle, low: Handle, high: Handle, propagate_nan: Any) -> Handle:
        keeps_nan = propagate_nan == stock._ir.PROPAGATE_NAN.ALL
        larger, smaller = (np.maximum, np.minimum) if keeps_nan else (np.fmax, np.fmin)
        return self.binary_op(self.binary_op(arg, low, larger), high, smaller)

    return create_clampf


def _create_fma(_: Any) -> Any:
    def create_fma(self: Any, x: Handle, y: Handle, z: Handle) -> Handle:
        # One rounding: in fp64 the product of two fp32 is exact (48 of 53 bits).
        result = np.multiply(_widen(x), _widen(y), dtype=np.float64) + _widen(z)
        dtype = z.dtype.scalar
        return stock.TensorHandle(
            _narrow(result, dtype) if _is_bf16(z) else result.astype(z.data.dtype, copy=False), dtype
        )

    return create_fma


def _round_tf32(values: Array) -> Array:
    """fp32 rounded to tf32's 10 mantissa bits, ties away from zero (cvt.rna.tf32.f32); infinities and NaN stay."""
    bits = values.view(np.uint32) + np.uint32(0x1000)
    bits &= np.uint32(0xFFFFE000)
    rounded = bits.view(np.float32)
    finite = np.isfinite(values)
    return rounded if finite.all() else np.where(finite, rounded, values)


def _round_bf16(values: Array) -> Array:
    return (_narrow(values, tl.bfloat16).astype(np.uint32) << 16).view(np.float32)


# input_precision -> (how an operand is rounded, the products of smaller terms that are added to that of the largest)
_PARTIAL_PRODUCTS: dict[str, tuple[Callable[[Array], Array], tuple[tuple[int, int], ...]]] = {
    "TF32": (_round_tf32, ()),
    "TF32x3": (_round_tf32, ((1, 0), (0, 1))),
    "BF16x3": (_round_bf16, ((1, 0), (0, 1))),
    "BF16x6": (_round_bf16, ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1))),
}


def _terms(values: Array, count: int, rounded: Callable[[Array], Array]) -> list[Array]:
    """values as a sum of `count` rounded arrays, the largest first."""
    terms = []
    for _ in range(count):
        terms.append(rounded(values))
        values = values - terms[-1]
    return terms


def _matmul(a: Array, b: Array, precision: Any) -> Array:
    name = getattr(precision, "name", "IEEE")
    if a.dtype != np.float32 or name not in _PARTIAL_PRODUCTS:
        return np.asarray(np.matmul(a, b))
    rounded, small = _PARTIAL_PRODUCTS[name]
    count = 1 + max((i for i, _ in small), default=0)
    a_terms, b_terms = _terms(a, count, rounded), _terms(b, count, rounded)
    product = np.asarray(np.matmul(a_terms[0], b_terms[0]))
    if small:
        rest = sum(np.matmul(a_terms[i], b_terms[j]) for i, j in small)
        # As Triton does it: an infinity leaves NaN in the small products, which must not spoil the large one.
        product += np.where(np.isnan(rest), np.float32(0), rest)
    return product


def _create_dot(original: Any) -> Any:
    def create_dot(self: Any, a: Handle, b: Handle, d: Handle, precision: Any, imprecise: Any) -> Handle:
        if not a.dtype.scalar.is_floating():
            return original(self, a, b, d, precision, imprecise)
        if a.data.dtype == np.float32:
            product = _matmul(a.data, b.data, precision)
        else:
            # Products of two 16-bit floats are exact in fp32.  fp16 accumulators too are rounded once, at the end.
            wide = np.float64 if a.data.dtype == np.float64 else np.float32
            product = np.matmul(_widen(a).astype(wide, copy=False), _widen(b).astype(wide, copy=False))
        product = np.add(product, d.data, out=product if product.dtype == d.data.dtype else None)
        return stock.TensorHandle(product.astype(d.data.dtype, copy=False), d.dtype.scalar)

    return create_dot


# Reductions.


class _NotElementwise(Exception):
    """A function of single elements asked a whole block for its truth."""


def _repair_reductions() -> None:
    reduce, scan = _original(stock, "ReduceOps"), _original(stock, "ScanOps")
    _wrap(reduce, "generic_reduce", _pairwise_reduce)
    _wrap(reduce, "apply_impl", _ignore_nan)
    _wrap(reduce, "sum", _tree_sum)
    for operation in (reduce, scan):
        _wrap(operation, "apply_impl", _in_float32)


def _in_float32(original: Any) -> Any:
    """bf16 reductions and scans in fp32, rounded once."""

    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        raw = [_is_bf16(x.handle) for x in inputs]
        if not any(raw):
            return original(self, inputs)
        wide = [_tensor(_widen(x.handle), tl.float32, x.type) if r else x for x, r in zip(inputs, raw, strict=True)]
        results = original(self, tuple(wide))
        if not isinstance(results, list | tuple):
            results = (results,)
        return [
            _tensor(_narrow(x.handle.data, tl.bfloat16), tl.bfloat16, x.type) if r else x
            for x, r in zip(results, raw, strict=False)
        ]

    return apply_impl


def _tensor(data: Array, dtype: tl.dtype, like: Any) -> Any:
    """A Triton tensor of `dtype`, a block where `like` is one."""
    kind = tl.block_type(dtype, list(like.shape)) if like.is_block() else dtype
    return tl.core.tensor(stock.TensorHandle(data, dtype), kind)


def _ignore_nan(original: Any) -> Any:
    """tl.max and tl.min pass over NaN, without numpy's warning where nothing else is there."""
    functions = {tl.standard._elementwise_max: np.fmax, tl.standard._elementwise_min: np.fmin}

    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        function = functions.get(self.combine_fn)
        if function is None:
            return original(self, inputs)
        data = inputs[0].handle.data
        return self.to_tensor(function.reduce(data, axis=self.axis, keepdims=self.keep_dims), inputs[0].dtype)

    return apply_impl


def _tree_sum(original: Any) -> Any:
    """tl.sum adds halves to each other, as a GPU's threads do.

    numpy adds rows to rows one after the other: 32,768 rows of 8 fp32 numbers between 0 and 1 are then off by 5.3e-6 of
    their sum, in halves by 5.7e-8, and take 446 us instead of 42.
    """

    def tree_sum(self: Any, input: Any) -> Any:
        data, axis = input.handle.data, self.axis
        rows = np.ravel(data) if axis is None else np.moveaxis(data, axis, 0)
        if data.dtype.kind != "f" or len(rows) & (len(rows) - 1):
            return original(self, input)
        while len(rows) > 1:
            half = len(rows) // 2
            rows = rows[:half] + rows[half:]
        total = rows[0]
        if self.keep_dims:
            total = total.reshape([1] * data.ndim) if axis is None else np.expand_dims(total, axis)
        return self.to_tensor(total, input.dtype)

    return tree_sum


def _pairwise_reduce(original: Any) -> Any:
    """Combine neighbours, a whole block of pairs at a time: a 256x16 block takes 1.8 ms, element by element 264 ms."""

    def generic_reduce(self: Any, inputs: tuple[Any, ...]) -> Any:
        data = [np.ravel(x.handle.data) if self.axis is None else x.handle.data for x in inputs]
        axis = self.axis or 0
        if data[0].shape[axis] & (data[0].shape[axis] - 1):
            return original(self, inputs)
        truth = tl.tensor.__bool__
        tl.tensor.__bool__ = _truth_of_one
        try:
            data = _halve(self, data, axis, [x.dtype for x in inputs])
        except _NotElementwise:
            tl.tensor.__bool__ = truth
            return original(self, inputs)
        finally:
            tl.tensor.__bool__ = truth
        if not self.keep_dims:
            data = [x.squeeze(axis) for x in data]
        elif self.axis is None:
            data = [x.reshape([1] * len(inputs[0].shape)) for x in data]
        return [self.to_tensor(x if x.ndim else x.item(), arg.dtype) for x, arg in zip(data, inputs, strict=True)]

    return generic_reduce


def _truth_of_one(tensor: Any) -> bool:
    if tensor.handle.data.size != 1:
        raise _NotElementwise("the interpreter calls this function with whole blocks: it cannot branch on an element")
    return bool(tensor.handle.data.item())


def _halve(reduce: Any, data: list[Array], axis: int, dtypes: list[tl.dtype]) -> list[Array]:
    """Reduce `axis` to one element; neighbours are combined, so the order of the elements is kept."""
    while data[0].shape[axis] > 1:
        sides = [
            [
                reduce.to_tensor(x.take(range(first, x.shape[axis], 2), axis), t)
                for x, t in zip(data, dtypes, strict=True)
            ]
            for first in (0, 1)
        ]
        shape = sides[0][0].handle.data.shape
        results = reduce.combine_fn.fn(*sides[0], *sides[1])
        results = results if isinstance(results, tuple) else (results,)
        values = [x.handle.data if isinstance(x, tl.core.tensor) else np.asarray(x) for x in results]
        data = [np.broadcast_to(x, shape) for x in values]
    return data


# Memory.


def _repair_memory() -> None:
    builder = _original(stock, "InterpreterBuilder")
    _wrap(builder, "create_addptr", _create_addptr)
    _wrap(builder, "create_masked_load", _gather)
    _wrap(builder, "create_masked_store", _scatter)
    for name, kind, pointers, mask in (
        ("create_masked_load", "load", 0, 1),
        ("create_masked_store", "store", 0, 2),
        ("create_atomic_rmw", "atomic", 1, 3),
        ("create_atomic_cas", "atomic", 0, None),
    ):
        _wrap(builder, name, partial(_watched, kind, pointers, mask))
    _wrap(builder, "create_descriptor_load", _create_descriptor_load)
    _wrap(builder, "create_descriptor_store", _create_descriptor_store)


def _watched(kind: str, pointers: int, mask: int | None, original: Any) -> Any:
    """The original, after it has told every watcher which addresses are touched; `pointers`, `mask`: its arguments."""

    def access(self: Any, *args: Any, **kwargs: Any) -> Any:
        if watch.watchers:
            addresses = args[pointers].data
            if mask is not None:
                addresses = addresses[np.broadcast_to(np.asarray(args[mask].data, bool), addresses.shape)]
            _tell(kind, addresses.reshape(-1), _size(args[pointers].get_element_ty()))
        return original(self, *args, **kwargs)

    return access


def _size(dtype: tl.dtype) -> int:
    return max(1, int(dtype.primitive_bitwidth) // 8)


def _tell(kind: str, addresses: Array, size: int) -> None:
    if addresses.size:
        for watcher in watch.watchers:
            watcher.touch(kind, addresses.astype(np.int64), size)


class _Memory:
    """Memory at an address, as numpy's array interface."""

    def __init__(self, address: int, dtype: np.dtype[Any], shape: list[int], strides: list[int]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "typestr": dtype.str,
            "shape": tuple(shape),
            "strides": tuple(strides),
        }


def _create_addptr(original: Any) -> Any:
    """Addresses in one array instead of three."""

    def create_addptr(self: Any, pointer: Handle, offset: Handle) -> Handle:
        if offset.data.size < _FEW_ELEMENTS or pointer.data.size > offset.data.size:
            return original(self, pointer, offset)
        addresses = offset.data.astype(np.uint64, order="C")
        addresses *= np.uint64(_size(pointer.get_element_ty()))
        addresses += pointer.data
        return stock.TensorHandle(addresses, pointer.dtype)

    return create_addptr


def _elements(addresses: Array, dtype: np.dtype[Any]) -> tuple[Array, Array] | None:
    """The memory between the first and the last address, and each one's index in it; None where one is unaligned."""
    low, high = int(addresses.min()), int(addresses.max())
    offsets = addresses.view(np.int64) - low
    if (offsets & (dtype.itemsize - 1)).any():
        return None
    offsets >>= dtype.itemsize.bit_length() - 1
    return np.asarray(_Memory(low, dtype, [(high - low) // dtype.itemsize + 1], [dtype.itemsize])), offsets


def _gather(original: Any) -> Any:
    """Loads by numpy's take: 0.7 ms for 512 K fp16 elements (1.1 with a border masked off), stock 6.3."""

    def create_masked_load(
        self: Any, pointers: Handle, mask: Any, other: Handle | None, *rest: Any, **named: Any
    ) -> Any:
        addresses, element = pointers.data, pointers.get_element_ty()
        dtype = stock._get_np_dtype(element)
        if addresses.size >= _FEW_ELEMENTS:
            active = np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)
            everything = active.all()
            found = _elements(addresses if everything else addresses[active], dtype) if active.any() else None
            if found is not None and everything:
                return stock.TensorHandle(found[0].take(found[1]), element)
            if found is not None:
                data = np.zeros(addresses.shape, dtype)
                if other is not None:
                    data[...] = other.data
                data[active] = found[0].take(found[1])
                return stock.TensorHandle(data, element)
        return original(self, pointers, mask, other, *rest, **named)

    return create_masked_load


def _scatter(original: Any) -> Any:
    """Stores by numpy's index: 0.7 ms for 512 K fp16 elements (1.1 with a border masked off), stock 11.6."""

    def create_masked_store(self: Any, pointers: Handle, value: Handle, mask: Any, *rest: Any, **named: Any) -> Any:
        addresses, data = pointers.data, value.data
        if addresses.size >= _FEW_ELEMENTS and data.shape == addresses.shape:
            active = np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)
            everything = active.all()
            found = _elements(addresses if everything else addresses[active], data.dtype) if active.any() else None
            if found is not None:
                found[0][found[1]] = data if everything else data[active]
                return None
        return original(self, pointers, value, mask, *rest, **named)

    return create_masked_store


class _Box(NamedTuple):
    """The part of a descriptor's block that lies inside the tensor."""

    inside: tuple[slice, ...]  # of the block
    whole: bool  # the block lies inside
    memory: Array | None  # the same part of the tensor itself; None if the block lies outside


def _box(desc: Any, offsets: Sequence[Handle], kind: str) -> _Box:
    element = desc.base.dtype.element_ty
    size = _size(element)
    start = [int(x.data.item()) for x in offsets]
    if start[-1] * size % 16:
        raise ValueError(
            f"descriptor {kind} at {start}: the last offset must be a multiple of 16 bytes, and an element is {size}"
        )
    extents = [int(x.data.item()) for x in desc.shape]
    strides = [int(x.data.item()) * size for x in desc.strides]
    low = [max(-i, 0) for i in start]
    high = [min(extent - i, block) for i, extent, block in zip(start, extents, desc.block_shape, strict=True)]
    inside = tuple(map(slice, low, high))
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return _Box(inside, False, None)
    counts = [b - a for a, b in zip(low, high, strict=True)]
    address = int(desc.base.data.item()) + sum((i + a) * x for i, a, x in zip(start, low, strides, strict=True))
    if watch.watchers:
        addresses = np.full(counts, address, np.int64)
        for dim, (count, stride) in enumerate(zip(counts, strides, strict=True)):
            addresses += (np.arange(count) * stride).reshape([-1] + [1] * (len(counts) - dim - 1))
        _tell(kind, addresses.reshape(-1), size)
    memory = np.asarray(_Memory(address, stock._get_np_dtype(element), counts, strides))
    return _Box(inside, counts == list(desc.block_shape), memory)


def _create_descriptor_load(_: Any) -> Any:
    """A clipped slice of memory: 0.3 ms for [2, 32, 32, 1, 256] fp16, against 9 ms through an array of pointers."""

    def create_descriptor_load(self: Any, desc: Any, offsets: Sequence[Handle], *_: Any, **__: Any) -> Handle:
        element = desc.base.dtype.element_ty
        box = _box(desc, offsets, "load")
        if box.whole and box.memory is not None:
            data = box.memory.copy(order="C")
        else:
            dtype = stock._get_np_dtype(element)
            if desc.padding == stock._ir.PADDING_OPTION.PAD_NAN:
                nan = _narrow([np.nan], element)[0] if _is_raw(element) else np.nan
                data = np.full(desc.block_shape, nan, dtype)
            else:
                data = np.zeros(desc.block_shape, dtype)
            if box.memory is not None:
                data[box.inside] = box.memory
        if getattr(desc, "round_f32_to_tf32", False) and element == tl.float32:
            data = stock._round_f32_to_tf32(data)
        return stock.TensorHandle(data, element)

    return create_descriptor_load


def _create_descriptor_store(_: Any) -> Any:
    def create_descriptor_store(self: Any, desc: Any, value: Handle, offsets: Sequence[Handle], *_: Any) -> None:
        box = _box(desc, offsets, "store")
        if box.memory is not None:
            # Bits, not values: the block has the descriptor's dtype already.
            data = value.data.reshape(desc.block_shape)[box.inside]
            box.memory[...] = data if data.dtype == box.memory.dtype else data.view(box.memory.dtype)

    return create_descriptor_store


# Launches and device functions.


def _repair_launches() -> None:
    executor = _original(stock, "GridExecutor")
    _wrap(executor, "_init_args_hst", _init_args_hst)
    _wrap(executor, "__call__", _launch)
    _wrap(stock, "_patch_lang", _patch_lang)


def _patch_lang(original: Any) -> Any:
    """Patch triton.language once in a launch, not at every call of a device function.

    tl.cdiv, tl.zeros and tl.sum are device functions: a call of tl.cdiv takes 275 us stock, 31 us repaired.
    """
    scope = _original(stock, "_LangPatchScope")
    languages: dict[Any, list[Any]] = {}

    def patch_lang(fn: Any) -> Any:
        if fn not in languages:
            languages[fn] = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        # A launch patches tl.tensor and restores it at its end, so inside one it is no built-in.
        entries = (tl.tensor.__add__, *(language.load for language in languages[fn]))
        if languages[fn] and not any(map(tl.core.is_builtin, entries)):
            return scope()
        patches = original(fn)
        # 3.6 asks int() for a one-element array, which numpy refuses from 2.4 on.
        patches.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        patches.set_attr(tl, "map_elementwise", _map_elementwise)
        return patches

    return patch_lang


def _map_elementwise(function: Any, *blocks: Any, pack: int = 1) -> Any:
    """tl.map_elementwise, which stock has not: `function` on whole blocks, so it must not branch on an element."""
    if pack != 1:
        raise NotImplementedError(f"map_elementwise with pack={pack}: the interpreter has only 1")
    truth = tl.tensor.__bool__
    tl.tensor.__bool__ = _truth_of_one
    try:
        return function(*blocks)
    finally:
        tl.tensor.__bool__ = truth


def _init_args_hst(original: Any) -> Any:
    def init_args_hst(self: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        host_args, host_kwargs = original(self, args, kwargs)
        if watch.watchers:
            named = [*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()]
            tensors = [tensor for name, value in named for tensor in watch.tensors_of(name, value)]
            for watcher in watch.watchers:
                watcher.begin(tensors)
        return host_args, host_kwargs

    return init_args_hst


def _launch(original: Any) -> Any:
    one_at_a_time = threading.RLock()  # a launch patches triton.language, and at its end takes that from other threads'

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with one_at_a_time, np.errstate(all="ignore"):  # a GPU does not warn of overflow either
                return original(self, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, watch.OutOfBounds):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    return launch
