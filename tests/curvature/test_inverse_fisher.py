"""Tests of lightning_curvature/curvature/inverse_fisher.py and of its two forms."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_curvature.curvature import column_blocks, fisher_entries, fisher_primal
from lightning_curvature.curvature.inverse_fisher import InverseFisher
from tests.helpers.mfac_recursion import static_diagonal
from tests.helpers.ranks import RankPool, world

Form = Literal["primal", "dual"]
FORMS: list[Form] = ["primal", "dual"]
DAMPING = 0.02
# Gradients, columns, block size: one of each, blocks that divide the columns and that do not, more
# gradients than columns, blocks larger than all columns.
SIZES = [
    (1, 1, None),
    (1, 7, 3),
    (3, 1, 1),
    (5, 12, None),
    (5, 12, 4),
    (5, 13, 4),
    (12, 5, None),
    (6, 7, 100),
    (40, 30, 8),
    (2, 30, 1),
]


def dense(gradients: Tensor, damping: float, block_size: int | None = None) -> Tensor:
    """Return the damped Fisher matrix, without what is between two blocks."""
    wide = gradients.double()
    d = wide.shape[1]
    block = torch.arange(d) // (block_size or d)
    matrix = wide.T @ wide / len(wide) * (block.unsqueeze(1) == block)
    return matrix + damping * torch.eye(d, dtype=torch.float64)


def constrained(matrix: Tensor, weights: Tensor, pruned: Tensor) -> Tensor:
    """Return what minimizes 1/2 dw^T H dw with dw = -w where pruned, with multipliers."""
    d, chosen = len(weights), pruned.nonzero().view(-1)
    unit = torch.eye(d, dtype=matrix.dtype)[chosen]
    corner = matrix.new_zeros(len(chosen), len(chosen))
    system = torch.cat([torch.cat([matrix, unit.T], 1), torch.cat([unit, corner], 1)])
    right = torch.cat([torch.zeros_like(weights), -weights[chosen]])
    return torch.linalg.solve(system, right)[:d]


@pytest.fixture(params=[None, 1, 40], ids=lambda entries: f"tiles of {entries}")
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with tiles that hold everything, as little as possible, and a bit."""
    if request.param is not None:
        for module in (column_blocks, fisher_entries, fisher_primal):
            monkeypatch.setattr(module, "TILE_ENTRIES", request.param)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "d", "block_size"), SIZES)
class TestDense:
    """Against dense matrices in float64."""

    def made(self, m: int, d: int, block_size: int | None, form: Form) -> tuple[Any, Tensor]:
        gradients = torch.randn(m, d, dtype=torch.float64)
        inverse = InverseFisher(gradients, DAMPING, block_size=block_size, form=form)
        assert inverse.form == form
        assert inverse.shape == (d, d)
        assert inverse.block_size == min(block_size or d, d)
        assert (inverse.num_grads, inverse.damping) == (m, DAMPING)
        return inverse, dense(gradients, DAMPING, block_size)

    def test_products(self, m: int, d: int, block_size: int | None, form: Form) -> None:
        inverse, matrix = self.made(m, d, block_size, form)
        for shape in ((d,), (d, 1), (d, 3), (d, 0)):
            x = torch.randn(shape, dtype=torch.float64)
            before = x.clone()
            found = inverse @ x
            torch.testing.assert_close(found, torch.linalg.inv(matrix) @ x)
            torch.testing.assert_close(matrix @ found, x)
            assert torch.equal(x, before)

    def test_entries(self, m: int, d: int, block_size: int | None, form: Form) -> None:
        inverse, matrix = self.made(m, d, block_size, form)
        expected = torch.linalg.inv(matrix)
        diagonal = inverse.diagonal()
        assert diagonal.dtype == torch.float64
        torch.testing.assert_close(diagonal, expected.diagonal())
        rows, columns = (x.flatten() for x in torch.meshgrid(2 * [torch.arange(d)], indexing="ij"))
        order = torch.randperm(d * d)
        found = inverse.elements(rows[order], columns[order])
        torch.testing.assert_close(found, expected.flatten()[order])
        block = torch.arange(d) // (block_size or d)
        apart = block[rows[order]] != block[columns[order]]
        assert (found[apart] == 0).all()

    def test_submatrices(self, m: int, d: int, block_size: int | None, form: Form) -> None:
        inverse, matrix = self.made(m, d, block_size, form)
        expected = torch.linalg.inv(matrix)
        # Columns of several blocks in a group, and some twice.
        groups = torch.randint(d, (25, 4))
        found = inverse.submatrices(groups)
        wanted = expected[groups.unsqueeze(2), groups.unsqueeze(1)]
        torch.testing.assert_close(found, wanted)
        assert inverse.submatrices(groups[:0]).shape == (0, 4, 4)

    def test_joint_update(self, m: int, d: int, block_size: int | None, form: Form) -> None:
        inverse, matrix = self.made(m, d, block_size, form)
        weights = torch.randn(d, dtype=torch.float64)
        for share in (0.0, 0.4, 1.0):
            pruned = torch.rand(d) < share
            found = inverse.joint_update(weights, pruned)
            torch.testing.assert_close(found, constrained(matrix, weights, pruned))
            assert torch.equal(found[pruned], -weights[pruned])
            if share == 0:
                assert (found == 0).all()

    def test_logdet(self, m: int, d: int, block_size: int | None, form: Form) -> None:
        inverse, matrix = self.made(m, d, block_size, form)
        torch.testing.assert_close(inverse.logdet(), torch.logdet(matrix))


@pytest.mark.parametrize("m", [3, 4, 5])
def test_the_smaller_form_is_chosen(m: int) -> None:
    inverse = InverseFisher(torch.randn(m, 12), block_size=4)
    assert inverse.form == ("primal" if m >= 4 else "dual")
    assert repr(inverse) == (
        "InverseFisher(shape=(12, 12), damping=1e-05, block_size=4, "
        f"num_grads={m}, form='{inverse.form}')"
    )


@pytest.mark.parametrize("form", FORMS)
class TestRows:
    """Gradients of every kind."""

    def test_zero_rows_count(self, form: Form) -> None:
        gradients = torch.randn(4, 9, dtype=torch.float64)
        rows = torch.cat([gradients, torch.zeros(2, 9, dtype=torch.float64)])
        x = torch.randn(9, dtype=torch.float64)
        with_zeros = InverseFisher(rows, DAMPING, form=form)
        torch.testing.assert_close(dense(rows, DAMPING) @ (with_zeros @ x), x)
        declared = InverseFisher(gradients, DAMPING, form=form, num_grads=6)
        assert declared.num_grads == 6
        torch.testing.assert_close(declared @ x, with_zeros @ x)
        torch.testing.assert_close(declared.diagonal(), with_zeros.diagonal())
        torch.testing.assert_close(declared.logdet(), with_zeros.logdet())
        pruned = x > 0
        update = declared.joint_update(x, pruned)
        torch.testing.assert_close(update, with_zeros.joint_update(x, pruned))

    def test_only_zero_rows(self, form: Form) -> None:
        inverse = InverseFisher(torch.zeros(2, 5), 0.25, form=form, block_size=2)
        assert (inverse @ torch.ones(5)).tolist() == [4.0] * 5
        assert inverse.diagonal().tolist() == [4.0] * 5

    @pytest.mark.parametrize("damping", [1e-8, 1e-5, 1e-2, 1.0])
    def test_duplicates_and_dampings(self, form: Form, damping: float) -> None:
        # Six gradients of rank 2: both G G^T and G^T G are singular.
        rows = torch.randn(2, 5).repeat(3, 1)
        inverse = InverseFisher(rows, damping, form=form)
        x = torch.randn(5, dtype=torch.float64)
        expected = torch.linalg.inv(dense(rows, damping))
        torch.testing.assert_close(inverse @ x, expected @ x, rtol=1e-6, atol=0)
        torch.testing.assert_close(inverse.diagonal(), expected.diagonal(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_rows_in_few_bits_are_taken_as_they_are(self, form: Form, dtype: torch.dtype) -> None:
        rows = torch.randn(6, 10).to(dtype)
        x = torch.randn(10, dtype=torch.float64)
        found, exact = (
            InverseFisher(r, 1e-4, block_size=4, form=form) for r in (rows, rows.double())
        )
        assert torch.equal(found @ x, exact @ x)
        assert torch.equal(found.diagonal(), exact.diagonal())
        assert torch.equal(found.joint_update(x, x > 0), exact.joint_update(x, x > 0))

    def test_order_of_rows_does_not_matter(self, form: Form) -> None:
        rows, x = torch.randn(7, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
        one, other = (InverseFisher(r, 1e-3, form=form) for r in (rows, rows[torch.randperm(7)]))
        torch.testing.assert_close(one @ x, other @ x, rtol=1e-9, atol=0)
        torch.testing.assert_close(one.diagonal(), other.diagonal(), rtol=1e-9, atol=0)

    def test_order_of_columns_goes_along(self, form: Form) -> None:
        rows, order = torch.randn(4, 9, dtype=torch.float64), torch.randperm(9)
        one, other = (InverseFisher(r, 1e-3, form=form) for r in (rows, rows[:, order]))
        torch.testing.assert_close(one.diagonal()[order], other.diagonal(), rtol=1e-9, atol=0)

    def test_what_is_given_is_left_alone(self, form: Form) -> None:
        rows = torch.randn(4, 9).T.contiguous().T.requires_grad_()  # not contiguous
        before = rows.detach().clone()
        inverse = InverseFisher(rows, DAMPING, form=form)
        x = torch.randn(9, requires_grad=True)
        pruned = x.detach() > 0
        answers = [inverse @ x, inverse.diagonal(), inverse.joint_update(x, pruned)]
        assert not any(answer.requires_grad for answer in answers)
        assert torch.equal(rows.detach(), before)
        assert rows.grad is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_answers_have_the_dtype_of_the_question(self, form: Form, dtype: torch.dtype) -> None:
        inverse = InverseFisher(torch.randn(4, 9), DAMPING, form=form, device="cpu")
        x = torch.randn(9).to(dtype)
        exact = inverse @ x.double()
        assert torch.equal(inverse @ x, exact.to(dtype))
        # A matrix that is not contiguous.
        columns = x.repeat(2, 1).T
        torch.testing.assert_close(inverse @ columns, torch.stack([exact, exact], 1).to(dtype))
        update = inverse.joint_update(x, x > 0)
        assert update.dtype == dtype
        assert torch.equal(update[x > 0], -x[x > 0])


def test_many_vectors() -> None:
    gradients = torch.randn(4, 300, dtype=torch.float64)
    inverse = InverseFisher(gradients, DAMPING)
    found = inverse @ torch.eye(300, dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.inv(dense(gradients, DAMPING)))


# Where the recursion fails


def scaled_gradients(m: int, d: int) -> Tensor:
    """Return gradients whose coordinates differ by orders of magnitude, in float32."""
    generator = torch.Generator().manual_seed(3)
    scales = 10 ** (3 * torch.rand(d, generator=generator) - 2)
    return torch.randn(m, d, generator=generator) * scales


@pytest.mark.parametrize(("m", "damping", "negative"), [(1024, 1e-7, 20), (512, 1e-5, 0)])
def test_diagonal_where_a_recursion_in_float32_fails(m: int, damping: float, negative: int) -> None:
    """Sizes of published recipes; a negative entry would be pruned first."""
    d, block_size = 400, 50
    gradients = scaled_gradients(m, d)
    exact = torch.linalg.inv(dense(gradients, damping, block_size)).diagonal()
    recursion = torch.cat(
        [static_diagonal(rows, damping) for rows in gradients.split(block_size, 1)]
    )
    assert int((recursion <= 0).sum()) >= negative
    assert float((recursion / exact - 1).abs().max()) > 0.1
    for form in FORMS:
        found = InverseFisher(gradients, damping, block_size=block_size, form=form).diagonal()
        assert (found > 0).all()
        assert float((found / exact - 1).abs().max()) < (1e-10 if form == "primal" else 1e-5)


# Joint updates


@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("m", [6, 60])
def test_joint_update_increases_less_than_the_sum_of_single_ones(
    m: int, block_size: int | None
) -> None:
    d = 40
    gradients = torch.randn(m, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
    inverse = InverseFisher(gradients, 1e-2, block_size=block_size)
    matrix = dense(gradients, 1e-2, block_size)
    weights = torch.randn(d, dtype=torch.float64)
    pruned = torch.rand(d) < 0.5
    single = inverse @ torch.where(pruned, -weights / inverse.diagonal(), 0.0)
    single = torch.where(pruned, -weights, single)
    removal = torch.where(pruned, -weights, 0.0)
    joint, summed, none = (
        float(0.5 * x @ matrix @ x)
        for x in (inverse.joint_update(weights, pruned), single, removal)
    )
    assert joint < 0.95 * min(summed, none)


def test_joint_update_of_one_weight_is_the_single_update() -> None:
    inverse = InverseFisher(torch.randn(5, 12, dtype=torch.float64), DAMPING)
    weights = torch.randn(12, dtype=torch.float64)
    unit = torch.zeros(12, dtype=torch.float64)
    unit[3] = 1
    expected = -weights[3] / inverse.diagonal()[3] * (inverse @ unit)
    torch.testing.assert_close(inverse.joint_update(weights, unit.bool()), expected)


# Memory


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        # A view of what was there takes no memory.
        views = {"aten::slice.Tensor", "aten::detach", "aten::alias", "aten::transpose.int"}
        for x in answer if isinstance(answer, (tuple, list)) else (answer,):
            if isinstance(x, Tensor) and func.name() not in views:
                self.size = max(self.size, x.numel())
        return answer


@pytest.mark.parametrize("block_size", [None, 4096, 64])
def test_temporary_tensors_are_small(
    block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = 1 << 14
    for module in (column_blocks, fisher_entries, fisher_primal):
        monkeypatch.setattr(module, "TILE_ENTRIES", entries)
    m, d = 16, 1 << 15
    gradients, x = torch.randn(m, d), torch.randn(d)
    groups = torch.arange(d).view(-1, 4)
    largest = LargestTensor()
    with largest:
        inverse = InverseFisher(gradients, block_size=block_size)
        inverse.diagonal()
        inverse @ x
        inverse.joint_update(x, x > 0)
        inverse.logdet()
    # Cores of blocks of 64 columns are a quarter of the gradients; the rest are vectors.
    cores = -(-d // (block_size or d)) * m * m
    assert largest.size <= max(d, 2 * entries, cores)
    with largest:
        inverse.submatrices(groups)
    assert largest.size <= max(4 * d, 2 * entries, cores)


# Columns of several ranks


def of_rank(gradients: Tensor, x: Tensor, pruned: Tensor, edge: int) -> dict[str, Tensor]:
    """Return what a rank finds for its columns, those up to an edge or those from there on."""

    def summed(value: Tensor) -> Tensor:
        torch.distributed.all_reduce(value)
        return value

    rank, _ = world()
    mine = slice(None, edge) if rank == 0 else slice(edge, None)
    inverse = InverseFisher(gradients[:, mine], 1e-4, sum_over_ranks=summed)
    columns = torch.arange(inverse.shape[0]).view(-1, 1)
    return {
        "product": inverse @ x[mine],
        "diagonal": inverse.diagonal(),
        "entries": inverse.submatrices(columns).flatten(),
        "update": inverse.joint_update(x[mine], pruned[mine]),
        "logdet": inverse.logdet().view(1),
    }


@pytest.mark.ddp
@pytest.mark.parametrize("edge", [7, 20, 0])
@pytest.mark.parametrize("m", [5, 30])
def test_columns_of_two_ranks(ranks: RankPool, m: int, edge: int) -> None:
    gradients = torch.randn(m, 20, dtype=torch.float64)
    x = torch.randn(20, dtype=torch.float64)
    pruned = torch.rand(20) < 0.4
    first, second = ranks.run(of_rank, gradients, x, pruned, edge)
    whole = InverseFisher(gradients, 1e-4, form="dual")
    expected = {
        "product": whole @ x,
        "diagonal": whole.diagonal(),
        "entries": whole.diagonal(),
        "update": whole.joint_update(x, pruned),
    }
    for name, value in expected.items():
        found = torch.cat([first[name], second[name]])
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)
    for answers in (first, second):
        torch.testing.assert_close(answers["logdet"], whole.logdet().view(1))


def error_of_rank() -> str:
    """Return what a rank says if another one has gradients that are not finite."""

    def summed(value: Tensor) -> Tensor:
        torch.distributed.all_reduce(value)
        return value

    gradients = torch.ones(3, 2)
    if world()[0] == 1:
        gradients[1, 0] = math.nan
    with pytest.raises(ValueError, match="not finite") as caught:
        InverseFisher(gradients, sum_over_ranks=summed)
    return str(caught.value)


@pytest.mark.ddp
def test_all_ranks_refuse_what_one_cannot_use(ranks: RankPool) -> None:
    message = "Invalid gradients: entries are not finite "
    assert ranks.run(error_of_rank) == [message + "on another rank.", message + "in rows [1]."]


# Errors

ONES = torch.ones(2, 3)


def with_entry(value: float, dtype: torch.dtype) -> Tensor:
    gradients = torch.ones(3, 4, dtype=dtype)
    gradients[1, 2] = value
    return gradients


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"damping": 0.0}, ValueError, "Invalid damping=0.0: must be > 0."),
        ({"damping": -1e-5}, ValueError, "Invalid damping=-1e-05: must be > 0."),
        ({"damping": math.nan}, ValueError, "Invalid damping=nan: must be > 0."),
        ({"damping": math.inf}, ValueError, r"Invalid damping=inf: must be in \[0, inf\)."),
        ({"damping": "0.1"}, TypeError, "Invalid damping='0.1': must be a number"),
        ({"block_size": 0}, ValueError, "Invalid block_size=0: must be an integer >= 1."),
        ({"block_size": -1}, ValueError, "Invalid block_size=-1: must be an integer >= 1."),
        ({"block_size": 2.0}, TypeError, "Invalid block_size=2.0: must be an integer >= 1"),
        ({"num_grads": 0}, ValueError, "Invalid num_grads=0: must be an integer >= 1."),
        (
            {"form": "both"},
            ValueError,
            "Invalid form='both': must be one of 'auto', 'primal', 'dual'.",
        ),
        (
            {"gradients": torch.ones(3)},
            ValueError,
            r"Invalid gradients of shape \[3\]: must be \[m, d\] with m >= 1.",
        ),
        (
            {"gradients": torch.ones(0, 3)},
            ValueError,
            r"Invalid gradients of shape \[0, 3\]: must be \[m, d\] with m >= 1.",
        ),
        (
            {"gradients": torch.ones(2, 3, dtype=torch.int64)},
            TypeError,
            "Invalid gradients of dtype torch.int64: must be floating-point.",
        ),
        *(
            (
                {"gradients": with_entry(value, dtype)},
                ValueError,
                r"Invalid gradients: entries are not finite in rows \[1\].",
            )
            for value in (math.nan, math.inf, -math.inf)
            for dtype in (torch.bfloat16, torch.float32, torch.float64)
        ),
        (
            {"sum_over_ranks": lambda x: x, "block_size": 2},
            ValueError,
            r"Columns of several ranks \(sum_over_ranks\) must be one block in the dual form. "
            "Got: block_size=2, form='auto'.",
        ),
        (
            {"sum_over_ranks": lambda x: x, "form": "primal"},
            ValueError,
            "Got: block_size=None, form='primal'.",
        ),
    ],
)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str, form: Form | None
) -> None:
    if form is not None and not {"form", "sum_over_ranks"} & arguments.keys():
        arguments = {**arguments, "form": form}
    with pytest.raises(error, match=message):
        InverseFisher(**{"gradients": ONES, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda inverse: inverse @ torch.ones(2),
            ValueError,
            r"Invalid x of shape \[2\]: must be \[3\] or \[3, k\].",
        ),
        (
            lambda inverse: inverse @ torch.ones(3, 1, 1),
            ValueError,
            r"Invalid x of shape \[3, 1, 1\]: must be \[3\] or \[3, k\].",
        ),
        (
            lambda inverse: inverse @ torch.tensor([1, 2, 3]),
            TypeError,
            "Invalid x of dtype torch.int64: must be floating-point.",
        ),
        (
            lambda inverse: inverse.elements(torch.tensor([0]), torch.tensor([0, 1])),
            ValueError,
            r"Invalid rows and columns of shapes \[1\] and \[2\]: must be \[n\], the same for both",
        ),
        (
            lambda inverse: inverse.submatrices(torch.tensor([0])),
            ValueError,
            r"Invalid groups of shape \[1\]: must be \[n, k\].",
        ),
        (
            lambda inverse: inverse.submatrices(torch.tensor([[0.0]])),
            TypeError,
            "Invalid columns of dtype torch.float32: must be torch.int64.",
        ),
        (
            lambda inverse: inverse.submatrices(torch.tensor([[0, 3]])),
            ValueError,
            "Invalid columns from 0 to 3: must be from 0 to 2.",
        ),
        (
            lambda inverse: inverse.elements(torch.tensor([-1]), torch.tensor([1])),
            ValueError,
            "Invalid columns from -1 to 1: must be from 0 to 2.",
        ),
        (
            lambda inverse: inverse.joint_update(torch.ones(3), torch.ones(3)),
            TypeError,
            "Invalid pruned of dtype torch.float32: must be torch.bool.",
        ),
        (
            lambda inverse: inverse.joint_update(torch.ones(2), torch.ones(3) > 0),
            ValueError,
            r"Invalid weights of shape \[2\]: must be \[3\].",
        ),
        (
            lambda inverse: inverse.joint_update(torch.ones(3), torch.ones(4) > 0),
            ValueError,
            r"Invalid pruned of shape \[4\]: must be \[3\].",
        ),
        (
            lambda inverse: inverse.joint_update(torch.tensor([1, 2, 3]), torch.ones(3) > 0),
            TypeError,
            "Invalid weights of dtype torch.int64: must be floating-point.",
        ),
    ],
)
def test_questions(
    call: Callable[[InverseFisher], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(InverseFisher(ONES))


def test_damping_too_small_for_float64() -> None:
    """An error names what is wrong, instead of a diagonal that is zero or negative."""
    gradients = 1e6 * torch.ones(3, 4)
    advice = "damping=1e-12 is too small, beside these gradients, for float64. Raise it."
    with pytest.raises(RuntimeError, match=f"block 0 of 2 is not positive definite: {advice}"):
        InverseFisher(gradients, 1e-12, form="primal", block_size=2).diagonal()
    with pytest.raises(RuntimeError, match=f"(not positive definite|first in column 0): {advice}"):
        InverseFisher(gradients, 1e-12, form="dual", block_size=2).diagonal()
