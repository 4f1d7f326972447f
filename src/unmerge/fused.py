"""The difference of two BF16 matrices with its energies in one pass over memory, as machine code.

numpy needs eight passes for it, each through a core's cache, and they take longer than the GEMM leaves. The loop is
given to LLVM as text: compiled when it is first needed, in 50 ms, for the processor at hand, with nothing kept on disk.
(numba, which brings llvmlite, takes 2 s for the same loop at its first use, and half a second to load it again.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

_NAME = "subtract_bf16"
# Written for the vectoriser: one loop over `inner` elements whose sums may be reordered, inside one that adds them up.
# The change's energy is summed in double: the residual is a small difference of such sums. What rounding accounts for
# is an estimate, and 1,024 terms at a time are summed in float.
_CODE = f"""
define void @{_NAME}(ptr noalias readonly %tuned, ptr noalias readonly %base, ptr noalias %change, i64 %rows,
                     i64 %columns, ptr noalias readonly %places, i64 %count, ptr noalias %taken, ptr noalias %sums) {{
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
}}
"""
_NONE = np.empty(0, np.intp)


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
    _compiled()(
        *(array.ctypes.data for array in (tuned, base, out)), rows, columns,
        chosen.ctypes.data, len(chosen), taken.ctypes.data, sums.ctypes.data,
    )  # fmt: skip
    return float(sums[0]), float(sums[1])


@cache
def _compiled() -> Callable[..., None]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(_CODE)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.loop_unrolling = True
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(
        None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 2
    )
    function = prototype(engine.get_function_address(_NAME))

    # ctypes lets other threads run meanwhile; the engine owns the code and must live as long as the function.
    def call(*arguments: int, _engine: object = engine) -> None:
        function(*arguments)

    return call
