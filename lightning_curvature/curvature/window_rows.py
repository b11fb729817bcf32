"""Rows of a wide matrix that are multiplied with at every step, in little memory and few passes.

The m rows of d numbers are kept as chunks of columns, ``[chunks, m, width]``: a chunk is one block
of memory, which products read once, and which is copied to the device in one go where the rows lie
in host memory. Both products, G x and c^T G, are bound by memory: one pass over the rows each.

Rows may be kept in half precision. Every row then has a scale of its own, a power of two, so that
neither large nor small rows lose more than their last bits.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature.checks import check_choice, check_count

__all__ = ["Placement", "RowDtype", "WindowRows", "row_dtype_of"]

RowDtype = Literal["auto", "float32", "bfloat16", "float16"]
Placement = Literal["device", "host"]

# Columns of a chunk on a CPU: few enough for the vectors to stay in the cache, and enough entries
# in all for the calls not to count. And bytes of the part of a chunk that is converted at a time,
# which stay in the second-level cache while the chunk is read from memory once.
_CPU_WIDTHS = (4096, 16384)
_CPU_ENTRIES = 1 << 20
_PART = 1 << 19
# Entries of a chunk on other devices, where every chunk is a few kernel launches.
_DEVICE_ENTRIES = 1 << 24
# Largest exponents that scaled entries have: float16 has few, of which small entries need most.
_EXPONENTS = {torch.bfloat16: 0, torch.float16: 15}


def row_dtype_of(row_dtype: RowDtype, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that rows are kept in.

    Args:
        row_dtype: What the user asked for; "auto" for the precision of the arithmetic.
        dtype: Precision of the arithmetic.

    Raises:
        ValueError: If ``row_dtype`` is none of the words.

    Examples:
        >>> row_dtype_of("auto", torch.float64)
        torch.float64
    """
    check_choice("row_dtype", row_dtype, ("auto", "float32", "bfloat16", "float16"))
    if row_dtype == "auto":
        return dtype
    found: torch.dtype = getattr(torch, row_dtype)
    return found


class WindowRows:
    """A matrix G of m rows and d columns; rows are replaced one at a time.

    Args:
        num_rows: m, at least 1.
        num_columns: d, at least 1.
        dtype: Precision of vectors of d numbers: float32 or float64.
        stored: Dtype of the rows: ``dtype``, or one with fewer bits.
        device: Where vectors are.
        placement: Where rows are: "device", or "host" for (pinned) memory of the CPU, from where
            they stream to the device.
        gram_dtype: Precision in which `products` sums: float64, or float32 with partial sums of
            thousands of entries added up in float64.
    """

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        *,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        placement: Placement = "device",
        gram_dtype: torch.dtype = torch.float64,
    ) -> None:
        check_count("num_rows", num_rows)
        check_count("num_columns", num_columns)
        self.num_rows = num_rows
        self.num_columns = num_columns
        self.dtype = dtype
        self.stored = stored
        self.device = torch.device(device)
        self.gram_dtype = torch.float64 if dtype == torch.float64 else gram_dtype
        least, most = _CPU_WIDTHS
        limit = min(max(_CPU_ENTRIES // num_rows, least), most)
        if self.device.type != "cpu":
            limit = max(_DEVICE_ENTRIES // num_rows, least)
        num_chunks = -(-num_columns // limit)
        self.width = -(-num_columns // num_chunks)
        self.on_host = placement == "host" and self.device.type != "cpu"
        self._data = torch.zeros(
            (num_chunks, num_rows, self.width),
            dtype=stored,
            device="cpu" if self.on_host else self.device,
            pin_memory=self.on_host and torch.cuda.is_available(),
        )
        self._is_scaled = stored in _EXPONENTS
        self.scales = torch.ones(num_rows, dtype=dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return self._data.numel() * self._data.element_size()

    # Single rows

    def rounded(self, values: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a vector as a row would keep it, in the rows' dtype, and its scale.

        Args:
            values: Vector of d finite numbers.
            largest: Largest absolute value, where other columns of the row are elsewhere.
        """
        one = self.scales.new_ones(())
        if not self._is_scaled:
            return values.to(self.stored), one
        if largest is None:
            largest = torch.linalg.vector_norm(values, float("inf"))
        exponent = torch.frexp(largest.to(self.dtype)).exponent - _EXPONENTS[self.stored]
        # Neither zero nor infinite, whatever the size of the entries.
        tiny = torch.finfo(self.dtype).tiny
        scale = torch.ldexp(one, exponent).clamp(tiny, 2 / tiny)
        return (values / scale).to(self.stored), scale

    def read(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return a row in the rows' dtype, a copy, and its scale.

        Args:
            index: Number of the row; a 0-dim tensor on the device where the rows are there.
        """
        if isinstance(index, Tensor):
            row = self._data.index_select(1, index.view(1))
            scale = self.scales.index_select(0, index.view(1)).view(())
        else:
            row = self._data[:, index].to(self.device)
            scale = self.scales[index].clone()
        return row.reshape(-1)[: self.num_columns].clone(), scale

    def write(self, index: int | Tensor, row: Tensor, scale: Tensor) -> None:
        """Replace a row.

        Args:
            index: See `read`.
            row: The row in the rows' dtype, as `rounded` returns it.
            scale: Its scale.
        """
        chunks = self._padded(row, self.stored).view(-1, self.width)
        if isinstance(index, Tensor):
            self._data.index_copy_(1, index.view(1), chunks.unsqueeze(1))
            self.scales.index_copy_(0, index.view(1), scale.view(1))
        else:
            self._data[:, index].copy_(chunks)
            self.scales[index] = scale

    def widened(self, row: Tensor, scale: Tensor) -> Tensor:
        """Return the numbers that a row stands for."""
        values = row.to(self.dtype)
        return values * scale if self._is_scaled else values

    # Products

    def products(self, x: Tensor) -> Tensor:
        """Return G x in float64; one pass over the rows.

        Args:
            x: ``[d]`` or ``[d, k]``.

        Returns:
            ``[m]`` or ``[m, k]``.
        """
        if x.ndim > 1:
            return torch.stack([self.products(column) for column in x.unbind(1)], 1)
        parts = self._padded(x, self.gram_dtype).view(-1, self.width)
        total = x.new_zeros(self.num_rows, dtype=torch.float64)
        part_of_rows = self._part(self.gram_dtype)
        # Autocast would take products in half precision where no memory for them is given.
        sums = parts.new_empty(self.num_rows)
        for chunk, part in zip(self._chunks(), parts, strict=True):
            if chunk.dtype == part.dtype:
                total += torch.mv(chunk, part, out=sums)
                continue
            for start in range(0, len(chunk), len(part_of_rows)):
                rows = chunk[start : start + len(part_of_rows)]
                wide = part_of_rows[: len(rows)].copy_(rows)
                some = sums[start : start + len(rows)]
                total[start : start + len(rows)] += torch.mv(wide, part, out=some)
        return total * self.scales if self._is_scaled else total

    def combination(self, coefficients: Tensor) -> Tensor:
        """Return the sum of the rows, each times its coefficient; one pass over the rows.

        Args:
            coefficients: ``[m]`` or ``[m, k]``, float64.

        Returns:
            ``[d]`` or ``[d, k]``.
        """
        if coefficients.ndim > 1:
            columns = [self.combination(column) for column in coefficients.unbind(1)]
            return torch.stack(columns, 1)
        if self._is_scaled:
            coefficients = coefficients * self.scales
        factors = coefficients.to(self.dtype)
        found = self.scales.new_empty(len(self._data) * self.width)
        part_of_rows = self._part(self.dtype)
        for chunk, part in zip(self._chunks(), found.view(-1, self.width), strict=True):
            if chunk.dtype == factors.dtype:
                torch.mv(chunk.T, factors, out=part)
                continue
            for start in range(0, len(chunk), len(part_of_rows)):
                rows = chunk[start : start + len(part_of_rows)]
                wide = part_of_rows[: len(rows)].copy_(rows)
                some = factors[start : start + len(rows)]
                # The first ones do not add up to what the memory held before, whatever it was.
                torch.addmv(part, wide.T, some, beta=int(start > 0), out=part)
        return found[: self.num_columns]

    def _part(self, dtype: torch.dtype) -> Tensor:
        """Return memory for the rows of a chunk that are converted at a time; empty for none."""
        if dtype == self.stored:
            return self.scales.new_empty(0)
        size = self.num_rows
        if self.device.type == "cpu":
            most = _PART * torch.get_num_threads() // (self.width * dtype.itemsize)
            size = min(size, max(most, 1))
        return torch.empty((size, self.width), dtype=dtype, device=self.device)

    def _padded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a vector in a dtype, with zeros up to the last column of the last chunk."""
        size = len(self._data) * self.width
        if size == len(x):
            return x.to(dtype).contiguous()
        padded = x.new_empty(size, dtype=dtype)
        padded[: len(x)].copy_(x)
        padded[len(x) :].zero_()
        return padded

    def _chunks(self) -> Iterator[Tensor]:
        """Yield the chunks on the device; the next one is on its way while one is worked on."""
        if not self.on_host:
            yield from self._data
            return
        copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        working = torch.cuda.current_stream(self.device)
        ahead: Tensor | None = None
        for number in range(len(self._data) + 1):
            ready = ahead
            if number < len(self._data):
                copies.wait_stream(working)
                with torch.cuda.stream(copies):
                    ahead = self._data[number].to(self.device, non_blocking=True)
            if ready is not None:
                ready.record_stream(working)
                yield ready
            working.wait_stream(copies)

    # All of it

    def matrix(self) -> Tensor:
        """Return G, ``[m, d]`` in the rows' dtype and without scales: a copy in host memory."""
        device = "meta" if self._data.is_meta else "cpu"
        found = torch.empty((self.num_rows, self.num_columns), dtype=self.stored, device=device)
        for chunk, start in zip(self._data, range(0, self.num_columns, self.width), strict=True):
            part = found[:, start : start + self.width]
            part.copy_(chunk[:, : part.shape[1]])
        return found

    def load(self, matrix: Tensor, scales: Tensor) -> None:
        """Take rows over.

        Args:
            matrix: ``[m, d]``, as `matrix` returns it; columns it lacks stay as they are.
            scales: Scales of the rows, ``[m]``.
        """
        for start in range(0, self.num_columns, self.width):
            part = matrix[:, start : start + self.width]
            self._data[start // self.width, :, : part.shape[1]].copy_(part)
        self.scales.copy_(scales)
