"""`mapet doctor`: what this machine can run, and why not the rest; whether a cache and a run are whole."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mapet.commands.options import Doctor
from mapet.data.cache import TokenCache
from mapet.errors import MapetError
from mapet.folders import instead
from mapet.machine import Finding, gpus, machine_findings
from mapet.training.checkpoint import FOLDER, CheckpointStore, verify
from mapet.words import printable
from mapet_kernels.backends import available_backends, explain_auto, reason_against_rocm
from mapet_kernels.flash_providers import provider_for
from mapet_kernels.selfcheck import two_stream_agreement

OPTIONAL_PACKAGES = {
    "xformers": "one way to run attention backend flash, and a peer in the attention benchmarks",
    "flash_attn": "one way to run attention backend flash, and a peer in the attention benchmarks",
    "faiss": "a peer in the k-means benchmarks",
    "nvtx": "named ranges in profiles",
    "wandb": "train.trackers wandb",
    "trackio": "train.trackers trackio",
}
"""Modules, and what they are for."""
COLOURS = {"ok": "green", "absent": "yellow", "problem": "bold red"}


def run(options: Doctor, console: Console | None = None) -> int:
    """Print the findings as a table; 1 if anything is a problem, such as a damaged cache, else 0."""
    findings = doctor_report(options.cache, options.run)
    (console or Console()).print(as_table(findings))
    return int(any(finding.status == "problem" for finding in findings))


def doctor_report(cache: Path | None = None, run: Path | None = None) -> list[Finding]:
    """Look at the machine, attention backends, optional packages and the compiler; verify a cache and a run.

    Nothing is changed, and nothing that is missing or damaged raises: it becomes a finding.
    """
    found = gpus()
    findings = [*machine_findings(), triton_finding(found)]
    for device in ["cpu", *(f"cuda:{i}" for i in range(len(found)))]:
        findings += [*backend_findings(device, available_backends(device)), auto_finding(device)]
    for module, purpose in OPTIONAL_PACKAGES.items():
        version, name = installed_version(module), module.replace("_", "-")
        findings.append(Finding(name, "ok" if version else "absent", version or f"not installed; {purpose}"))
    findings.append(compiler_finding())
    if cache is not None:
        findings.append(cache_finding(cache))
    return findings if run is None else findings + run_findings(run)


def as_table(findings: list[Finding]) -> Table:
    """Findings as a rich table."""
    table = Table("", "", "what was found", title="mapet doctor", title_justify="left", show_edge=False, expand=False)
    table.columns[2].overflow = "fold"  # a long path is broken, not cut
    for finding in findings:
        # Text, not markup: a path may hold square brackets.
        detail = Text(printable(finding.detail))
        if finding.advice:
            detail.append(f"\n{printable(finding.advice)}", style="dim")
        table.add_row(Text(finding.status, style=COLOURS[finding.status]), Text(printable(finding.subject)), detail)
    return table


def triton_finding(gpus: list[Any]) -> Finding:
    """Whether Triton's kernels can run: installed, and a GPU of sm_80 or newer."""
    version = installed_version("triton")
    if version is None:
        return Finding("triton", "absent", "not installed", "pip install triton (Linux)")
    if gpus and (reason := reason_against_rocm()) is not None:
        return Finding("triton", "absent", f"{version}, but {reason}")
    if not any(gpu.major >= 8 for gpu in gpus):
        return Finding("triton", "absent", f"{version}, but no GPU of sm_80 or newer to run on")
    return Finding("triton", "ok", version)


def backend_findings(device: str, backends: dict[str, str | None]) -> list[Finding]:
    """One finding per attention backend: None means that it runs and is to be tried, text is the reason why not."""
    return [
        Finding(f"attention {name} on {device}", *(("absent", reason) if reason else _trial(name, device)))
        for name, reason in backends.items()
    ]


def auto_finding(device: str) -> Finding:
    """Which attention backend "auto" takes, and why."""
    dtype = "float32" if device == "cpu" else "float16"
    taken, why = explain_auto(torch.device(device), getattr(torch, dtype))
    return Finding(f"attention auto on {device}", "ok", f"takes {taken} in {dtype}: {why}")


def _trial(backend: str, device: str) -> tuple[str, str, str]:
    """Run MaPeT's attention once, forward and backward, and compare with plain torch in float64."""
    advice = f"set train.backend to another than {backend}"
    try:
        agreement = two_stream_agreement(backend, device, torch.float32 if device == "cpu" else torch.float16)
    except Exception as error:  # whatever a kernel's compiler or a driver raises is a finding
        return "problem", f"does not run: {error}", advice
    errors = f"errors are {agreement.outputs:.2f} (outputs) and {agreement.gradients:.2f} (gradients) of the tolerance"
    if not agreement.holds:
        return "problem", f"disagrees with plain torch: {errors}", f"{advice}, and please report this"
    provider = f", by {provider_for(device).name}" if backend == "flash" else ""
    return "ok", f"agrees with plain torch{provider}: {errors}", ""


def installed_version(module: str) -> str | None:
    """The version of a module's package, without importing it; None where the module cannot be found."""
    if importlib.util.find_spec(module) is None:
        return None
    names = metadata.packages_distributions().get(module)
    return metadata.version(names[0]) if names else "version unknown"


def compiler_finding() -> Finding:
    """The CUDA compiler, which only building the CUDA C++ kernels needs."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Finding("nvcc", "absent", "not on PATH; only building the CUDA C++ kernels needs it")
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", "problem", f"{nvcc} does not run: {error}")
    release = next((line.strip() for line in done.stdout.splitlines() if "release" in line), "version unknown")
    return Finding("nvcc", "ok", f"{release} ({nvcc})")


def cache_finding(path: Path) -> Finding:
    """A token cache, every byte checked against its manifest."""
    try:
        cache = TokenCache.open(path)
        cache.verify()
    except (MapetError, OSError) as error:
        return Finding("cache", "problem", str(error))
    side = cache.image_size
    detail = f"{path}: {len(cache)} images of {side} x {side}, {cache.grid**2} tokens of {cache.vocabulary}"
    return Finding("cache", "ok", f"{detail} by {cache.tokenizer}; every byte is as it was written")


def run_findings(path: Path) -> list[Finding]:
    """Every checkpoint of a run, each file checked against its manifest."""
    store = CheckpointStore(path / FOLDER)
    try:
        steps = store.steps()
    except OSError as error:
        return [Finding("run", "problem", f"{path} cannot be read: {error.strerror or error}")]
    if not steps:
        what = f"{path} holds no checkpoint{instead(path)}"
        return [Finding("run", "problem", what, f"give a run folder, with {FOLDER}/ in it")]
    return [_checkpoint_finding(f"run, step {step}", store.path(step)) for step in steps]


def _checkpoint_finding(subject: str, folder: Path) -> Finding:
    try:
        verify(folder)
    except (MapetError, OSError) as error:
        return Finding(subject, "problem", str(error), "resuming uses the newest checkpoint that is whole")
    return Finding(subject, "ok", f"{folder}: every file is as it was written")
