"""Changes to the bytes of a file, as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "remove", "double"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, mutations) -> bytes:
    for how, where, value in mutations:
        at = where % max(len(data), 1)
        end = at + len(value)
        data = {
            "flip": data[:at] + bytes(b ^ 1 << value[0] % 8 for b in data[at : at + 1]) + data[at + 1 :],
            "set": data[:at] + value + data[end:],
            "cut": data[:at],
            "insert": data[:at] + value + data[at:],
            "remove": data[:at] + data[end:],
            "double": data[:at] + data[at : at + 40] + data[at:],
        }[how]
    return data
