"""Runs the Gluon kernels on the CPU, to test their work lists, indices, masks and barriers where there is no GPU.

Warp partitions and copies are threads, products are computed only when they are waited for, and now and then a copy or
a product takes its time, so that what reads too early or is freed too early shows. Layouts, fences and registers are
not modelled: those are tested on a GPU.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import blendserve_kernels

_SECONDS_UNTIL_DEADLOCK = 30.0
_PANEL = 64  # columns that lie together in shared memory


_chance = random.Random(0)


def _dawdle() -> None:
    """Let the other threads run ahead, now and then."""
    if _chance.random() < 0.2:
        time.sleep(2e-3)


class Dtype:
    """A dtype as the kernels see it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.torch = dtype
        self.primitive_bitwidth = torch.empty(0, dtype=dtype).element_size() * 8


class Value(torch.Tensor):
    """A tensor or a scalar of a kernel."""

    @property
    def type(self) -> Any:  # type: ignore[override] # the kernels ask a value for its layout
        return SimpleNamespace(layout=None)

    def to(self, dtype: Dtype) -> Value:  # type: ignore[override]
        return super().to(dtype.torch)


def _value(x: Any) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


def _pair(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Make tensors of two operands; a Python number takes the other's dtype."""
    if isinstance(a, torch.Tensor):
        return a, b if isinstance(b, torch.Tensor) else torch.tensor(b, dtype=a.dtype)
    if isinstance(b, torch.Tensor):
        return torch.tensor(a, dtype=b.dtype), b
    return torch.as_tensor(a), torch.as_tensor(b)


class Pointer:
    """An address within a flat tensor, or a tensor of them; every access is checked against its bounds."""

    def __init__(self, flat: torch.Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat, _value(offset).long()
        self.dtype = SimpleNamespace(element_ty=Dtype(flat.dtype))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.flat, self.offset + other)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the offsets and which of them are wanted, broadcast against one another."""
        wanted = torch.as_tensor(True if mask is None else mask)
        offsets, wanted = torch.broadcast_tensors(self.offset.as_subclass(torch.Tensor), wanted)
        chosen = offsets[wanted]
        if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < self.flat.numel()):
            raise IndexError(f"address {int(chosen.min())} to {int(chosen.max())} of {self.flat.numel()} elements")
        return offsets, wanted


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes are there."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0

    def update(self, arrivals: int, num_bytes: int) -> None:
        with self.condition:
            self.pending -= arrivals
            self.bytes += num_bytes
            assert self.pending >= 0, "more arrivals than the barrier was made for"
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
                self.condition.notify_all()

    def wait(self, phase: int) -> None:
        with self.condition:
            if not self.condition.wait_for(lambda: self.phase != phase, _SECONDS_UNTIL_DEADLOCK):
                raise TimeoutError("deadlock: a barrier's phase does not end")


class SharedMemory:
    """A view of shared memory: elements in the order of the hardware, panels of 64 columns one after the other."""

    def __init__(self, flat: torch.Tensor, shape: Sequence[int], is_transposed: bool = False) -> None:
        self.flat, self.shape, self.is_transposed = flat, list(shape), is_transposed
        self.dtype = Dtype(flat.dtype)

    def index(self, index: Any) -> SharedMemory:
        size = self.flat.numel() // self.shape[0]
        begin = int(index) * size
        assert 0 <= begin < self.flat.numel(), "no such slot"
        return SharedMemory(self.flat[begin : begin + size], self.shape[1:])

    def panels(self) -> torch.Tensor:
        """Return the view [panels, rows, columns] of a tile."""
        columns = min(_PANEL, self.shape[-1])
        num_panels = self.shape[-1] // columns
        return self.flat.view(num_panels, -1, columns)

    def read(self) -> torch.Tensor:
        tile = self.panels().permute(1, 0, 2).reshape(-1, self.shape[-1])
        return tile.t() if self.is_transposed else tile

    def load(self, layout: object) -> Value:
        return _value(self.read().clone())

    def store(self, value: torch.Tensor) -> None:
        panels = self.panels()
        panels.copy_(value.reshape(panels.shape[1], panels.shape[0], panels.shape[2]).permute(1, 0, 2))

    def permute(self, order: tuple[int, int]) -> SharedMemory:
        return SharedMemory(self.flat, self.shape, not self.is_transposed)

    def slice(self, start: int, length: int, dim: int) -> Any:
        return _RowSlice(self, start, length)

    def _reinterpret(self, dtype: Dtype, shape: Sequence[int], layout: object) -> SharedMemory:
        return SharedMemory(self.flat, shape)


class _RowSlice:
    def __init__(self, tile: SharedMemory, start: int, length: int) -> None:
        self.rows = tile.panels()[:, start : start + length]

    def load(self, layout: object) -> Value:
        return _value(self.rows.permute(1, 0, 2).reshape(self.rows.shape[1], -1).clone())

    def store(self, value: torch.Tensor) -> None:
        num_panels, num_rows, columns = self.rows.shape
        self.rows.copy_(value.reshape(num_rows, num_panels, columns).permute(1, 0, 2))


class TensorDescriptor:
    """A tensor to copy boxes of."""

    def __init__(self, tensor: torch.Tensor, block_shape: Sequence[int]) -> None:
        self.tensor, self.block_shape, self.layout, self.dtype = tensor, list(block_shape), None, Dtype(tensor.dtype)

    @staticmethod
    def from_tensor(tensor: torch.Tensor, block_shape: Sequence[int], layout: object) -> TensorDescriptor:
        assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        return TensorDescriptor(tensor, block_shape)

    def box(self, coordinates: Sequence[Any]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """Return the part of the box that lies in the tensor, and where in the box that is."""
        begins = [int(c) for c in coordinates]
        assert all(begin >= 0 for begin in begins)
        sizes = [min(s, max(0, n - b)) for s, n, b in zip(self.block_shape, self.tensor.shape, begins, strict=True)]
        inside = self.tensor[tuple(slice(b, b + s) for b, s in zip(begins, sizes, strict=True))]
        return inside, tuple(slice(0, s) for s in sizes)


class _Product:
    """A product in flight: computed when it is waited for."""

    def __init__(self, a: Any, b: SharedMemory, accumulator: Any, use_acc: bool) -> None:
        self.a, self.b, self.accumulator, self.use_acc = a, b, accumulator, use_acc
        self.result: Value | None = None

    def finish(self) -> None:
        _dawdle()
        accumulator = self.accumulator.result if isinstance(self.accumulator, _Product) else self.accumulator
        a = self.a.read() if isinstance(self.a, SharedMemory) else self.a
        product = a.float() @ self.b.read().float()
        self.result = _value(product + accumulator if self.use_acc else product)


class _Run(threading.local):
    """What a partition's thread knows of its launch."""

    program: int
    num_programs: int
    in_flight: list[_Product]
    errors: list[BaseException]  # of the whole launch
    deadline: float


_run = _Run()
_atomics = threading.Lock()


def _load(pointer: Pointer, mask: Any = None, other: Any = 0, cache_modifier: str = "") -> Value:
    offsets, wanted = pointer.places(mask)
    out = torch.full(offsets.shape, other, dtype=pointer.flat.dtype)
    out[wanted] = pointer.flat[offsets[wanted]]
    return _value(out)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offsets, wanted = pointer.places(mask)
    values = torch.as_tensor(value).as_subclass(torch.Tensor).to(pointer.flat.dtype).expand(offsets.shape)
    pointer.flat[offsets[wanted]] = values[wanted]


def _atomic_add(pointer: Pointer, value: int, sem: str, scope: str) -> Value:
    if value == 0:  # asked again and again, until another program has added something
        time.sleep(1e-3)
        if _run.errors or time.monotonic() > _run.deadline:
            raise TimeoutError("deadlock: a counter stays as it is, or another program failed")
    with _atomics:
        before = _load(pointer).clone()
        _store(pointer, before + value)
    return before


def _where(condition: Any, a: Any, b: Any) -> Value:
    return _value(torch.where(torch.as_tensor(condition), *_pair(a, b)))


def _run_at_once(works: Sequence[Callable[[], None]]) -> None:
    """Run some works as threads that know of their launch what this one does; raise the first error."""
    known = dict(vars(_run))

    def attempt(work: Callable[[], None]) -> None:
        vars(_run).update(known, in_flight=[])
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            _run.errors.append(error)

    threads = [threading.Thread(target=attempt, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if _run.errors:
        raise _run.errors[0]


def _warp_specialize(
    partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], num_warps: list[int], num_regs: list[int]
) -> None:
    _run_at_once([partial(function, *arguments) for function, arguments in partitions])


def _passed(argument: Any) -> Any:
    """Return an argument of a launch as the kernel sees it."""
    if isinstance(argument, torch.Tensor):
        return Pointer(argument.view(-1))
    return _value(argument) if isinstance(argument, int) else argument


class _Kernel:
    """A jitted function: called by another one, or launched over a grid, program after program or all at once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(
            *arguments: Any,
            num_warps: int,
            launch_pdl: bool = False,
            launch_cooperative_grid: bool = False,
            **constants: Any,
        ) -> None:
            passed = [_passed(argument) for argument in arguments]
            _run.num_programs, _run.errors, _run.deadline = grid[0], [], time.monotonic() + _SECONDS_UNTIL_DEADLOCK

            def run(program: int) -> None:
                _run.program = program
                self.function(*passed, **constants)

            programs = [partial(run, program) for program in range(grid[0])]
            if launch_cooperative_grid:
                _run_at_once(programs)
            else:
                for work in programs:
                    work()

        return launch


def _copy_in(desc: TensorDescriptor, coordinates: Any, barrier: Any, target: SharedMemory, pred: Any = True) -> None:
    if not bool(pred):
        return
    box = torch.zeros(desc.block_shape, dtype=desc.tensor.dtype)
    inside, place = desc.box(coordinates)
    box[place] = inside

    def copy() -> None:
        _dawdle()
        target.store(box.view(-1, desc.block_shape[-1]))
        barrier.update(0, -box.nbytes)

    threading.Thread(target=copy, daemon=True).start()


def _copy_out(desc: TensorDescriptor, coordinates: Any, source: SharedMemory) -> None:
    inside, place = desc.box(coordinates)
    inside.copy_(source.read().view(desc.block_shape)[place])


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _allocate(dtype: Any, shape: Sequence[int], layout: object) -> Any:
    if layout == "barriers":
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda index: barriers[int(index)])
    size = int(torch.tensor(shape).prod())
    return SharedMemory(torch.full((size,), torch.nan, dtype=dtype.torch), shape)


def _multiply(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    product = _Product(a, b, acc, use_acc)
    _run.in_flight.append(product)
    return product if is_async else _wait_for_products(0, (product,))


def _wait_for_products(num_outstanding: int, deps: tuple[Any]) -> Any:
    """Finish all products but the last ones; return what became of the one asked for."""
    while len(_run.in_flight) > num_outstanding:
        _run.in_flight.pop(0).finish()
    (dep,) = deps
    return dep.result if isinstance(dep, _Product) and dep.result is not None else dep


def _reduce(function: Callable[..., torch.Tensor]) -> Callable[..., Value]:
    return lambda x, axis: _value(function(x, dim=axis))


def _language() -> SimpleNamespace:
    def ignore(*_: object, **__: object) -> None:
        return None

    return SimpleNamespace(
        constexpr=lambda x: x,
        float32=Dtype(torch.float32),
        int32=Dtype(torch.int32),
        int64=Dtype(torch.int64),
        NVMMADistributedLayout=ignore,
        NVMMASharedLayout=ignore,
        BlockedLayout=ignore,
        SliceLayout=ignore,
        DotOperandLayout=ignore,
        static_range=range,
        program_id=lambda axis: _value(_run.program),
        num_programs=lambda axis: _value(_run.num_programs),
        barrier=ignore,
        load=_load,
        store=_store,
        atomic_add=_atomic_add,
        where=_where,
        minimum=lambda a, b: _value(torch.minimum(*_pair(a, b))),
        maximum=lambda a, b: _value(torch.maximum(*_pair(a, b))),
        max=_reduce(torch.amax),
        sum=_reduce(torch.sum),
        exp=lambda x: _value(torch.exp(x)),
        exp2=lambda x: _value(torch.exp2(x)),
        log2=lambda x: _value(torch.log2(x)),
        arange=lambda begin, end, layout: _value(torch.arange(begin, end)),
        zeros=lambda shape, dtype, layout: _value(torch.zeros(shape, dtype=dtype.torch)),
        zeros_like=lambda x: _value(torch.zeros_like(x)),
        full=lambda shape, value, dtype, layout: _value(torch.full(shape, value, dtype=dtype.torch)),
        convert_layout=lambda x, layout: x,
        permute=lambda x, order: _value(x.permute(order)),
        reshape=lambda x, shape: _value(x.reshape(shape)),
        split=lambda x: tuple(_value(part) for part in x.unbind(-1)),
        allocate_shared_memory=_allocate,
        warp_specialize=_warp_specialize,
    )


def emulated(name: str, monkeypatch: pytest.MonkeyPatch, uses: Sequence[str] = ()) -> ModuleType:
    """Return gluon_kernels.<name>, loaded so that its kernels run here; uses: others whose functions it calls."""
    hopper = SimpleNamespace(
        fence_async_shared=lambda: None,
        mbarrier=SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=_init,
            wait=lambda barrier, phase: barrier.wait(int(phase)),
            expect=lambda barrier, num_bytes, pred=True: barrier.update(1, num_bytes) if bool(pred) else None,
            arrive=lambda barrier, count, pred=True: barrier.update(count, 0) if bool(pred) else None,
        ),
        tma=SimpleNamespace(
            async_copy_global_to_shared=_copy_in,
            async_copy_shared_to_global=_copy_out,
            store_wait=lambda pendings: None,
        ),
        warpgroup_mma=_multiply,
        warpgroup_mma_wait=_wait_for_products,
    )
    gluon = SimpleNamespace(jit=_Kernel, language=_language())
    fakes = {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gluon.language,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=TensorDescriptor),
        "triton.language.extra.cuda": SimpleNamespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None),
    }
    used = {f"blendserve_kernels.gluon_kernels.{other}": emulated(other, monkeypatch) for other in uses}
    for module, fake in (fakes | used).items():
        monkeypatch.setitem(sys.modules, module, fake)
    path = Path(blendserve_kernels.__file__).parent / "gluon_kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"emulated_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
