"""Changes of a file's bytes that find what a reader takes on trust."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st


def change_bytes(draw: st.DrawFn, content: bytes, pieces: st.SearchStrategy[bytes], others: Sequence[bytes]) -> bytes:
    """One to four times, at any place, something changed, put in, taken out, repeated, or taken from another file.

    Args:
        pieces: what is put in.
        others: whole files.
    """
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        match draw(st.sampled_from(["change", "insert", "delete", "splice", "cut", "repeat"])):
            case "change":
                piece = draw(pieces)
                changed[at : at + len(piece)] = piece
            case "insert":
                changed[at:at] = draw(pieces)
            case "delete":
                del changed[at : at + draw(st.integers(1, 20))]
            case "splice":
                other = draw(st.sampled_from(others))
                changed[at:] = other[draw(st.integers(0, len(other))) :]
            case "cut":
                del changed[at:]
            case "repeat":
                changed[at:at] = changed[max(0, at - draw(st.integers(1, 60))) : at] * draw(st.integers(1, 30))
    return bytes(changed)
