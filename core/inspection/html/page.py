"""The page of one checkpoint: a single file that needs no network, and runs nothing from the checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..inspect import Inspection
from ..report import Facts
from ..verification import verify_container
from .document import document, publish
from .sections import (
    details_section,
    header,
    origin_section,
    size_section,
    summary,
    tensor_section,
    weights_sections,
)
from .training import curve_of, curve_section, sample_section
from .weights import Progress, Weights


def write_page(
    file: Path,
    found: Inspection,
    facts: Facts,
    *,
    overwrite: bool = False,
    progress: Progress = lambda size: None,
    sample: str = "",
) -> list[str]:
    """Write everything known about a checkpoint as a page, and return the faults of its bytes, a sentence each.

    All bytes are compared with their checksums, where that is not among the facts; weights are read twice besides, for
    statistics and histograms. `progress` receives the number of bytes read. The page appears complete or not at all.

    Raises: InputError when the file exists and must not be replaced, is not such a page, or cannot be written.
    """
    facts = dict(facts)

    def made() -> str:
        if "verification" not in facts:
            facts["verification"] = asdict(verify_container(found.container, progress))
        return page(found, facts, progress, sample=sample)

    publish(file, made, overwrite)
    return list(facts["verification"]["damaged"])


def page(
    found: Inspection,
    facts: Facts,
    progress: Progress = lambda size: None,
    *,
    weights: Weights | None = None,
    sample: str = "",
    live: str = "",
) -> str:
    """The page as text; `weights` are those read before, `sample` a text that it wrote, `live` as in `document`."""
    weights = weights or Weights.of(found, progress)
    curve = curve_of(found)
    rows = weights.rows(facts["tensors"], "" if found.bundle else found.key)
    title = Path(facts["location"]).absolute().name or facts["location"]
    body = [
        header(title, facts),
        *summary(facts, weights, curve),
        *curve_section(curve, found),
        *sample_section(sample),
        *size_section(found),
        *weights_sections(weights),
        *origin_section(facts),
        *details_section(facts),
        *tensor_section(len(rows)),
    ]
    return document(title, body, {"table": rows}, live=live)
