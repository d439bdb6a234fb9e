"""The end of a graph that is being compiled: a graph break, or the end of the model's code."""

from __future__ import annotations

from fusion_core._torch.dynamo import graph_end
from fusion_core.reason import Reason


def ending(before: str, word: str) -> Reason:
    """The reason why a word does not follow a value that nothing in its graph uses: the graph ends after it.

    Args:
        before: The word that computes the value.
        word: The word that is missing.
    """
    why, needs = graph_end(), f"{word} of it"
    if why is None:  # not compiled by this library's own backends: the cause is unknown
        return Reason("graph_end", f"the graph ends here, after {before}", needs)
    is_break, words = why
    if not is_break:
        return Reason("graph_end", f"the graph ends here, after {before}, as does the model's code", needs)
    first_line = next(iter(words.splitlines()), "")
    hint = f"Dynamo reports: {first_line}; TORCH_LOGS=graph_breaks shows where"
    return Reason("graph_break", f"the graph ends here (graph break), after {before}", needs, hint=hint)
