"""pcs merge: several concepts as one, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..config import keep_config
from ..exit_codes import DONE
from ..options import Command, Option, grouped, number, one_of
from . import COMMANDS
from .common import MODEL_FLAGS, concept_file, open_concept, open_model, say, subjects_of
from .other_trainers import MODEL_TRANSLATE

if TYPE_CHECKING:
    from ...concept.concept import Concept

OPTIONS = (
    Option("concepts", "runs' folders or concept files", metavar="CONCEPT", many=True, group="words"),
    *grouped(
        "merging",
        Option(
            "--how",
            "optimize: Custom Diffusion's constrained least squares; blend: a weighted sum",
            one_of("way to merge", ("optimize", "blend")),
            metavar="WAY",
            otherwise="optimize if all concepts are Custom Diffusion's, else blend",
        ),
        Option(
            "--weight",
            "weight of each concept in a blend, in their order",
            number(example="0.5"),
            metavar="X",
            many=True,
            also=("--ratios",),
            otherwise="1 each",
        ),
        Option(
            "--captions", "regularization captions for optimize, one per line", metavar="FILE", otherwise="built-in"
        ),
        Option(
            "--compress",
            "compress the result to this share of its singular values",
            number(0, 1, "0.6"),
            metavar="X",
            otherwise="off",
        ),
        Option(
            "--rename",
            "a new token for one subject, OLD=NEW (of several concepts that have OLD, the first not renamed yet); "
            "or one for each concept, in their order; may be repeated",
            metavar="[OLD=]NEW",
            many=True,
        ),
    ),
    *MODEL_FLAGS,
    Option(
        "--out",
        "file for the merged concept",
        metavar="FILE",
        default="out/merged.safetensors",
        also=("--save_to", "--output_dir"),
        group="output",
    ),
)

EXAMPLES = (
    (
        'pcs merge out/mug out/tuned --how blend --weight 0.5 --weight 0.5 --rename "<one>" --rename "<two>"',
        "a weighted sum",
    ),
    (
        "pcs merge out/cat out/dog --captions captions.txt --compress 0.6 --out out/both.safetensors",
        "two Custom Diffusion concepts in one small file",
    ),
    (
        'pcs merge out/cat out/dog --rename "<dog>=<rex>" --out out/renamed.safetensors',
        "one of their subjects under another word",
    ),
)


def check(options: argparse.Namespace) -> None:
    """UsageError for what is wrong already, before anything is loaded."""
    concepts = options.concepts or []
    if len(concepts) < 2:
        raise UsageError("pcs merge needs at least two concepts: pcs merge out/cat out/dog")
    for where in concepts:
        concept_file(where)
    in_order = [text for text in options.rename or () if "=" not in text]
    if in_order and len(in_order) < len(options.rename):
        raise UsageError("--rename: give OLD=NEW each time, or a new token for each concept in their order, not both")
    for flag, values in (("--weight", options.weight), ("--rename", in_order)):
        if values and len(values) != len(concepts):
            raise UsageError(f"{flag} is given {len(values)} times for {len(concepts)} concepts; give one for each")
    check_new_words(options.rename or [])
    if options.weight and options.how == "optimize":
        raise UsageError("--weight is only for --how blend; optimize keeps every concept at full strength")
    if options.captions and not Path(options.captions).is_file():
        raise UsageError(f"--captions: {options.captions} does not exist; give a text file with one caption per line")
    if Path(options.out).is_dir():
        raise UsageError(f"--out: {options.out} is a folder; name a file, such as {options.out}/merged.safetensors")


def check_new_words(texts: list[str]) -> None:
    """UsageError where the new word of a --rename cannot be one."""
    if not texts:
        return
    from ...concept.checking import check_word

    for text in texts:
        old, equals, new = text.rpartition("=")
        if equals and not old:
            raise UsageError(f"--rename: {text!r} has no word before its '='; write OLD=NEW")
        try:
            check_word(new)
        except ValueError as error:
            raise UsageError(f"--rename: {error}") from None


def renamed(concepts: list[Concept], texts: list[str]) -> list[Concept]:
    """The concepts under the words that --rename gives their subjects."""
    subjects = [[token for token, _ in concept.subjects if token] for concept in concepts]
    if not any("=" in text for text in texts):
        for concept, known, word in zip(concepts, subjects, texts, strict=False):
            _say_which(concept, known, word)
        return [c.renamed(word) for c, word in zip(concepts, texts, strict=True)] if texts else concepts
    found = list(concepts)
    for text in texts:
        old, _, new = text.rpartition("=")
        at = next((i for i, known in enumerate(subjects) if old in known), None)
        if at is None:
            left = ", ".join(dict.fromkeys(token for known in subjects for token in known)) or "none"
            raise UsageError(f"--rename: no concept has a subject {old!r} to rename; left to rename: {left}")
        subjects[at].remove(old)
        found[at] = found[at].renamed(new, of=old)
    words = [token for concept in found for token, _ in concept.subjects if token]
    twice = next((new for _, _, new in (text.rpartition("=") for text in texts) if words.count(new) > 1), None)
    if twice:
        raise UsageError(f"--rename: two subjects would be called {twice!r}; give each a word of its own")
    return found


def _say_which(concept: Concept, known: list[str], word: str) -> None:
    """Say which of several subjects a word without OLD= renames; UsageError where that cannot be told."""
    if len(known) < 2:
        return
    each = " or ".join(f"--rename '{old}={word}'" for old in known)
    if not concept.token:
        raise UsageError(f"--rename {word}: {concept.key} has {len(known)} subjects; say which: {each}")
    say(f"--rename {word} renames {concept.token}, the first of {len(known)} subjects; to say which: {each}")


def run(options: argparse.Namespace) -> int:
    """Merge the concepts and print the file's path; the exit code."""
    check(options)
    from ...concept.blending import blend
    from ...concept.compression import compress
    from ...concept.merging import merge

    model = open_model(options)
    concepts = [open_concept(where, model) for where in options.concepts]
    concepts = renamed(concepts, options.rename or [])
    how = options.how or ("optimize" if all(c.method == "custom_diffusion" for c in concepts) else "blend")
    if how == "optimize":
        lines = Path(options.captions).read_text(encoding="utf-8").splitlines() if options.captions else []
        optimized = merge(concepts, model, [line.strip() for line in lines if line.strip()] or None)
        say(f"keys and values of the concepts' tokens are kept within {optimized.constraint_residual:.1e}")
        merged: Concept = optimized
    else:
        merged = blend(concepts, options.weight or [1.0] * len(concepts), model)
    if options.compress:
        before = merged.parameters
        merged = compress(merged, model, options.compress)
        say(f"compressed to {merged.parameters / before:.0%} of its parameters")
    path = merged.save(options.out)
    keep_config(path.with_suffix(".toml"), COMMAND, options, how=how)
    say(f"the merged concept holds {' and '.join(subjects_of(concepts))}")
    print(path)
    return DONE


COMMAND = Command(
    name="merge",
    about=COMMANDS["merge"],
    options=OPTIONS,
    examples=EXAMPLES,
    run=run,
    details="Custom Diffusion's concepts are merged by its constrained least squares, all others by a weighted sum.",
    translate=MODEL_TRANSLATE,
)
