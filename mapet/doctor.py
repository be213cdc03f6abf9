"""What this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mapet.data.cache import TokenCache
from mapet.errors import MapetError
from mapet.folders import instead
from mapet.training.checkpoint import FOLDER, CheckpointStore, verify
from mapet.training.precision import automatic
from mapet.words import printable
from mapet_kernels.backends import available_backends, explain_auto, reason_against_rocm
from mapet_kernels.flash_providers import provider_for
from mapet_kernels.selfcheck import two_stream_agreement

Status = Literal["ok", "absent", "problem"]

OLDEST_TORCH = (2, 11)
OPTIONAL_PACKAGES = {
    "xformers": ("xformers", "one way to run attention backend flash, and a peer in the attention benchmarks"),
    "flash-attn": ("flash_attn", "one way to run attention backend flash, and a peer in the attention benchmarks"),
    "faiss": ("faiss", "a peer in the k-means benchmarks"),
    "nvtx": ("nvtx", "named ranges in profiles"),
    "wandb": ("wandb", "train.trackers wandb"),
    "trackio": ("trackio", "train.trackers trackio"),
}
"""What people call it -> (module, what it is for)."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    subject: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as torch reports it."""

    name: str
    capability: tuple[int, int]
    memory: int
    """Bytes."""


def doctor_report(*, cache: str | Path | None = None, run: str | Path | None = None) -> list[Finding]:
    """Look at Python, torch, devices, attention backends, optional packages and the compiler; verify a cache and a run.

    Nothing is changed, and nothing that is missing or damaged raises: it becomes a finding.
    """
    gpus = list_gpus()
    findings = [python_finding(), torch_finding(), cpu_finding(), memory_finding()]
    findings += [gpu_finding(i, gpu) for i, gpu in enumerate(gpus)] or [no_gpu_finding()]
    findings += [triton_finding(gpus)]
    for device in ["cpu", *(f"cuda:{i}" for i in range(len(gpus)))]:
        findings += [*backend_findings(device, available_backends(device)), auto_finding(device)]
    findings += [package_finding(name, *what) for name, what in OPTIONAL_PACKAGES.items()]
    findings.append(compiler_finding())
    if cache is not None:
        findings.append(cache_finding(Path(cache)))
    if run is not None:
        findings += run_findings(Path(run))
    return findings


def doctor(*, cache: str | Path | None = None, run: str | Path | None = None, console: Console | None = None) -> int:
    """Print `doctor_report` as a table. Returns the exit code: 1 if anything is a problem, such as a damaged cache."""
    findings = doctor_report(cache=cache, run=run)
    (console or Console()).print(as_table(findings))
    return int(any(finding.status == "problem" for finding in findings))


def as_table(findings: list[Finding]) -> Table:
    """Findings as a rich table."""
    styles = {"ok": "green", "absent": "yellow", "problem": "bold red"}
    table = Table("", "", "what was found", title="mapet doctor", title_justify="left", show_edge=False, expand=False)
    table.columns[2].overflow = "fold"  # a long path is broken, not cut
    for finding in findings:
        # Text, not markup: a path may hold square brackets.
        detail = Text(printable(finding.detail))
        if finding.advice:
            detail.append(f"\n{printable(finding.advice)}", style="dim")
        table.add_row(Text(finding.status, style=styles[finding.status]), Text(printable(finding.subject)), detail)
    return table


def machine_lines(findings: list[Finding]) -> tuple[str, ...]:
    """Python, torch, processor, memory and GPUs, one line each, for a report."""
    wanted = ("Python", "torch", "processor", "memory", "GPU")
    return tuple(f"{f.subject}: {f.detail}" for f in findings if f.subject.startswith(wanted))


def python_finding() -> Finding:
    """Version and platform; older Pythons cannot install mapet."""
    return Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def torch_finding() -> Finding:
    """The version, and the version of CUDA or ROCm it is built for."""
    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if torch.version.hip is not None:
        built_for = f"built for ROCm {torch.version.hip}"
    detail = f"{torch.__version__}, {built_for}"
    if _version(torch.__version__) < OLDEST_TORCH:
        return Finding("torch", "problem", detail, "mapet needs torch 2.11 or newer: pip install --upgrade torch")
    return Finding("torch", "ok", detail)


def cpu_finding() -> Finding:
    """Cores this process may use, and the vector instructions torch found."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = torch.backends.cpu.get_cpu_capability()
    return Finding(
        "processor", "ok", f"{cores} cores, {instructions}; fp32 and bf16 run on it, fp16 needs a GPU{_auto(None)}"
    )


def memory_finding() -> Finding:
    """Main memory this process may use, a container's limit included."""
    total = memory_limit()
    return Finding("memory", "ok", f"{total / 2**30:.1f} GiB") if total else Finding("memory", "absent", "unknown")


def memory_limit() -> int:
    """Bytes of main memory, or of the container's limit where that is smaller; 0 where neither can be read."""
    known = []
    if hasattr(os, "sysconf"):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(limit).read_text().strip() if Path(limit).is_file() else ""
        if text.isdecimal():
            known.append(int(text))
    return min(known, default=0)


def list_gpus() -> list[Gpu]:
    """Every CUDA device torch can use."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Gpu(p.name, (p.major, p.minor), p.total_memory) for p in found]


def gpu_finding(index: int, gpu: Gpu) -> Finding:
    """What a GPU is and which precisions it is for."""
    major, minor = gpu.capability
    detail, auto = f"{gpu.name}, sm_{major}{minor}, {gpu.memory / 2**30:.0f} GiB", _auto(gpu.capability)
    if gpu.capability >= (8, 0):
        return Finding(f"GPU {index}", "ok", f"{detail}; fp32, bf16 and fp16{auto}")
    if gpu.capability >= (7, 0):
        advice = "bf16 is emulated: set train.precision fp16, or auto"
        return Finding(f"GPU {index}", "ok", f"{detail}; fp32 and fp16{auto}", advice)
    return Finding(f"GPU {index}", "ok", f"{detail}; fp32{auto}", "no tensor cores: fp16 and bf16 gain nothing here")


def _auto(capability: tuple[int, int] | None) -> str:
    return f"; train.precision auto takes {automatic(capability)}"


def no_gpu_finding() -> Finding:
    """Why there is no GPU: the build of torch, or the driver."""
    if torch.version.cuda is None:
        return Finding("GPU", "absent", "this torch is built without CUDA", "install torch for CUDA from pytorch.org")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return Finding("GPU", "absent", str(error).splitlines()[0].split(". ")[0], "check the driver with nvidia-smi")
    return Finding("GPU", "absent", "torch sees no CUDA device", "check CUDA_VISIBLE_DEVICES and nvidia-smi")


def triton_finding(gpus: list[Gpu]) -> Finding:
    """Whether Triton's kernels can run: installed, and a GPU of sm_80 or newer."""
    version = installed_version("triton", "triton")
    if version is None:
        return Finding("triton", "absent", "not installed", "pip install triton (Linux)")
    if gpus and (reason := reason_against_rocm()) is not None:
        return Finding("triton", "absent", f"{version}, but {reason}")
    if any(gpu.capability >= (8, 0) for gpu in gpus):
        return Finding("triton", "ok", version)
    return Finding("triton", "absent", f"{version}, but no GPU of sm_80 or newer to run on")


def backend_findings(device: str, backends: dict[str, str | None]) -> list[Finding]:
    """One finding per attention backend: None means that it runs and is to be tried, text is the reason why not."""
    return [
        Finding(subject, "absent", reason) if reason else trial_finding(subject, name, device)
        for name, reason in backends.items()
        for subject in [f"attention {name} on {device}"]
    ]


def auto_finding(device: str) -> Finding:
    """Which attention backend "auto" takes, and why."""
    backend, why = explain_auto(torch.device(device), trial_dtype(device))
    dtype = str(trial_dtype(device)).removeprefix("torch.")
    return Finding(f"attention auto on {device}", "ok", f"takes {backend} in {dtype}: {why}")


def trial_dtype(device: str) -> torch.dtype:
    """What backends are tried in."""
    return torch.float32 if device == "cpu" else torch.float16


def trial_finding(subject: str, backend: str, device: str) -> Finding:
    """Run MaPeT's attention once, forward and backward, and compare with plain torch in float64."""
    try:
        agreement = two_stream_agreement(backend, device, trial_dtype(device))
    except Exception as error:  # whatever a kernel's compiler or a driver raises is a finding
        return Finding(subject, "problem", f"does not run: {error}", f"set train.backend to another than {backend}")
    errors = f"errors are {agreement.outputs:.2f} (outputs) and {agreement.gradients:.2f} (gradients) of the tolerance"
    if agreement.holds:
        provider = f", by {provider_for(device).name}" if backend == "flash" else ""
        return Finding(subject, "ok", f"agrees with plain torch{provider}: {errors}")
    advice = f"set train.backend to another than {backend}, and please report this"
    return Finding(subject, "problem", f"disagrees with plain torch: {errors}", advice)


def package_finding(name: str, module: str, purpose: str) -> Finding:
    """Whether an optional package is installed, and what it is for."""
    version = installed_version(name, module)
    return Finding(name, "absent", f"not installed; {purpose}") if version is None else Finding(name, "ok", version)


def installed_version(distribution: str, module: str) -> str | None:
    """The version of a package, without importing it; None where the module cannot be found."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in (distribution, module, *importlib.metadata.packages_distributions().get(module, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "version unknown"


def compiler_finding() -> Finding:
    """The CUDA compiler, which only building the CUDA C++ kernels needs."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Finding("nvcc", "absent", "not on PATH; only building the CUDA C++ kernels needs it")
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", "problem", f"{nvcc} does not run: {error}")
    release = [line for line in done.stdout.splitlines() if "release" in line]
    return Finding("nvcc", "ok", f"{release[0].strip() if release else 'version unknown'} ({nvcc})")


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
    return [_checkpoint_finding(store.path(step), step) for step in steps]


def _checkpoint_finding(folder: Path, step: int) -> Finding:
    try:
        verify(folder)
    except (MapetError, OSError) as error:
        return Finding(f"run, step {step}", "problem", str(error), "resuming uses the newest checkpoint that is whole")
    return Finding(f"run, step {step}", "ok", f"{folder}: every file is as it was written")


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
