"""A record and a page from what a harvest brought home: python bench/harvest.py --report DIR [SECOND]

The page says what failed, what to change first, how each figure stands against its target, what every attention kernel
reached of its floors, and which launch configurations won. A figure that did not come back is "not measured". Of two
calls the page is one, and says of which call each figure is; each keeps its own record. Needs the standard library
alone; floors are compiled where Triton is installed.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.harvest_advice import TABLE, advice, counters, winners
from bench.harvest_data import LEAST_REPEATS, UNKNOWN_DEVICE, Harvest, Refused, base_part, noise_words, read, together
from bench.harvest_floors import Find, finder
from bench.harvest_targets import HEAD, NOT_MEASURED, fastest, targets

RESULTS = Path(__file__).parent / "results"
COMMAND = "python bench/harvest.py"
TRACEBACK_LINES = 12
"""Of a failure that the page shows; the whole one is in the summary."""
COMMIT_DIGITS = 12
LONGEST_LABEL = 60
"""Characters of a device's name in a file name."""
MOST_DAMAGE = 10
"""Lines that could not be read that the page names."""
NO_FIGURES = {"failure", "warm"}
"""Kinds of rows that hold no figure."""


def report(*folders: Path, results: Path | None = None, floors: Find | None = None) -> Path:
    """Write a record of each call and the page of all harvests in these folders; returns the page's path.

    Args:
        folders: what came back of a call each: harvest.tar.gz, or summary.json and parts/.
        results: folder for both; bench/results, or of a dry run, which measured nothing, that of the last call.
        floors: compiled, for an H200, unless it is given.

    Raises:
        Refused: a folder holds no harvest, or one of a machine without a GPU is to go into bench/results.
        FileExistsError: there is a record of this name with other content; records are never changed.
    """
    found = {Path(folder): read(Path(folder)) for folder in folders}
    harvest = together(list(found.values()))
    results = results or (list(found)[-1] if harvest.dry_run else RESULTS)
    for folder, call in found.items():
        nothing = call.device == UNKNOWN_DEVICE and not call.rows.keys() - NO_FIGURES
        if nothing and not call.dry_run and results.resolve() == RESULTS.resolve():
            raise Refused(f"the harvest in {folder} found no GPU and measured nothing: no page of it in bench/results/")
    results.mkdir(parents=True, exist_ok=True)
    written = [keep(call, results) for call in harvest.calls or [harvest] if call.rows or call.outcomes]
    path = results / f"{name_of(harvest)}.md"
    floors = floors or finder(harvest.device)
    path.write_text("\n".join(page(harvest, floors, written, list(found)[-1])) + "\n")
    return path


def name_of(harvest: Harvest) -> str:
    """Of its files: device and time, as in the names of other records; of a damaged summary the time is now."""
    device = re.sub(r"[^a-z0-9]+", "_", harvest.device.lower().removeprefix("nvidia ")).strip("_")[:LONGEST_LABEL]
    try:
        time = datetime.fromisoformat(harvest.summary["started"])
    except (KeyError, TypeError, ValueError):
        time = datetime.now(UTC)
    return f"harvest_{'dry_run' if harvest.dry_run else device}_{time.astimezone(UTC):%Y%m%dT%H%M%S}"


def keep(harvest: Harvest, results: Path) -> str:
    """Write a record that is new, and return its file's name.

    Raises:
        FileExistsError: there is one of this name with other content.
    """
    path, text = results / f"{name_of(harvest)}.json", json.dumps(record(harvest), indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        raise FileExistsError(f"{path} holds another report of this harvest; records are never changed")
    path.write_text(text)
    return path.name


def record(harvest: Harvest) -> dict[str, Any]:
    """What every record says of its run, then all rows by kind, as they were measured."""
    summary, machine = harvest.summary, (harvest.of("machine") or [{}])[0]
    device_type = "cpu" if harvest.dry_run else "cuda"
    return {
        "suite": "harvest", "command": summary.get("command") or f"{COMMAND} (its options are not known)",
        "call": summary.get("call", 1), "commit": summary.get("commit", ""), "time": summary.get("started"),
        "device": harvest.device, "device_type": device_type, "measured_on": device_type, "dry_run": harvest.dry_run,
        "cores": machine.get("cores"), "threads": machine.get("threads"), "versions": summary.get("versions"),
        "parts": {name: outcome.get("status") for name, outcome in harvest.outcomes.items()}, "rows": harvest.rows,
    }  # fmt: skip


def page(harvest: Harvest, floors: Find, written: Sequence[str], folder: Path = Path("DIR")) -> list[str]:
    """The lines of the page. folder: of the last call, as the command that follows it names it."""
    lines = introduction(harvest, written)
    sections: dict[str, Callable[[], Iterable[str]]] = {
        "What failed": lambda: failed(harvest),
        "What to change first": lambda: [*first(harvest), *after(harvest, folder)],
        "Targets": lambda: table(HEAD, targets(harvest)),
        "Launch configurations": lambda: launch_configurations(harvest),
        "Attention": lambda: attention(harvest, floors),
        "What the hardware counted": lambda: hardware(harvest),
        **{title: partial(of_kind, harvest, *of) for title, of in TABLES.items()},
    }
    for title, section in sections.items():
        try:
            found = [*section()]
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            found = [f"A damaged row keeps this section from being made: {type(error).__name__}: {error}"]
        lines += ["", f"## {title}", "", *found]
    return lines


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table, or that there is nothing for it."""
    rows = list(rows)
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in cells] if rows else [f"{NOT_MEASURED.capitalize()}."]


def figure(value: Any) -> str:
    """A number with four digits, or all before the point; nothing for none, words as they are."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def introduction(harvest: Harvest, written: Sequence[str]) -> list[str]:
    """What was measured, where and with what; what could not be read."""
    calls = harvest.calls or [harvest]
    devices = ", then ".join(dict.fromkeys(call.device for call in calls))
    started = " and ".join(str(call.summary.get("started", "time unknown")) for call in calls)
    which = f"{len(calls)} calls, " if harvest.calls else "second call, " if harvest.is_second else ""
    lines = [f"# Harvest of {devices}, {which}{started}", ""]
    if harvest.dry_run:
        lines += ["**A dry run on a CPU with small sizes: no figure here means anything.**", ""]
    for number, call in enumerate(calls, 1):
        parts = Counter(outcome["status"] for outcome in call.outcomes.values())
        told = ", ".join(f"{count} {status}" for status, count in parts.items()) or "unknown"
        commit = str(call.summary.get("commit") or "unknown")[:COMMIT_DIGITS]
        name = f"Call {number}" if harvest.calls else "This call"
        lines.append(f"- {name}, {call.device}: commit `{commit}`, {call.summary.get('versions')}. Parts: {told}.")
    noise = f'noise is (p80 - p20) / p50, "-" of fewer than {LEAST_REPEATS} repeats'
    told = ", ".join(f"`{name}`" for name in written) or "none, as nothing came back"
    lines += ["", f"Times are medians, {noise}; ratios are of times measured in turn in one part.", ""]
    lines += [f"Records: {told}.", ""]
    lines += [f"- Could not be read: {line}" for line in harvest.damage[:MOST_DAMAGE]]
    return [*lines, f"- {len(harvest.damage)} lines could not be read in all."] if harvest.damage else lines


def failed(harvest: Harvest) -> list[str]:
    """Parts that did not end well, with the end of their tracebacks; ways that a part could not measure."""
    bad = {name: x for name, x in harvest.outcomes.items() if x["status"] != "ok"}
    head = ("part", "status", "seconds of its limit", "why")
    rows = [
        (name, x["status"], f"{seconds(x, 'seconds')} of {seconds(x, 'limit')}", x.get("reason") or "")
        for name, x in bad.items()
    ]
    lines = table(head, rows) if rows else []
    for name, outcome in bad.items():
        if trace := last_words(outcome):
            where = f"{name}; the whole is `parts.{base_part(name)}` of summary.json in the harvest's archive:"
            lines += ["", where, "", "```text", *trace, "```"]
    if rows := [[row.get(x) or "" for x in ("part", "way", "shape", "reason")] for row in harvest.of("failure")]:
        lines += ["", "Ways that a part did not measure:", "", *table(("part", "way", "shape", "why"), rows)]
    nothing = "Nothing." if harvest.outcomes else "Not known: what became of the parts did not come back."
    return lines or [nothing]


def seconds(outcome: Mapping[str, Any], name: str) -> str:
    """A time of an outcome, or a question mark."""
    return f"{outcome[name]:.0f}" if isinstance(outcome.get(name), int | float) else "?"


def last_words(outcome: Mapping[str, Any]) -> list[str]:
    """The last lines of a traceback, or of what a part that was killed had printed; of files their place in here."""
    text = outcome.get("traceback") or (outcome.get("log_tail") if outcome["status"] != "skipped" else "") or ""
    lines = str(text).rstrip().splitlines()[-TRACEBACK_LINES:]
    return [re.sub(r'"/[^"]*?/(?=(?:bench|kernels|mapet|site-packages|tests)/)', '"', line) for line in lines]


def first(harvest: Harvest) -> list[str]:
    """The ranked list, and what to paste into the launch table."""
    if harvest.dry_run:
        return ["A dry run asks for no change."]
    found = [f"{n}. {x.text}" for n, x in enumerate(advice(harvest), 1)]
    return found or ["Nothing that came back asks for a change."]


def after(harvest: Harvest, folder: Path) -> list[str]:
    """Of a first call, how the second is called."""
    if harvest.dry_run or harvest.calls or harvest.is_second:
        return []
    # The page is kept in the repository, where a path of another machine says nothing.
    name = folder.name if folder.is_absolute() else str(folder)
    first, second = shlex.quote(name), shlex.quote(f"{name}-second")
    words = "what failed, the fastest configurations with their neighbours, fp16, compute-sanitizer"
    return [
        "", f"Then the second call ({words}), and the page of both:", "", "```sh",
        f"{COMMAND} --second {first} --minutes 4 --output {second}", f"{COMMAND} --report {first} {second}", "```",
    ]  # fmt: skip


def launch_configurations(harvest: Harvest) -> list[str]:
    """Who won, and what to paste; all times are in the table of attention."""
    won, pasted = winners(harvest), []
    head = ("function", "dtype", "today", "fastest", "faster than today", "at the target", "shapes", "worth a change")
    rows = []
    for x in won:
        verdict = "yes" if x.worth_it else "no" if x.best == x.today or x.clear else "no, within the noise"
        at_target = NOT_MEASURED if x.at_target is None else f"{x.at_target:.1%}"
        best = x.best if x.best != x.today else "today's"
        rows.append((TABLE[x.op], x.dtype, x.today, best, f"{x.gain:.1%}", at_target, x.shapes, verdict))
        if x.worth_it and not harvest.dry_run:
            faster = f"head size {x.size} in {x.dtype}, target.has_wgmma: {x.gain:.1%} faster than {x.today}"
            config = ", ".join(f"{name}={value}" for name, value in x.best._asdict().items())
            pasted += [f"# {TABLE[x.op]}, measured at {faster}", f"return LaunchConfig({config})"]
    if pasted:
        pasted = ["", "For kernels/launch.py:", "", "```python", *pasted, "```"]
    return [*table(head, rows), *pasted]


def attention(harvest: Harvest, floors: Find) -> list[str]:
    """Every time, beside ours in today's configuration; of today's and the fastest configuration the floors too."""
    base = {(x.part, x.shape, x.dtype, x.op): x.p50 for x in harvest.timings(way="ours", default=True)}
    best = [fastest(harvest, op) for op in TABLE]
    rows = []
    for time in sorted(harvest.times, key=lambda x: (not x.shape.is_target, x.shape.tokens, x.dtype, x.op)):
        known = base.get((time.part, time.shape, time.dtype, time.op))
        way = time.way if time.config is None else f"{time.way} {time.config}{' (today)' if time.default else ''}"
        found = {}
        if time.op in TABLE and time.config is not None and (time.default or time in best):
            found = floors(time.op, time.config, time.shape, time.dtype)
        unit = max(found, key=found.__getitem__, default="")
        rows.append((
            time.shape, time.dtype, time.op, way, time.part, figure(time.p50), time.noise, time.repeats,
            f"{time.p50 / known:.3g}" if known else "",
            f"{time.flop_per_s / 1e12:.3g}" if time.op in ("forward", "backward") else "",
            ", ".join(f"{name} {value:.4g}" for name, value in found.items()),
            f"{unit}, {found[unit] / (1e3 * time.p50):.0%}" if found else "",
        ))  # fmt: skip
    text = "`sdpa` sees every pair, which is another task; all rates count the pairs that two-stream attention sees. A "
    text += (
        "floor, in us, is what one unit of an H200 would need if it never waited, with these tiles, as this checkout "
    )
    text += "has the kernels; the largest binds, and stands last with its share of the time."
    head = (
        "shape",
        "dtype",
        "op",
        "way",
        "part",
        "ms",
        "noise",
        "repeats",
        "times ours",
        "TFLOP/s",
        "floors",
        "reached",
    )
    return [text, "", *table(head, rows)]


def hardware(harvest: Harvest) -> list[str]:
    """Of each kernel, what the rules read."""
    if not (found := counters(harvest)):
        reasons = [x.get("reason") for name, x in harvest.outcomes.items() if base_part(name) == "counters"]
        return [f"{NOT_MEASURED.capitalize()}{f' ({reasons[-1]})' if reasons and reasons[-1] else ''}."]
    rows = [
        (kernel, *(f"{x:.0f} %" if x is not None else NOT_MEASURED for x in of.values()))
        for kernel, of in found.items()
    ]
    return table(("kernel", *next(iter(found.values()))), rows)


Row = Mapping[str, Any]


def per_second(row: Row) -> str:
    """The value of a ceiling."""
    return f"{row['value'] / 1e12:.4g} {'TB/s' if row['name'].endswith('bytes_per_s') else 'TFLOP/s'}"


def share_of_budget(row: Row) -> str:
    """Error over what is allowed."""
    error, allowed = row.get("error"), row.get("allowed")
    return f"{error / allowed:.0%}" if error is not None and allowed else ""


def told_configs(row: Row) -> str:
    """The launch table that a step ran with, where it is not today's."""
    return "; ".join(f"{op} {'x'.join(map(str, x.values()))}" for op, x in (row.get("configs") or {}).items())


NOISE = {"noise": lambda row: noise_words((row["p80_ms"] - row["p20_ms"]) / row["p50_ms"], row.get("repeats"))}
Columns = Mapping[str, str | Callable[[Row], Any]]
TABLES: Mapping[str, tuple[str, int | None, Columns]] = {
    "Training step": ("step", 6, {
        **{name: name for name in ("part", "model", "way", "mode", "dtype", "batch")}, "images/s": "images_per_s",
        "ms": "p50_ms", **NOISE, "peak GiB": lambda row: (row.get("peak_bytes") or 0) / 2**30 or NOT_MEASURED,
        "other configurations": told_configs,
    }),
    "K-means": ("kmeans", 4, {
        "part": "part", "way": "way", "shape": "shape", "dtype": "dtype", "ms": "p50_ms", **NOISE,
        "TFLOP/s": lambda row: row["flops_per_s"] / 1e12, "equal ids": "equal_ids", "bytes more": "extra_bytes",
    }),
    "Correctness": ("check", None, {
        "part": "part", "what": "what", "dtype": "dtype", "error": "error",
        "allowed": "allowed", "of its budget": share_of_budget, "right": lambda row: "yes" if row["ok"] else "**no**",
        "said": "summary",
    }),
    "Ceilings of this machine": ("ceiling", None, {"part": "part", "ceiling": "name", "reached": per_second}),
}  # fmt: skip
"""Title -> (kind of rows; columns that tell what was measured, of which the last round counts, or None for all; by the
head of a column the field or function that fills it)."""


def of_kind(harvest: Harvest, kind: str, key: int | None, columns: Columns) -> list[str]:
    """A line for each row of a kind."""
    rows = [tuple(figure(x(row) if callable(x) else row.get(x)) for x in columns.values()) for row in harvest.of(kind)]
    words = ""
    if kind == "check" and rows:
        words = f"{len(harvest.of(kind, ok=True))} of {len(rows)} within their budget."
    if kind == "step":
        words = "On one batch that stays on the device: reading and decoding of images is not in these figures."
    return [words, "", *table(tuple(columns), {row[:key]: row for row in rows}.values())]
