"""The ledger in the report: every claim with its verdict, what was compared to reach it, and where its runs are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline import claims, config, drawing, figures, grid, identities, intervals, measures
from pipeline import markdown as md
from pipeline.claims import Entry
from pipeline.results import Gallery

SOURCES = {
    "000": "A. V. Gupta and B. Shankar, *Variational Autoencoders Artificial Neural Network Architecture*",
    "001": "S. Vilhes, *Variational Auto-Encoders* (2023)",
    "002": "A. Saleh, *On Variational Autoencoders: Generative Models for Dimension Reduction* (2019)",
    "003": "K. Mammadov, *Autoencoder and Variational Autoencoders* (lecture, 2024)",
    "004": "C. Idler, *AIML 425, Assignment 2, Problem 2* (2022)",
}
OTHER = "Other sources"
CONTROLS = "Controls"
HOW_IT_IS_DECIDED = (
    "A claim stands in its study's file, and no verdict is typed in. The unit is the seed: everything else is averaged first, "
    "and two sides are paired by seed. p is two-sided, from Student's t over seeds; a claim of several parts has the p of its "
    "weakest part (an intersection-union test), which may be larger than its interval suggests. *Holm* is p corrected over all "
    "claims that ran: below 0.05 a claim is **supported** or **contradicted**, else *undecided*, and so is one with fewer than "
    f"{claims.FEWEST_SEEDS} seeds or with a cell that has not converged. Claims that are added therefore raise the *Holm* of "
    "all others. A count is taken to spread by half a step at least. The effect is the difference of the two sides, or of "
    "their changes; the last level of an axis minus the first; how far a count is off its number; or the measure itself where "
    "it is held against bounds. In MLflow's search box `tags.claims LIKE '% ID %'` shows the runs of the claim of that id."
)
TINY = 1e-16
ROUNDING = 1e-4


def section(entries: Sequence[Entry], picture: str) -> str:
    """The ledger: a sentence, one table a source, first those of which claims ran, and `picture`, the plot of all intervals."""
    known = [entry for entry in entries if entry.claim.control is None]
    ran = {_source(entry) for entry in known if entry.verdict != claims.NOT_RUN}
    known.sort(key=lambda entry: (_source(entry) not in ran, _source(entry)))
    tables = [
        part
        for heading, of_source in itertools.groupby(known, key=_source)
        for part in (f"### {heading}", _table(list(of_source)))
    ]
    return md.join("## The ledger", _tally(known), HOW_IT_IS_DECIDED, *tables, _controls(entries), picture)


def _source(entry: Entry) -> str:
    number = entry.claim.source.split(",")[0]
    return f"{number}: {SOURCES[number]}" if number in SOURCES else OTHER


def _tally(entries: Sequence[Entry]) -> str:
    verdicts = (*figures.VERDICT_COLOURS, claims.NOT_RUN)
    counts = {verdict: sum(entry.verdict == verdict for entry in entries) for verdict in verdicts}
    told = [f"{count} {'is' if count == 1 else 'are'} {verdict}" for verdict, count in counts.items()]
    return f"Of {len(entries)} claims {', '.join(told)}."


def _table(entries: Sequence[Entry]) -> str:
    """Claims that ran, and below them those that did not."""
    ran = [_row(entry) for entry in entries if entry.verdict != claims.NOT_RUN]
    others = [_not_run(entry) for entry in entries if entry.verdict == claims.NOT_RUN]
    header = ["claim", "it says", "verdict", "effect", "on", "seeds", "p", "Holm"]
    return md.join(
        md.table(header, ran) if ran else "", md.folded(f"{len(others)} not run", md.bullets(others)) if others else ""
    )


def _row(entry: Entry) -> list[str]:
    name = f"[{entry.claim.id}](#{anchor(entry.study)})"
    says, effect = md.escape(entry.claim.says), intervals.with_bounds(entry.effect)
    p_values = [_p(entry.p), _p(entry.corrected)]
    return [name, says, _verdict(entry), effect, _measure(entry.claim.test), str(entry.effect.seeds), *p_values]


def _not_run(entry: Entry) -> str:
    return f"{entry.claim.id} (`{entry.note}`): {md.escape(entry.claim.says)}"


def _measure(test: config.Test) -> str:
    """What the effect is an effect on."""
    first, *others = config.choices(test.metric)
    return md.escape(measures.find(first).label) + (f" and {len(others)} more" if others else "")


def _verdict(entry: Entry) -> str:
    if entry.verdict in ("supported", "contradicted"):
        return f"**{entry.verdict}**"
    return f"*{entry.verdict}*" + (f": {entry.note}" if entry.note else "")


def _p(value: float) -> str:
    """To two digits; to three where two could not tell it from the level at which a claim is decided."""
    if value < TINY:
        return "< 10⁻¹⁶"
    text = intervals.plain(value, 2)
    return intervals.plain(value, 3) if text == intervals.plain(claims.LEVEL, 2) else text


def _controls(entries: Sequence[Entry]) -> str:
    """The claims that are known to hold or to fail: they check the ledger."""
    controls = [entry for entry in entries if entry.claim.control is not None]
    if not controls:
        return ""
    wanted = {True: "supported", False: "contradicted"}
    wrong = [entry.claim.id for entry in controls if entry.verdict not in (wanted[entry.claim.control], claims.NOT_RUN)]
    ran = all(entry.verdict != claims.NOT_RUN for entry in controls)
    found = "They come out as they must." if ran else "Not all of them ran."
    if wrong:
        found = f"**Not as they must: {', '.join(wrong)}.**"
    return md.join(f"### {CONTROLS}", f"Claims whose truth is known check the ledger itself. {found}", _table(controls))


def identities_section(gallery: Gallery) -> str:
    """What the sources derive: checked where it is exact, without training."""
    outcomes = {identity.id: identity.check() for identity in identities.IDENTITIES.values()}
    rows = [_identity_row(identity, outcomes[identity.id]) for identity in identities.IDENTITIES.values()]
    intro = "These need no sweep: they are computed whenever the report is written, and the tests assert them."
    errata = md.bullets(f"{source}: {says}" for _, source, says in identities.ERRATA)
    header = ["identity", "source", "it says", "found", "deviation", "tolerance"]
    shares = {id: 0.0 if _is_rounding(outcome) else outcome.deviation / outcome.tolerance for id, outcome in outcomes.items()}
    caption = "How far the two sides of each identity lie apart, as a share of what is tolerated; rounding is drawn at 0."
    shown = gallery.show("identities", figures.identities(shares), caption)
    return md.join("## Identities and errata", intro, md.table(header, rows), shown, "### Errata of the sources", errata)


def _is_rounding(outcome: identities.Outcome) -> bool:
    """Its digits differ from machine to machine."""
    return outcome.holds and outcome.tolerance < ROUNDING


def _identity_row(identity: identities.Identity, outcome: identities.Outcome) -> list[str]:
    deviation = "rounding" if _is_rounding(outcome) else intervals.plain(outcome.deviation, 2)
    found = "**holds**" if outcome.holds else "**fails**"
    numbers = [found, deviation, intervals.plain(outcome.tolerance, 2)]
    return [identity.id, md.escape(identity.source), md.escape(identity.says), *numbers]


# One study's claims


def anchor(study: str) -> str:
    """Where the figure of a study's claims is."""
    return f"claims-of-{study.lower()}"


def study_section(entries: Sequence[Entry], studies: Mapping[str, config.Study], picture: str) -> str:
    """The figure of a study's claims, and what each compared."""
    if not entries:
        return ""
    sentences = [f"**{entry.claim.id}** ({md.escape(entry.claim.source)}): {_estimand(entry, studies)}" for entry in entries]
    heading = f"### Claims of {entries[0].study}"
    return md.join(heading, picture, md.folded("What each claim compares", md.bullets(sentences)))


def _estimand(entry: Entry, studies: Mapping[str, config.Study]) -> str:
    test = entry.claim.test
    shown = test.sides[:2]  # an interaction's others are the bases of these
    sides = [_side(test, side, studies[str(side.get("study", entry.study))]) for side in shown]
    over = "".join(f", over {md.words(axis)}" for axis in test.varied)
    if isinstance(test, config.Interaction):
        over = f", each as its change from {_choices(test.base)}"
    rule = ", ".join(f"{key} {md.value(value)}" for key, value in _rule(test))
    return f"`{test.kind}` ({rule}): {' against '.join(sides)}{over}."


def _side(test: config.Test, side: Mapping[str, Any], study: config.Study) -> str:
    """The measures, the cells of which they are taken, and the axes that these are averaged over."""
    rows = [cell.row() for cell in grid.cells(study) if config.chooses(side, cell.row(), test.varied)]
    found = {axis: dict.fromkeys(row[axis] for row in rows if row[axis] is not None) for axis in rows[0]}
    metrics = ", ".join(f"`{metric}`" for metric in config.choices(side["metric"]))
    chosen = _choices({key: value for key, value in side.items() if key != "metric" and found.get(key, True)})
    left = [axis for axis, values in found.items() if len(values) > 1 and axis not in {"seed", *test.varied}]
    averaged = ", ".join(f"{md.words(axis)} {md.values(found[axis])}" for axis in left)
    return metrics + (f" of {chosen}" if chosen else "") + (f" (averaged over {averaged})" if averaged else "")


def _choices(side: Mapping[str, Any]) -> str:
    return ", ".join(f"{md.words(key)} {md.values(config.choices(value))}" for key, value in side.items())


def _rule(test: config.Test) -> Iterable[tuple[str, Any]]:
    named = ((key, getattr(test, key, None)) for key in ("direction", "margin", "above", "below", "number"))
    return [(key, value) for key, value in named if value is not None]


def panels(entries: Sequence[Entry]) -> list[figures.ClaimPanel]:
    """What the figure of some claims shows: every seed on every side or level."""
    return [_panel(entry) for entry in entries if not math.isnan(entry.effect.mean)]


def _panel(entry: Entry) -> figures.ClaimPanel:
    test, metrics = entry.claim.test, config.choices(entry.claim.test.metric)
    values = np.stack([side.by_seed.to_numpy(dtype=float) for side in entry.sides])
    limits = [value for key, value in _rule(test) if key in ("above", "below", "number") and not isinstance(value, str)]
    label = measures.find(metrics[0]).label if len(metrics) == 1 else f"mean of {', '.join(metrics)}"
    label = f"change of {label}" if isinstance(test, config.Interaction) else label
    axis = "".join(md.words(axis) for axis in test.varied)
    return figures.ClaimPanel(entry.claim.id, entry.verdict, label, axis, _ticks(entry), values, limits)


def _ticks(entry: Entry) -> list[str]:
    """What each side is called: what not all sides choose, or its level."""
    if entry.claim.test.varied:
        return [side.level for side in entry.sides]
    sides = [{"study": entry.study, **side} for side in entry.claim.test.sides[: len(entry.sides)]]
    if len(sides) == 1:
        return [""]
    differ = [key for key in dict.fromkeys(key for side in sides for key in side) if len({side.get(key) for side in sides}) > 1]
    return [", ".join(_tick(key, side[key]) for key in differ if key in side) or "all" for side in sides]


def _tick(key: str, choice: Any) -> str:
    values = ", ".join(str(drawing.ARM_LABELS.get(value, value)) for value in config.choices(choice))
    return values if key in ("arm", "metric", "study") else f"{md.words(key)} {values}"
