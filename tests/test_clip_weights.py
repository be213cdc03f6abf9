"""CLIP weights: found or missed with clear words, read without running code, and mapped onto timm's trunk exactly."""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from clip_weights import RN50X64, SMALL, openai_module, random_weights
from datafakes import Trap
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from mapet.errors import DataError, WeightsMissingError
from mapet.tokenizers.foreign import clip_weights
from mapet.tokenizers.foreign.clip_trunk import TrunkConfig, build_trunk, hash_of_trunk, trunk_from_weights
from mapet.tokenizers.foreign.clip_weights import find_clip_weights, read_weights
from mapet.tokenizers.foreign.torchscript import is_torchscript, read_torchscript


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with empty caches whose hub refuses connections."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(clip_weights, "OPENAI_FILE", tmp_path / "clip" / "RN50x64.pt")
    return tmp_path


def layer4(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module.layer4(module.layer3(module.layer2(module.layer1(module.stem(images)))))


def save_torchscript(path: Path) -> dict[str, Tensor]:
    """A TorchScript archive like OpenAI's, with visual tower, other parameters and integer buffers; its state dict."""

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = openai_module(**SMALL, device="cpu")
            self.logit_scale = nn.Parameter(torch.tensor(2.5).half())
            self.register_buffer("input_resolution", torch.tensor(448))

        def forward(self, images: Tensor) -> Tensor:
            return self.visual.stem(images)

    clip = Clip().eval()
    weights = {name: values.float() for name, values in random_weights(**SMALL).items()}
    clip.load_state_dict(weights, strict=False)
    clip.visual.layer1.half()
    traced = torch.jit.trace(clip, torch.zeros(1, 3, 64, 64))
    torch.jit.save(traced, path)
    return torch.jit.load(path).state_dict()


def test_default_trunk_is_timms_and_has_the_known_size() -> None:
    ours, theirs = build_trunk(TrunkConfig(), device="meta"), timm.create_model("resnet50x64_clip_gap", device="meta")
    assert str(ours) == str(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 365_034_176
    official = openai_module(**RN50X64)
    assert sum(p.numel() for p in official.parameters()) == 420_380_352
    assert sum(p.numel() for p in official.attnpool.parameters()) == 420_380_352 - 365_034_176
    assert len(official.state_dict()) == 1203


def test_trunk_equals_open_clips_network() -> None:
    weights = {name: values.float() for name, values in random_weights(**SMALL).items()}
    official = openai_module(**SMALL, device="cpu")
    official.load_state_dict({name.removeprefix("visual."): values for name, values in weights.items()})
    config, trunk = trunk_from_weights(weights, "weights")
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = layer4(official, images)
    assert config == TrunkConfig(**SMALL)
    assert expected.shape == (2, 512, 3, 3)
    assert expected.std() > 0.01
    torch.testing.assert_close(trunk.forward_features(images), expected, rtol=1e-5, atol=1e-6)


NAMINGS = {
    "OpenAI": lambda w: w,
    "visual tower alone": lambda w: {name.removeprefix("visual."): values for name, values in w.items()},
    "open_clip checkpoint": lambda w: {"epoch": 3, "state_dict": {f"module.{name}": v for name, v in w.items()}},
    "timm": lambda w: trunk_from_weights(w, "weights")[1].state_dict(),
    "with a text tower": lambda w: {
        **w,
        "transformer.resblocks.0.ln_1.weight": torch.ones(4),
        "positional": torch.ones(1),
    },
    "all in fp32": lambda w: {name: values.float() for name, values in w.items()},
    "without counters": lambda w: {name: v for name, v in w.items() if not name.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_same_trunk(naming: str) -> None:
    weights = random_weights(**SMALL)
    config, trunk = trunk_from_weights(NAMINGS[naming](weights), "weights")
    assert config == TrunkConfig(**SMALL)
    assert hash_of_trunk(trunk) == hash_of_trunk(trunk_from_weights(weights, "weights")[1])
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert not trunk.training


def test_hash_tells_networks_apart() -> None:
    weights = random_weights(**SMALL)
    changed = {**weights, "visual.layer4.0.bn3.running_mean": weights["visual.layer4.0.bn3.running_mean"] + 1e-3}
    hashes = {hash_of_trunk(trunk_from_weights(w, "weights")[1]) for w in (weights, changed)}
    assert len(hashes) == 2


BROKEN = {
    "not a ModifiedResNet.*fc.weight": {"fc.weight": torch.ones(3)},
    "is no CLIP ModifiedResNet.*none": {},
    "misses stages.2.0.conv2_kxk.conv.weight": "visual.layer3.0.conv2.weight",
    "wrong shape of stages.3.0.conv3_1x1.bn.bias": ("visual.layer4.0.bn3.bias", torch.zeros(3)),
    "unknown stages.0.0.surprise": ("stages.0.0.surprise", torch.zeros(3)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_other_networks_are_refused(message: str) -> None:
    change, weights = BROKEN[message], random_weights(**SMALL)
    if isinstance(change, dict):
        weights = change
    elif isinstance(change, str):
        del weights[change]
    elif change[0].startswith("visual."):
        weights[change[0]] = change[1]
    else:
        weights = {**trunk_from_weights(weights, "weights")[1].state_dict(), change[0]: change[1]}
    with pytest.raises(DataError, match=message.removeprefix("not a ModifiedResNet.*")) as caught:
        trunk_from_weights(weights, "here.pt")
    assert str(caught.value).startswith("here.pt is no CLIP ModifiedResNet")


def test_torchscript_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    expected = save_torchscript(tmp_path / "RN.pt")
    found = read_torchscript(tmp_path / "RN.pt")
    assert is_torchscript(tmp_path / "RN.pt")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert {values.dtype for values in found.values()} == {torch.float16, torch.float32, torch.int64}
    config, _ = trunk_from_weights(read_weights(tmp_path / "RN.pt"), "RN.pt")
    assert config == TrunkConfig(**SMALL)


def zip_file(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_code_in_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"), protocol=2)
    path = zip_file(tmp_path / "RN.pt", {"a/data.pkl": trap, "a/constants.pkl": b""})
    with pytest.raises(DataError, match=r"RN\.pt is no readable TorchScript archive: .*it asks for \w+\.open"):
        read_weights(path)
    assert not (tmp_path / "sprung").exists()


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"visual.conv1.weight": Trap(tmp_path / "sprung")}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"cannot read weights from .*w\.pt"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()


def test_damaged_torchscript_is_refused(tmp_path: Path) -> None:
    save_torchscript(tmp_path / "RN.pt")
    with zipfile.ZipFile(tmp_path / "RN.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist() if "/code/" not in info.filename}
    root = next(name for name in members if name.endswith("data.pkl")).removesuffix(".pkl")
    short = {**members, f"{root}/3": members[f"{root}/3"][:-2]}
    gone = {name: content for name, content in members.items() if name != f"{root}/3"}
    cut = {**members, f"{root}.pkl": members[f"{root}.pkl"][:200]}
    for broken in (short, gone, cut):
        with pytest.raises(DataError, match=r"bad\.pt is no readable TorchScript archive"):
            read_weights(zip_file(tmp_path / "bad.pt", broken))
    with pytest.raises(DataError, match="is compressed"):
        read_weights(zip_file(tmp_path / "bad.pt", members, zipfile.ZIP_DEFLATED))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    texts = {"w.safetensors": b"not safe", "w.pt": b"hello", "empty.pt": b""}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read weights from .*{name}"):
            read_weights(tmp_path / name)
    torch.save({1: torch.ones(3)}, tmp_path / "numbers.pt")
    with pytest.raises(DataError, match=r"numbers\.pt holds a dict, not a state dict"):
        read_weights(tmp_path / "numbers.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(DataError, match=r"list\.pt holds a list, not a state dict"):
        read_weights(tmp_path / "list.pt")


def test_truncated_state_dict_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(random_weights(**SMALL), buffer)
    (tmp_path / "w.pt").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(DataError, match=r"w\.pt"):
        read_weights(tmp_path / "w.pt")


def test_state_dicts_and_safetensors_are_read(tmp_path: Path) -> None:
    weights = random_weights(**SMALL)
    torch.save(weights, tmp_path / "w.pt")
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        found = read_weights(tmp_path / name)
        assert set(found) == set(weights)
        assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_missing_weights_say_what_and_how(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("retries for half a minute"))
    with pytest.raises(WeightsMissingError) as caught:
        find_clip_weights()
    text = str(caught.value)
    for part in (
        "timm/resnet50x64_clip_gap.openai",
        "model.safetensors",
        "cannot be reached",
        "hf download",
        "`weights`",
    ):
        assert part in text
    assert caught.value.exit_code == 1


def test_missing_weights_offline(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsMissingError, match="HF_HUB_OFFLINE forbids a download"):
        find_clip_weights()


def test_a_download_that_fails_is_missing_weights(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(clip_weights.urllib.request, "urlopen", lambda *a, **k: io.BytesIO())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(WeightsMissingError, match=r"the download failed \(No space left on device\)"):
        find_clip_weights()


def test_given_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissingError, match=r"there is no weights file .*RN50x64\.pt; where there is a network"):
        find_clip_weights(tmp_path / "RN50x64.pt")


@pytest.mark.parametrize("file", clip_weights.HUB_FILES, ids=str)
def test_cached_files_are_found(no_weights: Path, file: clip_weights.HubFile) -> None:
    folder = no_weights / "hub" / f"models--{file.repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / file.name).write_bytes(b"weights")
    assert find_clip_weights().read_bytes() == b"weights"


def test_openais_own_cache_is_found(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = no_weights / "clip" / "RN50x64.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    monkeypatch.setattr(clip_weights, "OPENAI_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert find_clip_weights() == path


def test_another_file_in_openais_cache_is_refused_unless_it_is_given(no_weights: Path) -> None:
    path = no_weights / "clip" / "RN50x64.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    with pytest.raises(DataError, match=r"RN50x64\.pt is not the .* that OpenAI published"):
        find_clip_weights()
    assert find_clip_weights(path) == path


def test_the_hub_is_asked_for_a_revision(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(clip_weights.urllib.request, "urlopen", lambda *a, **k: io.BytesIO())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **where: asked.append(where) or "here")
    assert find_clip_weights() == Path("here")
    assert asked[0]["revision"] == "main"
