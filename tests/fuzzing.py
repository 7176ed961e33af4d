"""What the fuzz tests share: a fixed order, any value, and what a refusal is."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fixed")

LONG = "a" * 100_000
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**63, -(2**64), 10**30, 1 << 10_000]),
    st.floats(),
    st.sampled_from(["", "8", "8.0", "1e1", "yes", "٣", "f٣", "8\n", "\ufeff8", LONG]),
    st.text(max_size=6),
    st.dates(),
    st.datetimes(),
    st.binary(max_size=3),
)


def _larger(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=2)


# What a YAML can hold.
VALUES = st.recursive(SCALARS, _larger, max_leaves=6)


def refusal(error: Exception) -> str:
    """Its message; it is ours, not another library's, and short enough to be read."""
    assert type(error) is ValueError, repr(error)
    message = str(error)
    assert (": " in message or "; " in message) and len(message) < 4000, message
    return message
