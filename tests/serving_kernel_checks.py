"""The serving kernel against the operations that it replaces; run as kernel_checks.py.

Shapes: T tokens, E edits, R rank, D hidden size.
"""

from itertools import cycle

import pytest
import torch
from torch.testing import assert_close

from axolotl_reft.kernels.serving import launch_edit
from axolotl_reft.serving.edited_rows import EditedRows, RowsOfEdit, edit_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sums of float32 differ in their order, and so now and then in the last bit of others.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
TOKENS = 20
# Rows by edit.
STEPS = {
    "nothing edited": {},
    "a row": {0: [7]},
    "the last row": {1: [TOKENS - 1]},
    "all rows": {1: range(TOKENS)},
    "two sides": {0: [0, 1, 2], 1: [5, 9, 11]},
    "several adapters": {0: [3], 1: [0, 19], 4: [1, 2, 8], 7: [10, 11, 12]},
}


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def build_stacks(edits=8, rank=4, width=70):
    torch.manual_seed(0)
    m_ERD, p_ERD = random(2, edits, rank, width) / width**0.5
    return m_ERD, random(edits, rank), p_ERD


def build_rows(step, edits=8, capacity=TOKENS + 12, strengths=(1.0,)):
    """Rows of a step, in buffers that are full of what must not be used; edits have
    these strengths in turn."""
    rows = EditedRows(capacity, edits, DEVICE)
    rows.rows_T.fill_(1)
    rows.edits_T.fill_(edits - 1)
    rows.set(
        RowsOfEdit(edit, torch.tensor(list(at)).numpy(), strength)
        for (edit, at), strength in zip(step.items(), cycle(strengths), strict=False)
    )
    return rows.tensors


def edit_on_host(*tensors):
    """Edit copies by the operations, which are the CPU's."""
    copies = [None if t is None else t.cpu().clone() for t in tensors]
    edit_rows(*copies)
    return copies[:2]


def compare(hidden_TD, residual_TD, stacks, rows):
    """Both must change both tensors alike."""
    given = [None if t is None else t.cpu().clone() for t in (hidden_TD, residual_TD)]
    expected = edit_on_host(hidden_TD, residual_TD, *stacks, *rows)
    launch_edit(hidden_TD, residual_TD, *stacks, *rows)
    close, got = CLOSE[hidden_TD.dtype], (hidden_TD, residual_TD)
    for ours, theirs, before in zip(got, expected, given, strict=True):
        if before is None:
            continue
        assert ours.dtype == before.dtype
        ours = ours.cpu()
        assert_close(ours, theirs, atol=close, rtol=close)
        changed = (theirs != before).any(1)
        assert torch.equal(ours[~changed], before[~changed])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_rows_are_edited_as_by_the_operations(dtype, has_residual, step):
    hidden_TD = random(TOKENS, 70, dtype=dtype)
    residual_TD = random(TOKENS, 70, dtype=dtype) if has_residual else None
    compare(hidden_TD, residual_TD, build_stacks(), build_rows(STEPS[step]))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_rows_have_their_strengths(dtype, step):
    rows = build_rows(STEPS[step], strengths=(0.5, 1.0, -2.0))
    hidden_TD, residual_TD = random(2, TOKENS, 70, dtype=dtype)
    compare(hidden_TD, residual_TD, build_stacks(), rows)


@pytest.mark.parametrize("edits", [2, 4, 6, 8])
@pytest.mark.parametrize("rank", [1, 4, 8, 33])
def test_ranks_and_numbers_of_edits(rank, edits):
    step = {0: [4], edits - 1: [0, 6]}
    stacks, rows = build_stacks(edits, rank), build_rows(step, edits)
    compare(random(TOKENS, 70), random(TOKENS, 70), stacks, rows)


@pytest.mark.parametrize("width", [1, 64, 70, 300])
@pytest.mark.parametrize("rank", [3, 64])
def test_widths_of_one_block_of_columns_and_of_several(rank, width):
    stacks, rows = build_stacks(rank=rank, width=width), build_rows({2: [3, 5]})
    compare(random(TOKENS, width), random(TOKENS, width), stacks, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_s_output_is_rounded_before_it_is_edited(dtype):
    """1 + a tenth of its last bit is 1, of which an edit by −1 leaves nothing."""
    hidden_TD = torch.ones(TOKENS, 70, dtype=dtype, device=DEVICE)
    residual_TD = torch.full_like(hidden_TD, torch.finfo(dtype).eps / 10)
    m_ERD, b_ER, p_ERD = (torch.zeros_like(t) for t in build_stacks())
    b_ER[0, 0], p_ERD[0, 0] = -1, 1
    launch_edit(
        hidden_TD, residual_TD, m_ERD, b_ER, p_ERD, *build_rows({0: range(TOKENS)})
    )
    assert not residual_TD.any() and not hidden_TD.any()


def test_a_step_of_fewer_tokens_than_the_buffers_hold():
    rows = build_rows({0: [0], 3: [2]}, capacity=4096)
    compare(random(3, 70), random(3, 70), build_stacks(), rows)


def test_hidden_states_in_any_layout():
    stacks, rows = build_stacks(), build_rows({0: [1, 19], 1: [4]})
    for hidden_TD, residual_TD in (
        (random(70, TOKENS).T, random(TOKENS, 70)),
        (random(TOKENS, 70), random(TOKENS, 2, 70)[:, 1]),
    ):
        sum_TD = hidden_TD + residual_TD
        expected_TD, _ = edit_on_host(sum_TD, None, *stacks, *rows)
        launch_edit(hidden_TD, residual_TD, *stacks, *rows)
        edited = [1, 4, 19]
        assert not hidden_TD[edited].any()
        assert_close(
            residual_TD[edited].cpu(), expected_TD[edited], atol=2e-5, rtol=2e-5
        )


def test_an_edited_row_is_read_and_written_alone():
    """Infinite numbers elsewhere do not come in."""
    hidden_TD = torch.full((TOKENS, 70), torch.inf, device=DEVICE)
    hidden_TD[6] = 1
    launch_edit(hidden_TD, None, *build_stacks(), *build_rows({3: [6]}))
    assert hidden_TD.isfinite().all(1).nonzero().flatten().tolist() == [6]


def test_an_edit_s_matrices_are_read_alone():
    m_ERD, b_ER, p_ERD = (t.fill_(torch.inf) for t in build_stacks(rank=3))
    for tensor in (m_ERD, b_ER, p_ERD):
        tensor[3] = 1
    hidden_TD = random(TOKENS, 70)
    launch_edit(hidden_TD, None, m_ERD, b_ER, p_ERD, *build_rows({3: [6]}))
    assert hidden_TD.isfinite().all()
