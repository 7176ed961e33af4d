"""The rows of a step in their buffers, and the operation that edits them.

Shapes: T tokens, N rows, E edits, R rank, D hidden size.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from axolotl_reft.serving.edited_rows import EditedRows, RowsOfEdit, edit_rows

TOKENS, EDITS, RANK, WIDTH = 12, 6, 3, 20
CPU = torch.device("cpu")
STEPS = {
    "nothing": {},
    "a row": {2: [5]},
    "rows side by side": {0: [0, 1, 2]},
    "scattered rows": {1: [0, 4, 11]},
    "all rows": {5: range(TOKENS)},
    "several edits": {0: [3], 1: [4, 5], 4: [0, 11], 5: [1, 2, 6]},
}


def build_rows(step):
    rows = EditedRows(TOKENS, EDITS, CPU)
    set_rows(rows, step)
    return rows


def set_rows(rows, step):
    rows.set(RowsOfEdit(edit, np.array(list(at))) for edit, at in step.items())


def build_stacks():
    torch.manual_seed(0)
    m_ERD, p_ERD = torch.randn(2, EDITS, RANK, WIDTH)
    return m_ERD, torch.randn(EDITS, RANK), p_ERD


def random(shape, dtype):
    """Hidden states in memory that is not theirs alone."""
    return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]


def edit_one_by_one(sum_TD, step, m_ERD, b_ER, p_ERD):
    edited_TD = sum_TD.clone()
    for edit, rows in step.items():
        for row in rows:
            x_D = sum_TD[row].float()
            source_R = m_ERD[edit] @ x_D + b_ER[edit]
            edited_TD[row] = (x_D + source_R @ p_ERD[edit]).to(sum_TD.dtype)
    return edited_TD


@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (1, TOKENS, WIDTH)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_an_output_is_edited_in_place(name, dtype, shape):
    step, stacks = STEPS[name], build_stacks()
    hidden = random(shape, dtype)
    before_TD = hidden.view(TOKENS, WIDTH).clone()
    expected_TD = edit_one_by_one(before_TD, step, *stacks)
    edit_rows(hidden, None, *stacks, *build_rows(step).tensors)
    check(hidden.view(TOKENS, WIDTH), expected_TD, before_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_a_sum_is_edited_in_the_place_of_the_residual(name, dtype):
    step, stacks = STEPS[name], build_stacks()
    hidden_TD, residual_TD = random((2, TOKENS, WIDTH), dtype)
    before = hidden_TD.clone(), residual_TD.clone()
    sum_TD = hidden_TD + residual_TD
    expected_TD = edit_one_by_one(sum_TD, step, *stacks)
    edit_rows(hidden_TD, residual_TD, *stacks, *build_rows(step).tensors)
    check(hidden_TD + residual_TD, expected_TD, sum_TD)
    edited = sorted(row for rows in step.values() for row in rows)
    assert not hidden_TD[edited].any()
    others = [row for row in range(TOKENS) if row not in edited]
    assert torch.equal(hidden_TD[others], before[0][others])
    assert torch.equal(residual_TD[others], before[1][others])


def check(got_TD, expected_TD, before_TD):
    close = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}
    close = close[got_TD.dtype]
    assert got_TD.dtype == expected_TD.dtype
    assert_close(got_TD, expected_TD, atol=close, rtol=close)
    unchanged = (expected_TD == before_TD).all(1)
    assert torch.equal(got_TD[unchanged], before_TD[unchanged])


def test_the_sum_is_rounded_before_it_is_edited():
    """As transformers adds it: a tenth of the last bit of 1 is lost."""
    for dtype in (torch.bfloat16, torch.float16):
        hidden_TD = torch.ones(TOKENS, WIDTH, dtype=dtype)
        residual_TD = torch.full_like(hidden_TD, torch.finfo(dtype).eps / 10)
        m_ERD, b_ER, p_ERD = (torch.zeros_like(t) for t in build_stacks())
        b_ER[0, 0], p_ERD[0, 0] = -1, 1
        rows = build_rows({0: range(TOKENS)})
        edit_rows(hidden_TD, residual_TD, m_ERD, b_ER, p_ERD, *rows.tensors)
        assert not residual_TD.any()


# Rows and their strength, by edit; some edits have several.
STRENGTHS = [(0, [3], 0.5), (0, [7, 8], 2), (2, [1], 1), (4, [0, 11], -1), (5, [5], 0)]


def at_strengths(sum_TD, found, stacks):
    edited_TD = sum_TD.clone()
    for edit, at, strength in found:
        whole_TD = edit_one_by_one(sum_TD, {edit: at}, *stacks)
        edited_TD[at] = sum_TD[at] + strength * (whole_TD[at] - sum_TD[at])
    return edited_TD


@pytest.mark.parametrize("has_residual", [True, False])
def test_rows_have_their_strengths(has_residual):
    stacks, (hidden_TD, residual_TD) = build_stacks(), torch.randn(2, TOKENS, WIDTH)
    before_TD = hidden_TD + residual_TD if has_residual else hidden_TD.clone()
    expected_TD = at_strengths(before_TD, STRENGTHS, stacks)
    rows, residual_TD = EditedRows(TOKENS, EDITS, CPU), residual_TD * has_residual
    rows.set(RowsOfEdit(edit, np.array(at), s) for edit, at, s in STRENGTHS)
    residual = residual_TD if has_residual else None
    edit_rows(hidden_TD, residual, *stacks, *rows.tensors)
    assert_close(hidden_TD + residual_TD, expected_TD, atol=1e-4, rtol=1e-4)
    assert torch.equal((hidden_TD + residual_TD)[5], before_TD[5])


def test_rows_side_by_side_have_strengths_in_turn():
    """As decode steps of several requests have."""
    strengths, stacks = [0.5, 2.0, 0.5, 1.0], build_stacks()
    given_TD = torch.randn(TOKENS, WIDTH)
    found = [(3, [row], strength) for row, strength in enumerate(strengths)]
    rows, hidden_TD = EditedRows(TOKENS, EDITS, CPU), given_TD.clone()
    rows.set([RowsOfEdit(3, np.arange(4), np.array(strengths))])
    edit_rows(hidden_TD, None, *stacks, *rows.tensors)
    expected_TD = at_strengths(given_TD, found, stacks)
    assert_close(hidden_TD, expected_TD, atol=1e-4, rtol=1e-4)


def test_a_step_forgets_the_strengths_of_the_one_before():
    rows = EditedRows(TOKENS, EDITS, CPU)
    rows.set([RowsOfEdit(0, np.arange(9), 0.5)])
    assert rows.strengths_T1.tolist() == [0.5] * 9 + [1] * (TOKENS - 9) + [1]
    rows.set([RowsOfEdit(1, np.arange(2), 2), RowsOfEdit(0, np.arange(3))])
    assert rows.strengths_T1.tolist() == [1] * 3 + [2] * 2 + [1] * (TOKENS - 5) + [1]
    rows.set(())
    rows.set([RowsOfEdit(1, np.arange(TOKENS))])
    assert rows.strengths_T1.tolist() == [1] * TOKENS + [0]


def test_full_strength_is_as_exact_beside_another():
    stacks, given_TD = build_stacks(), torch.randn(TOKENS, WIDTH)
    results = []
    for others in ([], [RowsOfEdit(0, np.array([6]), 0.5)]):
        rows, hidden_TD = EditedRows(TOKENS, EDITS, CPU), given_TD.clone()
        rows.set([RowsOfEdit(1, np.arange(3)), *others])
        edit_rows(hidden_TD, None, *stacks, *rows.tensors)
        results.append(hidden_TD[:3])
    assert torch.equal(*results)


def test_hidden_states_that_cannot_be_viewed_as_rows_fail():
    """An edit of a copy would be lost."""
    hidden = torch.randn(4, 2, WIDTH).transpose(0, 1)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        edit_rows(hidden, None, *build_stacks(), *build_rows({0: [1]}).tensors)


def test_the_buffers_hold_rows_in_the_order_of_their_edits():
    rows = EditedRows(TOKENS, EDITS, CPU)
    # Two requests with the adapter of edits 2 and 3, then one with that of edit 0.
    found = [(2, [0, 1]), (3, [4]), (2, [5]), (3, []), (0, [9, 10])]
    rows.set(RowsOfEdit(edit, np.array(at, dtype=np.int64)) for edit, at in found)
    assert rows.starts_E1.tolist() == [0, 2, 2, 5, 6, 6, 6]
    assert rows.rows_T[:6].tolist() == [9, 10, 0, 1, 5, 4]
    assert rows.edits_T[:6].tolist() == [0, 0, 2, 2, 2, 3]


def test_a_step_forgets_the_rows_of_the_one_before():
    rows = build_rows(STEPS["several edits"])
    tensors = rows.tensors
    set_rows(rows, {3: [7]})
    assert rows.starts_E1.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (rows.rows_T[0], rows.edits_T[0]) == (7, 3)
    rows.set(())
    assert not rows.starts_E1.any()
    set_rows(rows, {0: [1]})
    assert rows.starts_E1.tolist() == [0] + [1] * EDITS
    # A captured graph reads them where they were.
    assert all(a is b for a, b in zip(tensors, rows.tensors, strict=True))


def test_torch_s_own_checks_of_an_operation():
    hidden_TD, residual_TD = torch.randn(2, TOKENS, WIDTH)
    rest = *build_stacks(), *build_rows(STEPS["several edits"]).tensors
    operation = torch.ops.axolotl_reft.edit_rows.default
    for residual in (residual_TD, None):
        torch.library.opcheck(operation, (hidden_TD, residual, *rest))


def test_a_compiled_layer_follows_the_rows_of_each_step():
    """In one graph, which is compiled while nothing is edited."""
    rows, stacks = EditedRows(TOKENS, EDITS, CPU), build_stacks()

    def layer(hidden_TD, residual_TD):
        hidden_TD, residual_TD = hidden_TD * 2, residual_TD + 1
        before_TD = hidden_TD + residual_TD
        edit_rows(hidden_TD, residual_TD, *stacks, *rows.tensors)
        return before_TD, hidden_TD.sin(), residual_TD * 3

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for step in STEPS.values():
        set_rows(rows, step)
        given = torch.randn(2, TOKENS, WIDTH)
        stance = "fail_on_recompile" if step else "default"
        with torch.compiler.set_stance(stance):
            got = compiled(*given)
        assert_close(got, layer(*given))
    torch._dynamo.reset()
