"""A live weight made anew from its golden base and an adapter, never by adding to what is live.

So an adapter leaves no trace: with none, the live weight equals the golden one to the bit, however many came before.
"""

from __future__ import annotations

from torch import Tensor

from cuda_ext.library import launch
from cuda_ext.lora import FusedLora


def rebuild_weight(
    live: Tensor, golden: Tensor, lora: FusedLora | None, *, more: bool = False, after: bool = False
) -> None:
    """``live = golden + s B A`` (Hu et al. 2021, section 4.1), B and A per projection of a fused weight, in place.

    Rows that no part covers, or all where there is no adapter, become golden's to the bit. On the GPU all parts are
    one kernel, which sums over the ranks in float32 and rounds once.

    Args:
        live: [out, in], contiguous; overwritten.
        golden: [out, in], contiguous, in live's dtype and no part of its memory.
        lora: the adapter of this fused layer, in live's dtype.
        more: promises that the next work on this stream is a rebuild of another weight, which may then start early on
            the GPU; nothing else may, because kernels read weights before their predecessor has ended.
        after: promises that the last work on this stream was a rebuild of another weight with ``more``.

    Raises:
        ValueError: shapes or dtypes that do not fit, or golden is live itself.
    """
    if (
        live.shape != golden.shape
        or live.dtype != golden.dtype
        or not (live.is_contiguous() and golden.is_contiguous())
    ):
        raise ValueError(
            f"rebuild_weight: live {tuple(live.shape)} {live.dtype} and golden {tuple(golden.shape)} {golden.dtype} "
            "must be alike and contiguous"
        )
    if live.data_ptr() == golden.data_ptr():
        raise ValueError("rebuild_weight: live and golden are the same memory; the base would be lost")
    if lora is None or not lora.parts:
        live.copy_(golden)
        return
    if lora.a.shape[1] != live.shape[1] or lora.a.dtype != live.dtype or lora.parts[-1].last_row > live.shape[0]:
        raise ValueError(
            f"rebuild_weight: A {tuple(lora.a.shape)} {lora.a.dtype} with rows up to {lora.parts[-1].last_row} does "
            f"not fit a weight {tuple(live.shape)} {live.dtype}"
        )
    if not (live.is_cuda and lora.fits_kernels):
        rebuild_weight_reference(live, golden, lora)
        return
    if not lora.a.is_contiguous():
        raise ValueError("rebuild_weight: A must be contiguous")
    rows, columns = live.shape
    launch(
        "rebuild_weight",
        *(live, golden, rows, columns, lora.a, lora.part_structs, len(lora.parts), int(more), int(after), live.dtype),
    )


def rebuild_weight_reference(live: Tensor, golden: Tensor, lora: FusedLora | None) -> None:
    """:func:`rebuild_weight` in plain torch, on any device."""
    live.copy_(golden)
    for part in lora.parts if lora is not None else ():
        rows = slice(part.first_row, part.last_row)
        delta = part.b.float() @ lora.a[part.first_rank : part.last_rank].float()  # type: ignore[union-attr]
        live[rows] = (golden[rows].float() + part.scale * delta).to(live.dtype)
