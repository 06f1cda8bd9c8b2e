"""An audit for people, for GitHub's annotations and as JUnit's XML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from xml.etree import ElementTree

from spikepatch.auditing.fault import Audit, Fault
from spikepatch.report.terminal import wrapped
from spikepatch.residual.map import pattern

_GITHUB = {"note": "notice", "at-risk": "warning", "unstable": "error"}


def lines(audit: Audit, *, width: int = 80, details: bool = False) -> Iterator[str]:
    """What was found, the worst first; notes in a line each, with ``details`` in full."""
    found = (
        "learned weights" if audit.learned else f"most matrices: {audit.scheme}" if audit.scheme else "no one scheme"
    )
    yield f"{audit.source}: {audit.worst or 'nothing found'} ({audit.architecture}, {found})"
    for fault in audit.findings:
        short = fault.severity == "note" and not details
        yield from wrapped(f"  {fault.severity}: {fault.what}", width)
        yield from (f"    {name}" for name in named(fault)[: 3 if short else None])
        if not short:
            yield from wrapped(f"    expected {fault.expected}; measured {fault.measured}", width)
            yield from wrapped(f"    remedy: {fault.remedy}", width)
    for text in audit.not_said:
        yield from wrapped(f"  nothing is said of {text}", width)


def named(fault: Fault) -> list[str]:
    """The parameters: one by its name, several of one pattern as that, with their number."""
    counts = Counter(map(pattern, fault.parameters))
    first = {pattern(name): name for name in reversed(fault.parameters)}
    return [first[p] if n == 1 else f"{p} ({n})" for p, n in counts.items()]


def github(audits: Iterable[Audit]) -> Iterator[str]:
    """A workflow command for each finding, which GitHub shows beside the run."""
    for audit in audits:
        for fault in audit.findings:
            text = f"{audit.source}: {', '.join(named(fault))}: {fault.what}. Expected {fault.expected}; "
            text += f"measured {fault.measured}. Remedy: {fault.remedy}"
            title = _escaped(f"spikepatch audit: {fault.name}").replace(":", "%3A").replace(",", "%2C")
            yield f"::{_GITHUB[fault.severity]} title={title}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def junit(audits: Sequence[Audit]) -> str:
    """A suite for each audit, a failed case for each finding that is no note; one that passed where there are none."""
    root = ElementTree.Element("testsuites")
    for audit in audits:
        failed = audit.at_least("at-risk")
        suite = ElementTree.SubElement(
            root, "testsuite", name=f"spikepatch audit {audit.source}", tests=str(max(len(audit.findings), 1)),
            failures=str(len(failed)), errors="0", skipped="0",
        )  # fmt: skip
        if not audit.findings:
            ElementTree.SubElement(suite, "testcase", classname=audit.source, name="nothing found")
        for fault in audit.findings:
            name = f"{fault.name}: {', '.join(named(fault))}"
            case = ElementTree.SubElement(suite, "testcase", classname=audit.source, name=name)
            text = f"{fault.what}\nexpected: {fault.expected}\nmeasured: {fault.measured}\nremedy: {fault.remedy}"
            if fault in failed:
                ElementTree.SubElement(case, "failure", message=fault.what, type=fault.severity).text = text
            else:
                ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)
