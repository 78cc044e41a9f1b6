"""Which weights of a pruned tensor are kept: one bit each."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import next_power_of_2

BYTES = 128  # mask bytes per step of a kernel: 8 weights for each of 128 threads, one 16-byte access of bfloat16
INDEX_BLOCK = 1 << 19  # weights whose 64-bit positions exist at a time on the CPU
# the eight weights of a mask byte as eight bools, packed into one int64 so that one gather unpacks a byte
UNPACK = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.uint8).view(torch.int64).squeeze(1)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """Bool [R, columns] of packed bits [R, ceil(columns / 8)]."""
    table = UNPACK.to(bits.device)
    dense = table.index_select(0, bits.reshape(-1).to(torch.int32)).view(torch.bool)
    return dense.view(bits.shape[0], 8 * bits.shape[1])[:, :columns]


@torch.library.custom_op("ds_llm::packed_positions", mutates_args=())
def packed_positions(bits: Tensor, nnz: int, columns: int) -> Tensor:
    """Flat positions [nnz] of the kept weights, int32 where they fit, else int64."""
    index = torch.empty(nnz, dtype=_index_dtype(bits, columns), device=bits.device)
    rows, done = max(1, INDEX_BLOCK // max(columns, 1)), 0
    for i in range(0, bits.shape[0], rows):
        found = unpack(bits[i : i + rows], columns).reshape(-1).nonzero().squeeze(1)
        index[done : done + len(found)] = found.add_(i * columns)
        done += len(found)
    return index


@packed_positions.register_fake
def _(bits, nnz, columns):
    return torch.empty(nnz, dtype=_index_dtype(bits, columns), device=bits.device)


def _index_dtype(bits: Tensor, columns: int) -> torch.dtype:
    return torch.int32 if bits.shape[0] * columns < 2**31 else torch.int64


def row_tile(row_bytes: int) -> int:
    """Mask bytes per step for rows of `row_bytes`."""
    return min(BYTES, next_power_of_2(row_bytes))


class PackedMask(torch.nn.Module):
    """Which weights of a [..., C] tensor are kept: one bit each, and where each row's values start.

    bits: uint8 [R, ceil(C / 8)], bit i of byte j is column 8 j + i; padding bits are 0. offsets: int64 [R + 1]. R is
    the product of the leading dimensions, so expert weights [E, R, C] count as E * R rows. A module, so that both are
    buffers of the layer that holds it: saved, loaded and moved with it.
    """

    def __init__(self, bits: Tensor, offsets: Tensor, shape: tuple[int, ...]):
        super().__init__()
        self.shape = torch.Size(shape)
        rows = self.shape[:-1].numel()
        if bits.shape != (rows, -(-self.shape[-1] // 8)) or offsets.shape != (rows + 1,):
            raise ValueError(f"bits {list(bits.shape)} and offsets {list(offsets.shape)} do not fit {list(shape)}")
        self.register_buffer("bits", bits)
        self.register_buffer("offsets", offsets)
        # flat positions of the kept weights, used on the CPU only: a gather is ten times a bit scan there
        self.register_buffer("_index", None, persistent=False)
        self.nnz = self._count()

    @classmethod
    def from_dense(cls, mask: Tensor) -> PackedMask:
        """Packs a bool mask [..., C] (True = kept) of two or more dimensions."""
        if mask.dtype != torch.bool or mask.dim() < 2:
            raise ValueError(f"expected a bool mask of at least 2 dimensions, got {mask.dtype} {list(mask.shape)}")
        rows = mask.reshape(mask.shape[:-1].numel(), mask.shape[-1])
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).view(torch.uint8)
        bits = torch.zeros(rows.shape[0], padded.shape[1] // 8, dtype=torch.uint8, device=mask.device)
        for i in range(8):
            bits |= padded[:, i::8] << i
        offsets = torch.zeros(rows.shape[0] + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(rows.sum(1), 0, out=offsets[1:])
        return cls(bits, offsets, tuple(mask.shape))

    @classmethod
    def from_state(cls, state: dict) -> PackedMask:
        """The mask whose `state()` this is."""
        return cls(state["bits"], state["offsets"], tuple(state["shape"]))

    def state(self) -> dict:
        """bits, offsets and shape, for a checkpoint that does not go through `state_dict`."""
        return {"bits": self.bits, "offsets": self.offsets, "shape": tuple(self.shape)}

    def to_dense(self) -> Tensor:
        """The bool mask, of `shape`."""
        return unpack(self.bits, self.shape[-1]).view(self.shape)

    def positions(self) -> Tensor | None:
        """Flat positions [nnz] of the kept weights on the CPU, kept once computed; None on other devices."""
        if self._index is None and self.bits.device.type == "cpu":
            self._index = packed_positions(self.bits, self.nnz, self.shape[-1])
        return self._index

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, kept={self.nnz}"

    def _apply(self, fn, recurse=True):
        self._index = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._index = None
        super()._load_from_state_dict(*args, **kwargs)
        self.nnz = self._count()

    def _count(self) -> int | None:
        """Kept weights, unknown while the buffers wait on the meta device for a checkpoint."""
        return None if self.offsets.is_meta else int(self.offsets[-1])
