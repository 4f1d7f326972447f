"""Loops that numpy has no function for, in one pass over memory each, as machine code.

The difference of two BF16 matrices with its energies takes numpy eight passes, each through a core's cache, and they
take longer than the GEMM leaves; inner products in float64 of float32 arrays need each array widened first. The loops
are given to LLVM as text: compiled when they are first needed, in 60 ms, for the processor at hand, with nothing kept
on disk. (numba, which brings llvmlite, takes 2 s for the same loop at its first use, and half a second to load it
again.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock

import numpy as np
from numpy.typing import NDArray

# Written for the vectoriser: one loop over `inner` elements whose sums may be reordered, inside one that adds them up.
# The change's energy is summed in double: the residual is a small difference of such sums. What rounding accounts for
# is an estimate, and 1,024 terms at a time are summed in float.
_SUBTRACT_BF16 = """
define void @subtract_bf16(ptr noalias readonly %tuned, ptr noalias readonly %base, ptr noalias %change, i64 %rows,
                     i64 %columns, ptr noalias readonly %places, i64 %count, ptr noalias %taken, ptr noalias %sums) {
entry:
  br label %row
row:
  %r = phi i64 [0, %entry], [%r.next, %row.done]
  %row.energy = phi double [0.0, %entry], [%energy, %row.done]
  %row.grid = phi double [0.0, %entry], [%grid, %row.done]
  %row.more = icmp ult i64 %r, %rows
  br i1 %row.more, label %row.begin, label %exit
row.begin:
  %row.start = mul nuw i64 %r, %columns
  %row.stop = add nuw i64 %row.start, %columns
  br label %outer
outer:
  %start = phi i64 [%row.start, %row.begin], [%stop, %next]
  %energy = phi double [%row.energy, %row.begin], [%energy.added, %next]
  %grid = phi double [%row.grid, %row.begin], [%grid.next, %next]
  %done = icmp uge i64 %start, %row.stop
  br i1 %done, label %take, label %prepare
prepare:
  %most = add i64 %start, 1024
  %inside = icmp ult i64 %most, %row.stop
  %stop = select i1 %inside, i64 %most, i64 %row.stop
  br label %inner
inner:
  %i = phi i64 [%start, %prepare], [%i.next, %inner]
  %energy.here = phi double [%energy, %prepare], [%energy.added, %inner]
  %grid.here = phi float [0.0, %prepare], [%grid.added, %inner]
  %tuned.at = getelementptr inbounds i16, ptr %tuned, i64 %i
  %base.at = getelementptr inbounds i16, ptr %base, i64 %i
  %tuned.bits = load i16, ptr %tuned.at, align 2
  %base.bits = load i16, ptr %base.at, align 2
  %tuned.wide = zext i16 %tuned.bits to i32
  %base.wide = zext i16 %base.bits to i32
  %tuned.single = shl i32 %tuned.wide, 16
  %base.single = shl i32 %base.wide, 16
  %tuned.value = bitcast i32 %tuned.single to float
  %base.value = bitcast i32 %base.single to float
  %value = fsub float %tuned.value, %base.value
  %change.at = getelementptr inbounds float, ptr %change, i64 %i
  store float %value, ptr %change.at, align 4
  %double = fpext float %value to double
  %square = fmul reassoc contract nsz double %double, %double
  %energy.added = fadd reassoc contract nsz double %energy.here, %square
  %power.bits = and i32 %tuned.single, 2139095040 ; 0x7F800000: the power of two below the magnitude
  %power = bitcast i32 %power.bits to float
  %power.square = fmul reassoc contract nsz float %power, %power
  %grid.added = fadd reassoc contract nsz float %grid.here, %power.square
  %i.next = add nuw i64 %i, 1
  %more = icmp ult i64 %i.next, %stop
  br i1 %more, label %inner, label %next
next:
  %grid.part = fpext float %grid.added to double
  %grid.next = fadd double %grid, %grid.part
  br label %outer
take:
  %taken.start = mul nuw i64 %r, %count
  br label %take.one
take.one:
  %j = phi i64 [0, %take], [%j.next, %take.some]
  %take.more = icmp ult i64 %j, %count
  br i1 %take.more, label %take.some, label %row.done
take.some:
  %place.at = getelementptr inbounds i64, ptr %places, i64 %j
  %place = load i64, ptr %place.at, align 8
  %from = add nuw i64 %row.start, %place
  %from.at = getelementptr inbounds float, ptr %change, i64 %from
  %kept = load float, ptr %from.at, align 4
  %to = add nuw i64 %taken.start, %j
  %to.at = getelementptr inbounds float, ptr %taken, i64 %to
  store float %kept, ptr %to.at, align 4
  %j.next = add nuw i64 %j, 1
  br label %take.one
row.done:
  %r.next = add nuw i64 %r, 1
  br label %row
exit:
  store double %row.energy, ptr %sums, align 8
  %second = getelementptr inbounds double, ptr %sums, i64 1
  store double %row.grid, ptr %second, align 8
  ret void
}
"""
_INNER_PRODUCTS = """
define void @inner_products(ptr noalias readonly %arrays, ptr noalias readonly %pairs, i64 %count, i64 %size,
                            ptr noalias %totals) {
entry:
  br label %chunk
chunk: ; so short that all arrays' parts stay in the cache until each pair was multiplied
  %start = phi i64 [0, %entry], [%stop, %pair]
  %done = icmp uge i64 %start, %size
  br i1 %done, label %exit, label %prepare
prepare:
  %most = add i64 %start, 4096
  %inside = icmp ult i64 %most, %size
  %stop = select i1 %inside, i64 %most, i64 %size
  br label %pair
pair:
  %p = phi i64 [0, %prepare], [%p.next, %added]
  %more.pairs = icmp ult i64 %p, %count
  br i1 %more.pairs, label %load, label %chunk
load:
  %twice = mul nuw i64 %p, 2
  %twice.one = add nuw i64 %twice, 1
  %first.at = getelementptr inbounds i64, ptr %pairs, i64 %twice
  %second.at = getelementptr inbounds i64, ptr %pairs, i64 %twice.one
  %first.place = load i64, ptr %first.at, align 8
  %second.place = load i64, ptr %second.at, align 8
  %first.array = getelementptr inbounds ptr, ptr %arrays, i64 %first.place
  %second.array = getelementptr inbounds ptr, ptr %arrays, i64 %second.place
  %first = load ptr, ptr %first.array, align 8
  %second = load ptr, ptr %second.array, align 8
  br label %inner
inner:
  %i = phi i64 [%start, %load], [%i.next, %inner]
  %sum = phi double [0.0, %load], [%sum.added, %inner]
  %one.at = getelementptr inbounds float, ptr %first, i64 %i
  %other.at = getelementptr inbounds float, ptr %second, i64 %i
  %one = load float, ptr %one.at, align 4
  %other = load float, ptr %other.at, align 4
  %one.double = fpext float %one to double
  %other.double = fpext float %other to double
  %product = fmul reassoc contract nsz double %one.double, %other.double
  %sum.added = fadd reassoc contract nsz double %sum, %product
  %i.next = add nuw i64 %i, 1
  %more = icmp ult i64 %i.next, %stop
  br i1 %more, label %inner, label %added
added:
  %total.at = getelementptr inbounds double, ptr %totals, i64 %p
  %total = load double, ptr %total.at, align 8
  %total.added = fadd double %total, %sum.added
  store double %total.added, ptr %total.at, align 8
  %p.next = add nuw i64 %p, 1
  br label %pair
exit:
  ret void
}
"""
_NONE = np.empty(0, np.intp)
_C_TYPES = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64}


def subtract_bf16(
    tuned: NDArray[np.uint16],
    base: NDArray[np.uint16],
    out: NDArray[np.float32],
    places: NDArray[np.intp] = _NONE,
    taken: NDArray[np.float32] | None = None,
) -> tuple[float, float]:
    """Write ``tuned - base`` in float32, and some of its columns apart while they are in the cache.

    Parameters
    ----------
    tuned, base : array of uint16, shape (m n,)
        BF16 bits; contiguous.
    out : array of float32, shape (m, n)
        Contiguous; overwritten.
    places : array of int, shape (c,)
        Columns to take.
    taken : array of float32, shape (m, c), optional
        Where to put them; contiguous.

    Returns
    -------
    energy : float
        Sum of the squared differences.
    grid : float
        Sum of the squares of the powers of two below each magnitude of `tuned`.
    """
    sizes = {array.size for array in (tuned, base, out)}
    if len(sizes) > 1 or not all(array.flags.c_contiguous for array in (tuned, base, out)):
        raise ValueError(f"arrays of {sorted(sizes)} elements: expected contiguous ones of one size")
    rows, columns = out.shape
    taken = np.empty((rows, 0), np.float32) if taken is None else taken
    if taken.shape != (rows, len(places)) or not taken.flags.c_contiguous:
        raise ValueError(f"{taken.shape} for columns to take: expected a contiguous array of {(rows, len(places))}")
    if len(places) and not 0 <= places.min() <= places.max() < columns:
        raise ValueError(f"columns {places.min()} to {places.max()} to take: expected some of {columns}")
    sums, chosen = np.empty(2), np.ascontiguousarray(places, np.int64)
    _compiled(_SUBTRACT_BF16)(
        *(array.ctypes.data for array in (tuned, base, out)), rows, columns,
        chosen.ctypes.data, len(chosen), taken.ctypes.data, sums.ctypes.data,
    )  # fmt: skip
    return float(sums[0]), float(sums[1])


def inner_products(arrays: Sequence[NDArray[np.float32]], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Return inner products of float32 arrays, multiplied and summed in float64.

    Parameters
    ----------
    arrays : sequence of array of float32, shape (n,)
        Contiguous.
    pairs : sequence of (int, int)
        Places of the arrays to multiply.
    """
    sizes = {array.size for array in arrays}
    if len(sizes) > 1 or not all(array.flags.c_contiguous and array.dtype == np.float32 for array in arrays):
        raise ValueError(f"arrays of {sorted(sizes)} elements: expected contiguous ones of float32 and one size")
    if not pairs:
        return []
    chosen = np.array(pairs, np.int64)
    if not 0 <= chosen.min() <= chosen.max() < len(arrays):
        raise ValueError(f"places {chosen.min()} to {chosen.max()}: expected those of {len(arrays)} arrays")
    at, totals = np.array([array.ctypes.data for array in arrays], np.uintp), np.zeros(len(pairs))
    _compiled(_INNER_PRODUCTS)(at.ctypes.data, chosen.ctypes.data, len(pairs), sizes.pop(), totals.ctypes.data)
    found: list[float] = totals.tolist()
    return found


_COMPILING = Lock()


def _compiled(code: str) -> Callable[..., None]:
    """Return the function that this code defines."""
    with _COMPILING:  # a thread that compiled it once more would lose the engine while the code runs
        return _compile(code)


@cache
def _compile(code: str) -> Callable[..., None]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    module = llvm.parse_assembly(code)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.loop_unrolling = True
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    [defined] = (function for function in module.functions if not function.is_declaration)
    arguments = [_C_TYPES[str(argument.type)] for argument in defined.arguments]
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(defined.name))

    # ctypes lets other threads run meanwhile; the engine owns the code and must live as long as the function.
    def call(*arguments: int, _engine: object = engine) -> None:
        function(*arguments)

    return call
