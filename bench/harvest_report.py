"""Records and a page from what a harvest brought home: python bench/harvest.py --report DIR [SECOND]

The page says what failed, what to change first, how each figure stands against its target, what every attention kernel
reached of its floors, and which launch configurations won. A figure that did not come back is "not measured". Of two
calls the page is one, and says of which call each figure is; each keeps its own records. Needs the standard library
alone; floors that no record holds are compiled where Triton is installed.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import harvest_targets
from bench.harvest_advice import Counters, Pair, advice, counters, pairs, shown, snippet, winners
from bench.harvest_data import (
    HEAD_SIZE_FLOP,
    LEAST_REPEATS,
    Harvest,
    Refused,
    Timing,
    as_config,
    base_part,
    in_call,
    noise_words,
    read,
    together,
)
from bench.harvest_floors import KERNELS, UNITS, Find, finder
from bench.harvest_targets import NOT_MEASURED, at_target, most_repeats

RESULTS = Path(__file__).parent / "results"
COMMAND = "python bench/harvest.py"
TRACEBACK_LINES = 12
"""Of a failure that the page shows; the whole one is in the summary."""
COMMIT_DIGITS = 12
LONGEST_LABEL = 60
"""Characters of a device's name in a file name."""
MOST_DAMAGE = 10
"""Lines that could not be read that the page names."""


def report(*folders: Path, results: Path | None = None, floors: Find | None = None) -> Path:
    """Write the records and the page of the harvests in these folders; returns the page's path.

    Args:
        folders: what came back of a call each: harvest.tar.gz, or summary.json and parts/.
        results: folder for both; bench/results, or of a dry run, which measured nothing, that of the last call.
        floors: (op, configuration, shape, dtype) -> floors; of the records and the compiler unless it is given.

    Raises:
        Refused: a folder holds no harvest, or one of a machine without a GPU is to go into bench/results.
        FileExistsError: there is a record of this name with other content; records are never changed.
    """
    found = {Path(folder): read(Path(folder)) for folder in folders}
    harvest = together(list(found.values()))
    results = results or (list(found)[-1] if harvest.dry_run else RESULTS)
    for folder, call in found.items():
        if call.found_no_gpu and results.resolve() == RESULTS.resolve():
            raise Refused(f"the harvest in {folder} found no GPU and measured nothing: no page of it in bench/results/")
    results.mkdir(parents=True, exist_ok=True)
    floors = floors or finder(
        RESULTS, harvest.device, harvest.versions.get("triton"), str(harvest.summary.get("commit") or "")
    )
    calls = harvest.calls or [harvest]
    written = [keep(record, suite, call, results) for call in calls for suite, record in records(call).items()]
    path = results / f"harvest_{label(harvest)}_{stamp(harvest)}.md"
    path.write_text("\n".join(page(harvest, floors, written, list(found)[-1])) + "\n")
    return path


def label(harvest: Harvest) -> str:
    """The device in a file name: h200 of "NVIDIA H200"; cpu of a dry run."""
    if harvest.dry_run:
        return "dry_run"
    words = harvest.device.lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "_", words).strip("_")[:LONGEST_LABEL]


def stamp(harvest: Harvest) -> str:
    """When the harvest began, as in the names of other records; of a damaged summary, now."""
    started = harvest.summary.get("started")
    try:
        time = datetime.fromisoformat(started)
    except (TypeError, ValueError):
        time = datetime.now(UTC)
    return time.astimezone(UTC).strftime("%Y%m%dT%H%M%S")


def keep(record: Mapping[str, Any], suite: str, harvest: Harvest, results: Path) -> str:
    """Write a record that is new, and return its file's name.

    Raises:
        FileExistsError: there is one of this name with other content.
    """
    path = results / f"{suite}_{label(harvest)}_{stamp(harvest)}.json"
    text = json.dumps({"suite": suite, **head(harvest), **record}, indent=1) + "\n"
    if path.exists():
        if path.read_text() != text:
            raise FileExistsError(f"{path} holds another report of this harvest; records are never changed")
    else:
        path.write_text(text)
    return path.name


def head(harvest: Harvest) -> dict[str, Any]:
    """What every record says of its run."""
    summary, machine = harvest.summary, (harvest.of("machine") or [{}])[0]
    return {
        "command": summary.get("command") or f"{COMMAND} (its options are not known)",
        "call": summary.get("call", 1),
        "commit": summary.get("commit", ""),
        "time": summary.get("started"),
        "device": harvest.device,
        "device_type": "cpu" if harvest.dry_run else "cuda",
        "measured_on": "cpu" if harvest.dry_run else "cuda",
        "dry_run": harvest.dry_run,
        "cores": machine.get("cores"),
        "threads": machine.get("threads"),
        "versions": harvest.versions,
    }


def records(harvest: Harvest) -> dict[str, dict[str, Any]]:
    """By suite; a suite of which nothing came back has none."""
    found = {
        "harvest_attention": {"contests": attention_contests(harvest)},
        "harvest_step": {"contests": step_contests(harvest)},
        "harvest_kmeans": {"contests": kmeans_contests(harvest)},
        "harvest_memory": {"cases": harvest.of("memory")},
        "harvest_device": {
            "machine": harvest.of("machine"),
            "ceilings": harvest.of("ceiling"),
            "checks": harvest.of("check"),
            "counters": harvest.of("counters"),
            "failures": harvest.of("failure"),
            "parts": {name: outcome.get("status") for name, outcome in harvest.outcomes.items()},
        },
    }
    return {suite: record for suite, record in found.items() if any(record.values())}


def quantiles(row: Mapping[str, Any]) -> dict[str, Any]:
    """As every record has them."""
    noise = row.get("noise", round((row["p80_ms"] - row["p20_ms"]) / row["p50_ms"], 4))
    return {name: row[name] for name in ("p20_ms", "p50_ms", "p80_ms")} | {
        "noise": noise, "repeats": row.get("repeats"),
    }  # fmt: skip


def attention_contests(harvest: Harvest) -> list[dict[str, Any]]:
    """A contest for each part, shape and dtype; the base is ours in today's configuration."""
    contests: dict[tuple[Any, ...], dict[str, Any]] = {}
    for time in harvest.times:
        contest = contests.setdefault(
            (time.part, time.shape, time.dtype),
            {
                "name": f"{time.part} {time.shape} {time.dtype}", "part": time.part, "shape": time.shape._asdict(),
                "dtype": time.dtype, "phases": [], "base": "ours", "ways": {},
            },
        )  # fmt: skip
        if time.op not in contest["phases"]:
            contest["phases"].append(time.op)
        way = contest["ways"].setdefault(way_name(time), {"status": "timed", "timings": {}, "configs": {}})
        way["timings"][time.op] = {
            "p20_ms": time.p20, "p50_ms": time.p50, "p80_ms": time.p80, "noise": round(time.noise, 4),
            "repeats": time.repeats,
        }  # fmt: skip
        if time.config is not None:
            way["configs"][time.op] = time.config._asdict()
        if time.op in ("forward", "backward"):
            way.setdefault("tflop_per_s", {})[time.op] = round(time.flop_per_s / 1e12, 3)
    for contest in contests.values():
        base = contest["ways"].get("ours", {"timings": {}})["timings"]
        for name, way in contest["ways"].items():
            if name != "ours":
                shared = [op for op in way["timings"] if op in base]
                way["times_as_long"] = {
                    op: round(way["timings"][op]["p50_ms"] / base[op]["p50_ms"], 4) for op in shared
                }
    return list(contests.values())


def way_name(time: Timing) -> str:
    """Ours in another configuration than today's is a way of its own."""
    return time.way if time.default or time.config is None else f"{time.way} {'x'.join(map(str, time.config))}"


def step_contests(harvest: Harvest) -> list[dict[str, Any]]:
    """A contest for each part and model; the base is ours, eager."""
    contests: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in harvest.of("step"):
        name = f"{row.get('part')} {row['model']} {row.get('dtype', 'bf16')} batch {row.get('batch')}"
        contest = contests.setdefault(
            (name,),
            {
                "name": name, "model": row["model"], "batch": row.get("batch"), "dtype": row.get("dtype", "bf16"),
                "phases": ["step"], "base": "ours_eager", "ways": {},
            },
        )  # fmt: skip
        way = {
            "status": "timed", "timings": {"step": quantiles(row)},
            "images_per_second": {"step": round(row["images_per_s"], 2)},
        }  # fmt: skip
        if row.get("peak_bytes"):
            way["memory"] = {"peak_bytes": row["peak_bytes"], "how": "the allocator's peak"}
        contest["ways"][f"{row['way']}_{row['mode']}"] = way
    for contest in contests.values():
        base = contest["ways"].get("ours_eager")
        for name, way in contest["ways"].items():
            if base is not None and name != "ours_eager":
                ratio = way["timings"]["step"]["p50_ms"] / base["timings"]["step"]["p50_ms"]
                way["times_as_long"] = {"step": round(ratio, 4)}
    return list(contests.values())


def kmeans_contests(harvest: Harvest) -> list[dict[str, Any]]:
    """A contest for each size; the base is ours, exact."""
    contests: dict[str, dict[str, Any]] = {}
    for row in harvest.of("kmeans"):
        sizes = row["shape"]
        name = f"D {sizes.get('features')} K {sizes.get('clusters')} n {sizes.get('rows')} {row.get('dtype')}"
        contest = contests.setdefault(
            name, {"name": name, "dtype": row.get("dtype"), "phases": ["assign"], "base": "exact", "ways": {}}
        )
        contest["ways"][row["way"]] = {
            "status": "timed", "timings": {"assign": quantiles(row)},
            "tflop_per_s": {"assign": round(row["flops_per_s"] / 1e12, 3)}, "equal_ids": row.get("equal_ids"),
            "extra_bytes": row.get("extra_bytes"),
        }  # fmt: skip
    return list(contests.values())


def page(harvest: Harvest, floors: Find, written: Sequence[str], folder: Path = Path("DIR")) -> list[str]:
    """The lines of the page. folder: of the last call, as the command that follows it names it."""
    sections: Sequence[tuple[str, Callable[[], Iterable[str]]]] = (
        ("What failed", lambda: failed(harvest)),
        ("What to change first", lambda: [*first(harvest), *after(harvest, folder)]),
        (
            "Kernels",
            lambda: [*targets(harvest_targets.KERNELS, harvest), *beyond(harvest, floors), "", *peers(harvest)],
        ),
        ("Training step", lambda: training(harvest)),
        ("Memory", lambda: targets(harvest_targets.MEMORY, harvest)),
        ("Every attention kernel beside its floors", lambda: beside_floors(harvest, floors)),
        ("Launch configurations", lambda: launch_configurations(harvest)),
        ("What the hardware counted", lambda: hardware(harvest)),
        ("Correctness", lambda: correctness(harvest)),
        ("Ceilings of this machine", lambda: ceilings(harvest)),
    )
    lines = [*introduction(harvest, written)]
    for title, section in sections:
        lines += ["", f"## {title}", "", *section()]
    return lines


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in cells]


def figure(value: float) -> str:
    """A time: four digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def introduction(harvest: Harvest, written: Sequence[str]) -> list[str]:
    """What was measured, where and with what; what could not be read."""
    calls = harvest.calls or [harvest]
    devices = ", then ".join(dict.fromkeys(call.device for call in calls))
    started = " and ".join(str(call.summary.get("started", "time unknown")) for call in calls)
    which = f"{len(calls)} calls, " if harvest.calls else "second call, " if harvest.is_second else ""
    lines = [f"# Harvest of {devices}, {which}{started}", ""]
    if harvest.dry_run:
        lines += ["**A dry run on a CPU with small sizes: no figure here means anything.**", ""]
    if harvest.calls:
        lines += [f"- Call {number}, {call.device}: {run_of(call)}" for number, call in enumerate(calls, 1)]
        lines += ["", "A figure is of the call that stands beside it or in the name of its part."]
    else:
        lines += [f"Of {run_of(harvest)}"]
        if harvest.is_second:
            lines += ["", "Of the second call alone; `--report FIRST SECOND` makes the page of both."]
    lines += [
        "", "Times are medians, noise is (p80 - p20) / p50, \"-\" of fewer than "
        f"{LEAST_REPEATS} repeats; ratios are of times measured in turn in one part.",
        "",
        "Records: " + (", ".join(f"`{name}`" for name in written) or "none, as nothing came back") + ".",
    ]  # fmt: skip
    if harvest.damage:
        lines += ["", f"Could not be read, {len(harvest.damage)} in all:", ""]
        lines += [f"- {line}" for line in harvest.damage[:MOST_DAMAGE]]
        lines += [f"- and {len(harvest.damage) - MOST_DAMAGE} more"] if len(harvest.damage) > MOST_DAMAGE else []
    return lines


def run_of(call: Harvest) -> str:
    """Commit, versions, and how many parts ended how."""
    commit = str(call.summary.get("commit") or "unknown")[:COMMIT_DIGITS]
    versions = ", ".join(f"{name} {version}" for name, version in call.versions.items())
    counts: dict[Any, int] = {}
    for outcome in call.outcomes.values():
        counts[outcome.get("status")] = counts.get(outcome.get("status"), 0) + 1
    parts = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"commit `{commit}`; {versions or 'versions unknown'}. Parts: {parts or 'unknown'}."


def failed(harvest: Harvest) -> list[str]:
    """Parts that did not end well, with the end of their tracebacks; ways that a part could not measure."""
    bad = {name: x for name, x in harvest.outcomes.items() if x.get("status") != "ok"}
    lines = []
    if bad:
        lines += table(
            ("part", "status", "seconds of its limit", "why"),
            [
                (name, x.get("status"), f"{seconds(x, 'seconds')} of {seconds(x, 'limit')}", x.get("reason") or "")
                for name, x in bad.items()
            ],
        )
    for name, outcome in bad.items():
        if trace := last_words(outcome):
            lines += [
                "", f"{name}; the whole is `parts.{base_part(name)}` of summary.json in the harvest's archive:", "",
                "```text", *trace, "```",
            ]  # fmt: skip
    if rows := harvest.of("failure"):
        lines += ["", "Ways that a part did not measure:", ""]
        lines += table(
            ("part", "way", "shape", "why"),
            [(row.get("part"), row.get("way"), row.get("shape") or "", row.get("reason")) for row in rows],
        )
    if not lines:
        return ["Nothing." if harvest.outcomes else "Not known: what became of the parts did not come back."]
    return lines


def seconds(outcome: Mapping[str, Any], name: str) -> str:
    """A time of an outcome, or a question mark."""
    return f"{outcome[name]:.0f}" if isinstance(outcome.get(name), int | float) else "?"


def last_words(outcome: Mapping[str, Any]) -> list[str]:
    """The last lines of a traceback, or of what a part that was killed had printed; of files their place in here."""
    text = outcome.get("traceback") or (outcome.get("log_tail") if outcome.get("status") != "skipped" else "") or ""
    lines = str(text).rstrip().splitlines()[-TRACEBACK_LINES:]
    return [re.sub(r'"/[^"]*?/(?=(?:bench|kernels|mapet|site-packages|tests)/)', '"', line) for line in lines]


def first(harvest: Harvest) -> list[str]:
    """The ranked list."""
    if harvest.dry_run:
        return ["A dry run asks for no change."]
    found = advice(harvest)
    return [f"{n}. {x.text}" for n, x in enumerate(found, 1)] or ["Nothing that came back asks for a change."]


def after(harvest: Harvest, folder: Path) -> list[str]:
    """Of a first call, how the second is called."""
    if harvest.dry_run or harvest.calls or harvest.is_second:
        return []
    # The page is kept in the repository, where a path of another machine says nothing.
    name = folder.name if folder.is_absolute() else str(folder)
    first, second = shlex.quote(name), shlex.quote(f"{name}-second")
    return [
        "", "Then the second call (what failed, the fastest configurations with their neighbours, fp16, "
        "compute-sanitizer), and the page of both:", "", "```sh",
        f"{COMMAND} --second {first} --minutes 4 --output {second}", f"{COMMAND} --report {first} {second}", "```",
    ]  # fmt: skip


def targets(wanted: Sequence[harvest_targets.Target], harvest: Harvest) -> list[str]:
    """Figures beside what is wanted of them."""
    return table(harvest_targets.HEAD, harvest_targets.rows(wanted, harvest))


def beyond(harvest: Harvest, floors: Find) -> list[str]:
    """Wanted rates of attention that lie beyond a floor of today's tiles, whatever else is done."""
    lines = []
    for name, ops, wanted in (
        ("forward", ("forward",), harvest_targets.FORWARD), ("backward", ("dq", "dkdv"), harvest_targets.BACKWARD)
    ):  # fmt: skip
        times = [most_repeats(at_target(harvest, op, "ours")) for op in ops]
        if not all(time is not None and time.config is not None for time in times):
            continue
        found = [floors(time.op, time.config, time.shape, time.dtype) for time in times]
        if None in found:
            continue
        shape, least = times[0].shape, sum(x.largest for x in found)
        flop = HEAD_SIZE_FLOP[name] * shape.size * shape.visible_pairs
        for rate in wanted:
            if (microseconds := flop / (rate * 1e12) * 1e6) < least:
                parts = [f"{x.largest:.0f} us of {KERNELS[op]} ({x.binding})" for op, x in zip(ops, found, strict=True)]
                lines.append(
                    f"- Attention {name} at {rate} TFLOP/s takes {microseconds:.0f} us and needs other tiles: today's "
                    f"take {' + '.join(parts)} at least."
                )
    return ["", *lines] if lines else []


def peers(harvest: Harvest) -> list[str]:
    """Every way of attention in the parts that timed peers, ours in today's configuration."""
    parts = {time.part for time in harvest.times if time.way != "ours"}
    times = [time for time in harvest.times if time.part in parts and time.default]
    if not times:
        return [f"Peers: {NOT_MEASURED}."]
    ours = {(time.part, time.shape, time.dtype, time.op): time.p50 for time in times if time.way == "ours"}
    rows = []
    for time in sorted(times, key=lambda x: (not x.shape.is_target, x.shape.tokens, x.dtype, x.op)):
        base = ours.get((time.part, time.shape, time.dtype, time.op))
        rows.append((
            time.shape, time.dtype, time.op, f"{time.way}{in_call(time.part)}", figure(time.p50), time.shown_noise,
            time.repeats, f"{time.p50 / base:.3g}" if base else "",
            f"{time.flop_per_s / 1e12:.3g}" if time.op in ("forward", "backward") else "",
        ))  # fmt: skip
    head = ("shape", "dtype", "op", "way", "ms", "noise", "repeats", "times ours", "TFLOP/s on visible pairs")
    note = "`sdpa` sees every pair, which is another task; all rates count the pairs that two-stream attention sees."
    return [note, "", *table(head, rows)]


def training(harvest: Harvest) -> list[str]:
    """The targets of the step, then every mode."""
    lines = [
        "Steps on one batch that stays on the device: reading and decoding of images is not in these figures.", "",
        *targets(harvest_targets.STEPS, harvest),
    ]  # fmt: skip
    if rows := harvest.of("step"):
        names = ("part", "model", "way", "mode", "dtype", "batch")
        newest = {tuple(row.get(name) for name in names): row for row in rows}
        lines += ["", *table(
            (*names, "images/s", "ms", "noise", "peak GiB"),
            [
                (
                    *key, f"{row['images_per_s']:,.0f}", figure(row["p50_ms"]),
                    noise_words(quantiles(row)["noise"], row.get("repeats")),
                    f"{row['peak_bytes'] / 2**30:.1f}" if row.get("peak_bytes") else NOT_MEASURED,
                )
                for key, row in newest.items()
            ],
        )]  # fmt: skip
        lines += tuned_steps(rows)
    return lines


def tuned_steps(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of each part that ran with another launch table than today's, its configurations."""
    lines = []
    for part, configs in {row.get("part"): row["configs"] for row in rows if row.get("configs")}.items():
        told = "; ".join(f"{op} {as_config(config)}" for op, config in configs.items())
        lines += ["", f"{part} ran with the fastest configurations of the first call: {told}."]
    return lines


def beside_floors(harvest: Harvest, floors: Find) -> list[str]:
    """Microseconds of ours in today's configuration at each shape, and in the fastest at the target."""
    times = chosen(harvest)
    if not times:
        return [f"Attention kernels: {NOT_MEASURED}."]
    rows, sources = [], []
    for time in times:
        found = floors(time.op, time.config, time.shape, time.dtype)
        measured = 1e3 * time.p50
        config = f"{time.config}{'' if time.default else ' (fastest)'}{in_call(time.part)}"
        row = [KERNELS[time.op], str(time.shape), time.dtype, config, figure(measured), time.shown_noise]
        if found is None:
            rows.append([*row, *[""] * len(UNITS), "no static cost", ""])
            continue
        sources += [found.source] if found.source not in sources else []
        rows.append([
            *row, *(f"{found.by_unit[unit]:.4g}" if unit in found.by_unit else "" for unit in UNITS), found.binding,
            f"{found.largest / measured:.0%}",
        ])  # fmt: skip
    head = ("kernel", "shape", "dtype", "configuration", "measured", "noise", *UNITS, "binding", "floor / measured")
    text = "Microseconds. A floor is what one unit of an H200 would need if it never waited, with the tiles of that "
    text += (
        "configuration; other tiles have other floors. The largest binds. Above 100 % the time or the floor is wrong."
    )
    origin = f" Floors are of {', '.join(sources)}." if sources else ""
    return [text + origin, "", *table(head, rows)]


def chosen(harvest: Harvest) -> list[Timing]:
    """Of each kernel, shape and dtype today's configuration, and at the target the fastest where that is another."""
    found = []
    for op in KERNELS:
        best: dict[tuple[Any, ...], Timing] = {}
        for time in harvest.timings(op=op, way="ours", default=True):
            key = time.dtype, time.shape
            if time.config is not None and (key not in best or time.repeats > best[key].repeats):
                best[key] = time
        found += sorted(best.values(), key=lambda x: (x.dtype, not x.shape.is_target, x.shape.tokens))
        fastest = harvest_targets.fastest(harvest, op)
        if fastest is not None and not fastest.default:
            found.append(fastest)
    return found


def launch_configurations(harvest: Harvest) -> list[str]:
    """Who won, what to paste, and all times."""
    won = winners(harvest)
    if not won:
        return [f"Other configurations than today's: {NOT_MEASURED}."]
    lines = table(
        ("kernel", "dtype", "today", "fastest", "faster than today", "at the target", "shapes", "worth a change"),
        [
            (
                KERNELS[x.op], x.dtype, x.today, x.best if x.best != x.today else "today's", f"{x.gain:.1%}",
                NOT_MEASURED if x.at_target is None else f"{x.at_target:.1%}", x.shapes,
                "yes" if x.worth_it else "no" if x.best == x.today or x.clear else "no, within the noise",
            )
            for x in won
        ],
    )  # fmt: skip
    if pasted := [] if harvest.dry_run else snippet(won):
        lines += ["", "For kernels/launch.py:", "", "```python", *pasted, "```"]
    for x in won:
        _, timed = pairs(harvest, x.op, x.dtype, x.size)
        shapes = sorted({shape for beside in timed.values() for shape in beside}, key=lambda shape: shape.tokens)
        lines += ["", f"{KERNELS[x.op]}, {x.dtype}, D = {x.size}: microseconds, and how much faster than today's:", ""]
        lines += table(
            ("configuration", *(shape.short for shape in shapes)),
            [
                (
                    f"{config}{' (today)' if config == x.today else ''}",
                    *(beside_today(beside[shape]) if shape in beside else NOT_MEASURED for shape in shapes),
                )
                for config, beside in timed.items()
            ],
        )
    return lines


def beside_today(pair: Pair) -> str:
    """Microseconds, and of another configuration than today's its gain, as measured in turn with today's."""
    gain = "" if pair.other == pair.today else f" ({pair.ratio - 1:+.1%})"
    return f"{figure(1e3 * pair.other.p50)}{gain}{in_call(pair.other.part)}"


def hardware(harvest: Harvest) -> list[str]:
    """Of each kernel, what the rules read."""
    found: list[Counters] = counters(harvest)
    if not found:
        reasons = [x.get("reason") for name, x in harvest.outcomes.items() if base_part(name) == "counters"]
        reason = reasons[-1] if reasons else None
        return [f"Counters: {NOT_MEASURED}{f' ({reason})' if reason else ''}."]
    return table(
        ("kernel", "issue slots", "tensor cores", "L2", "DRAM", "occupancy", "long scoreboard, of stalls"),
        [
            (
                x.kernel, shown(x.issue), shown(x.tensor), shown(x.l2), shown(x.dram), shown(x.occupancy),
                NOT_MEASURED if x.long_scoreboard is None else f"{x.long_scoreboard:.0%}",
            )
            for x in found
        ],
    )  # fmt: skip


def correctness(harvest: Harvest) -> list[str]:
    """Every check, what is wrong first, then by the share of its budget."""
    rows = harvest.of("check")
    if not rows:
        return [f"Correctness: {NOT_MEASURED}."]
    ordered = sorted(rows, key=lambda row: (bool(row["ok"]), -(share_of_budget(row) or 0.0)))
    lines = table(("what", "dtype", "error", "allowed", "of its budget", "right"), [check_row(row) for row in ordered])
    return [f"{sum(bool(row['ok']) for row in rows)} of {len(rows)} within their budget.", "", *lines]


def check_row(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """One line of the checks."""
    figures = [f"{row[x]:.2e}" if isinstance(row.get(x), int | float) else "" for x in ("error", "allowed")]
    share = share_of_budget(row)
    return (
        f"{row['what']}{in_call(row.get('part'))}", row.get("dtype"), *figures, "" if share is None else f"{share:.0%}",
        "yes" if row["ok"] else "**no**",
    )  # fmt: skip


def share_of_budget(row: Mapping[str, Any]) -> float | None:
    """Error over what is allowed."""
    error, allowed = (row.get(x) for x in ("error", "allowed"))
    return error / allowed if isinstance(error, int | float) and isinstance(allowed, int | float) and allowed else None


def ceilings(harvest: Harvest) -> list[str]:
    """What large copies and products reach."""
    names = dict.fromkeys(row["name"] for row in harvest.of("ceiling"))
    if not names:
        return [f"Ceilings: {NOT_MEASURED}."]
    head = ("ceiling", "best of all calls" if harvest.calls else "best")
    return table(head, [(name, f"{harvest.ceiling(name) / 1e12:.4g} {rate_unit(name)}") for name in names])


def rate_unit(ceiling: str) -> str:
    """Of a ceiling's name, such as copy_bytes_per_s."""
    return "TB/s" if ceiling.endswith("bytes_per_s") else "TFLOP/s"
