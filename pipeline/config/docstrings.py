"""Reads the meanings of parameters from docstrings: a class or function describes each one as "`name`: ..."."""

import inspect
import re
from collections.abc import Collection, Iterable

# "`name`:", "`name: value`", "`a` and `b`:" at the beginning of a sentence.
_HEAD = re.compile(r"(?P<names>`[^`]+`(?:(?:, | and |, and )`[^`]+`)*)(?P<colon>:)?\s+")
# The meanings of parameters that many classes and functions have, for those that do not describe them.
SHARED_MEANINGS = {
    "norm": "The normalisation layers: `batch` normalisation of each worker's images, `sync` batch normalisation over "
    "the images of all workers, or `group` normalisation.",
    "init": "The distribution of the first weights: `gaussian` is N(0, 0.01^2), `he` N(0, 2 / fan_in) (He et al. "
    "2015), `xavier` uniform (Glorot and Bengio 2010), `default` that of torch or of the library.",
    "pool": "How a feature map becomes a vector: `avg` is the mean over its positions, `flatten` keeps every position.",
    "hidden": "The widths of the hidden layers. []: a linear layer.",
    "dropout": "The probability of dropout after the first hidden layer.",
    "label_smoothing": "The share of every target that is spread over all classes.",
    "stem": "The first layers: `imagenet` reduces the resolution, `cifar` keeps it, for small images.",
}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`(])")


def parse_parameter_meanings(docstrings: Iterable[str | None], names: Collection[str]) -> dict[str, str]:
    """Returns what the docstrings say about the parameters `names`; a parameter that none describes is left out.

    The first docstring that describes a parameter counts. A sentence that begins with "`name`:" or "`name: value`"
    begins a description, which ends with its paragraph or at the next such sentence. A parameter without a description
    of its own is described by the sentences that mention it, else by `SHARED_MEANINGS`.
    """
    paragraphs = [paragraph for text in docstrings if text for paragraph in _split_paragraphs(text)]
    found: dict[str, str] = {}
    for paragraph in paragraphs:
        for name, meaning in _parse_definitions(paragraph, names).items():
            found.setdefault(name, meaning)
    for name in names:
        mentions = [s for p in paragraphs for s in _SENTENCE_END.split(p) if re.search(rf"`{name}(`|:)", s)]
        if name not in found and mentions:
            found[name] = " ".join(mentions)
        elif name not in found and name in SHARED_MEANINGS:
            found[name] = SHARED_MEANINGS[name]
    return found


def summarize(docstring: str | None) -> str:
    """Returns the paragraphs of a docstring up to `Raises:` as one line each; "" if there is none."""
    return "\n\n".join(_split_paragraphs(docstring or ""))


def _split_paragraphs(docstring: str) -> list[str]:
    """Returns the paragraphs of a docstring, each as one line, up to `Raises:`. A list item is a paragraph."""
    text = re.split(r"\n\s*Raises\b[^\n]*:\n", inspect.cleandoc(docstring))[0]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*- )|\n(?=`)", text)
    return [" ".join(paragraph.removeprefix("- ").split()) for paragraph in paragraphs if paragraph.strip()]


def _parse_definitions(paragraph: str, names: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    current: list[str] = []
    for sentence in _SENTENCE_END.split(paragraph):
        head = _HEAD.match(sentence)
        defined = _defined_names(head, names) if head else []
        if head and defined:
            current = defined
            sentence = _strip_head(sentence, head)
        for name in current:
            found[name] = f"{found[name]} {sentence}" if name in found else sentence
    return {name: _capitalize(meaning) for name, meaning in found.items()}


def _capitalize(sentence: str) -> str:
    """Returns a sentence that begins with a capital letter, unless its first word is a symbol of one letter."""
    return sentence if re.match(r"\w\b", sentence) else sentence[0].upper() + sentence[1:]


def _defined_names(head: re.Match[str], names: Collection[str]) -> list[str]:
    """Returns the parameters that the beginning of a sentence defines: all of them with a colon, else `name: value`."""
    terms = re.findall(r"`([^`]+)`", head["names"])
    known = [name for name in dict.fromkeys(term.partition(":")[0] for term in terms) if name in names]
    return known if head["colon"] or any(":" in term for term in terms) else []


def _strip_head(sentence: str, head: re.Match[str]) -> str:
    """Removes "`name`: ", and turns "`name: value` ..." into "`value` ..."."""
    if ":" not in head["names"]:
        return sentence[head.end() :]
    return re.sub(r"`\w+: ([^`]+)`", r"`\1`", sentence[: head.end()]) + sentence[head.end() :]
