"""The pixel and k-CLIP tokenizers: features, tokens in raster order, precision, errors; RN50x64 at its true size."""

from pathlib import Path

import numpy as np
import pytest
import torch

open_clip = pytest.importorskip("open_clip")  # the random weights are those of its network

from clip_weights import RN50X64, SMALL, random_weights
from datafakes import NoiseSource, fit_on
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mapet.data.decode import centre_square
from mapet.data.sources import open_source
from mapet.errors import ConfigError, DataError, WeightsMissingError
from mapet.tokenizers import TOKENIZERS, kclip, load_tokenizer, make_tokenizer, tokenizer_class
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.fitting.sample import sample_features
from mapet.tokenizers.foreign.clip_trunk import MEAN, STD
from mapet.tokenizers.kclip import KClipTokenizer, default_precision


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights of a small ModifiedResNet, 512 features."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(random_weights(**SMALL), path)
    return path


def small_kclip(weights: Path, **changes: object) -> KClipTokenizer:
    return make_tokenizer("kclip", **{"image_size": 48, "vocabulary": 8, "weights": weights, **changes})


def photograph(width: int = 100, height: int = 70, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_the_tokenizers_of_this_project_are_listed() -> None:
    assert set(TOKENIZERS) == {"pixel", "kclip"}
    for name in TOKENIZERS:
        kind = tokenizer_class(name)
        assert issubclass(kind, Tokenizer)
        assert kind.name == name


def test_pixel_features_are_the_patches_in_raster_order() -> None:
    tokenizer = make_tokenizer("pixel", image_size=12, patch_size=4, vocabulary=2)
    images = torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = tokenizer.features(images)
    assert features.shape == (2, 9, tokenizer.feature_size) == (2, 9, 48)
    for patch in range(9):
        row, column = divmod(patch, 3)
        expected = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1).float() / 255
        assert torch.equal(features[:, patch], expected)


def test_pixel_prepares_the_same_square_as_the_cache() -> None:
    image = photograph()
    prepared = make_tokenizer("pixel", image_size=32, patch_size=8, vocabulary=2).prepare(image)
    assert np.array_equal(prepared.numpy(), centre_square(image, 32))


def test_pixel_tokens_of_entries_are_their_ids() -> None:
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=8, vocabulary=4)
    images = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokenizer.set_codebook(tokenizer.features(images)[0].flip(0), "its own patches")
    tokens = tokenizer.encode(images)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[3, 2, 1, 0]]


def test_pixel_end_to_end_on_digits(tmp_path: Path) -> None:
    source = open_source("digits")
    tokenizer = make_tokenizer("pixel", image_size=8, patch_size=2, vocabulary=32)
    images = torch.stack([tokenizer.prepare(source.load(i)) for i in range(200)])
    report = fit_on(tokenizer, images, redos=2)
    assert (report.images, report.patches) == (200, 3200)
    assert len(report.usage.dead) == 0
    assert report.usage.perplexity > 10
    tokens = tokenizer.encode(images)
    assert tokens.shape == (200, 16)
    # The squared error of the tokens is that of the fit, or less, as the codebook moved once more since.
    error = (tokenizer.features(images) - tokenizer.codebook[tokens]).double().square().sum()
    assert error <= report.objective * 1.000001
    assert error > 0.9 * report.objective


def test_fits_repeat_and_follow_the_seed() -> None:
    images = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def codebook(**settings: int) -> torch.Tensor:
        tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
        fit_on(tokenizer, images, iterations=3, redos=1, **settings)
        return tokenizer.codebook

    assert torch.equal(codebook(), codebook())
    assert not torch.equal(codebook(), codebook(seed=5))


def test_fit_draws_so_many_rows_per_entry() -> None:
    images = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
    report = fit_on(tokenizer, images, iterations=2, redos=1, rows_per_entry=10)
    assert (report.rows, report.max_rows, report.patches) == (80, 80, 480)


def test_kclip_features_are_those_of_the_trunk(weights: Path) -> None:
    tokenizer = small_kclip(weights)
    assert (tokenizer.grid, tokenizer.input_size, tokenizer.feature_size) == (3, 96, 512)
    images = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = tokenizer.features(images)
    inputs = (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    maps = tokenizer.trunk.forward_features(inputs)
    assert features.shape == (2, 9, 512)
    assert features.min() == 0
    for patch in range(9):
        torch.testing.assert_close(features[:, patch], maps[:, :, patch // 3, patch % 3])


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (448, 448), (30, 45), (449, 448)])
def test_kclip_prepares_images_as_open_clip_does(weights: Path, size: tuple[int, int]) -> None:
    image = photograph(*size)
    prepared = small_kclip(weights, image_size=224).prepare(image)
    official = open_clip.image_transform(448, is_train=False, mean=MEAN, std=STD, interpolation="bicubic")(image)
    ours = (prepared.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert prepared.dtype == torch.uint8
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-6)


def test_kclip_fits_encodes_saves_and_loads(weights: Path, tmp_path: Path) -> None:
    tokenizer = small_kclip(weights)
    images = torch.stack([tokenizer.prepare(photograph(seed=seed)) for seed in range(12)])
    report = fit_on(tokenizer, images, redos=2, iterations=5)
    assert (report.patches, report.features) == (108, 512)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (12, 9)
    assert len(tokens.unique()) > 4
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path, weights=weights)
    assert torch.equal(loaded.encode(images), tokens)
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_kclip_refuses_a_codebook_of_another_network(weights: Path, tmp_path: Path) -> None:
    tokenizer = small_kclip(weights)
    tokenizer.set_codebook(torch.rand(8, 512), "random")
    tokenizer.save(tmp_path / "saved")
    save_file(random_weights(**SMALL, seed=1), tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"made with another network than .*other\.safetensors: its sha256 is"):
        load_tokenizer(tmp_path / "saved", weights=tmp_path / "other.safetensors")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_kclip_in_half_precision(weights: Path, precision: str) -> None:
    images = torch.stack([small_kclip(weights).prepare(photograph(seed=seed)) for seed in range(4)])
    full, half = small_kclip(weights), small_kclip(weights, precision=precision)
    expected, features = full.features(images), half.features(images)
    assert features.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert (features.float() - expected).norm() < 0.05 * expected.norm()
    for tokenizer in (full, half):
        tokenizer.set_codebook(expected[0, :8].clone(), "patches")
    assert full.fingerprint() != half.fingerprint()
    assert half.encode(images)[0, :8].tolist() == list(range(8))
    assert half.settings()["precision"] == precision


def test_kclip_batch_norm_stays_fp32(weights: Path) -> None:
    dtypes = {name: values.dtype for name, values in small_kclip(weights, precision="fp16").trunk.state_dict().items()}
    assert dtypes["stages.3.0.conv3_1x1.conv.weight"] == torch.float16
    assert dtypes["stages.3.0.conv3_1x1.bn.running_var"] == torch.float32


def test_features_that_overflow_are_a_clear_error(tmp_path: Path) -> None:
    loud = random_weights(**SMALL)
    loud["visual.layer4.0.bn3.weight"] *= 1e7
    save_file(loud, tmp_path / "loud.safetensors")
    tokenizer = small_kclip(tmp_path / "loud.safetensors", precision="fp16")
    images = torch.stack([tokenizer.prepare(photograph())])
    with pytest.raises(DataError, match="tokenizer kclip gives features that are not finite in float16"):
        sample_features(NoiseSource(3), tokenizer, tmp_path / "features", workers=0)
    with pytest.raises(ConfigError, match="cannot fit tokenizer kclip: x must be finite"):
        fit_on(tokenizer, images)
    tokenizer.set_codebook(torch.rand(8, 512), "random")
    with pytest.raises(DataError, match="tokenizer kclip cannot encode: x must be finite"):
        tokenizer.encode(images)


def test_kclip_runs_fp16_on_a_gpu_and_fp32_on_a_cpu_unless_told(weights: Path) -> None:
    assert default_precision(torch.device("cuda", 1)) == "fp16"
    assert default_precision(torch.device("cpu")) == small_kclip(weights).precision == "fp32"
    assert small_kclip(weights, precision="bf16").precision == "bf16"


def test_kclip_convolves_channels_last(weights: Path) -> None:
    tokenizer = small_kclip(weights)
    convolutions = [module for module in tokenizer.trunk.modules() if isinstance(module, torch.nn.Conv2d)]
    wide = [module.weight for module in convolutions if module.kernel_size != (1, 1)]
    assert wide and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide)
    seen = []
    tokenizer.trunk.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = tokenizer.features(torch.zeros(2, 3, 96, 96, dtype=torch.uint8))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert features.is_contiguous(), "rows are ready for the assignment without a copy"


class OpLog(TorchDispatchMode):
    """Every op that runs: its name, its arguments, and its first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, torch.Tensor):
            self.seen.append((func.name(), args, first))
        return out


def onto_fake_gpu(tokenizer: KClipTokenizer) -> None:
    """Within a FakeTensorMode: weights and codebook on a GPU that need not exist; shapes and devices are as on one."""

    def moved(like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like, device="cuda")

    for module in tokenizer.trunk.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: moved(values) for name, values in tensors.items() if values is not None})
    tokenizer.device = torch.device("cuda")
    tokenizer._mean, tokenizer._std, tokenizer._codebook = map(
        moved, (tokenizer._mean, tokenizer._std, tokenizer._codebook)
    )


def test_features_never_leave_the_device(weights: Path) -> None:
    """The ops of `encode` on a GPU: uint8 images go there, ids come out, and the assignment is the exact one."""
    tokenizer = small_kclip(weights, precision="fp16")
    tokenizer.set_codebook(torch.rand(8, 512), "random")
    with FakeTensorMode(allow_non_fake_inputs=True):
        onto_fake_gpu(tokenizer)
        images = torch.empty(2, 3, 96, 96, dtype=torch.uint8)
        with OpLog() as log:
            ids = tokenizer.encode(images)
    assert ids.device.type == "cuda" and ids.shape == (2, 9)
    on_host = [(name, out.dtype) for name, _, out in log.seen if out.device.type != "cuda"]
    assert on_host == []
    uploads = [
        (name, out.dtype)
        for name, args, out in log.seen
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type != "cuda"
    ]
    assert uploads == [("aten::_to_copy", torch.uint8)]
    ((features, codebook, exact, *_),) = [args for name, args, _ in log.seen if name == "mapet_kernels::kmeans_assign"]
    assert (features.device.type, features.dtype, features.shape) == ("cuda", torch.float16, (18, 512))
    assert codebook.dtype == torch.float32 and exact is True
    assert not [name for name, _, out in log.seen if "clone" in name and out.numel() == features.numel()]


def test_a_compiled_trunk_sees_one_batch_size(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile_(function, **options):
        assert options == {"dynamic": False}
        return lambda inputs: seen.append(tuple(inputs.shape)) or function(inputs)

    monkeypatch.setattr(torch, "compile", compile_)
    tokenizer = small_kclip(weights)
    images = torch.randint(256, (6, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = tokenizer.features(images)
    assert not tokenizer.is_compiled
    tokenizer.compile(batch_size=4)
    assert tokenizer.is_compiled
    found = [tokenizer.features(part) for part in images.split(4)]
    assert seen == [(4, 3, 96, 96)] * 2 and [len(part) for part in found] == [4, 2]
    torch.testing.assert_close(torch.cat(found), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kclip_on_a_gpu(weights: Path) -> None:
    """fp16 by default, compiled or not: features and tokens of fp32 on the CPU."""
    exact = small_kclip(weights)
    images = torch.stack([exact.prepare(photograph(seed=seed)) for seed in range(4)])
    expected = exact.features(images)
    for compiled in (False, True):
        tokenizer = small_kclip(weights, device="cuda")
        assert tokenizer.precision == "fp16"
        tokenizer.set_codebook(expected[0, :8].clone(), "patches")
        if compiled:
            tokenizer.compile(batch_size=5)
        features = tokenizer.features(images)
        assert features.dtype == torch.float16
        assert (features.float().cpu() - expected).norm() < 0.05 * expected.norm()
        assert tokenizer.encode(images)[0, :8].tolist() == list(range(8))


def test_kclip_without_weights_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissingError, match=r"no weights file .*RN50x64\.pt; .*hf download"):
        make_tokenizer("kclip", weights=tmp_path / "RN50x64.pt")


@pytest.mark.long
def test_kclip_at_its_true_size(monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_weights(**RN50X64)
    names = [name for name in state if "running" not in name and "num_batches" not in name]
    assert sum(state[name].numel() for name in names) == 420_380_352
    monkeypatch.setattr(kclip, "find_clip_weights", lambda given: Path("random"))
    monkeypatch.setattr(kclip, "read_weights", lambda path: state)
    tokenizer = make_tokenizer("kclip")
    assert sum(parameter.numel() for parameter in tokenizer.trunk.parameters()) == 365_034_176
    assert (tokenizer.grid, tokenizer.input_size, tokenizer.vocabulary) == (14, 448, 8192)
    image = tokenizer.prepare(open_source("photos").load(0))[None]
    features = tokenizer.features(image)
    assert features.shape == (1, 196, 4096)
    assert features.isfinite().all()
    assert features.min() == 0
    assert features.std() > 0
    generator = torch.Generator().manual_seed(0)
    tokenizer.set_codebook(features[0, torch.randint(196, (8192,), generator=generator)], "its own patches")
    monkeypatch.setattr(tokenizer, "features", lambda images: features)
    tokens = tokenizer.encode(image)
    assert tokens.shape == (1, 196)
    # Entries repeat the patches many times over: the nearest is the first copy.
    assert torch.equal(tokenizer.codebook[tokens[0]], features[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vqgan"}, "unknown tokenizer 'vqgan'; choose one of pixel, kclip"),
        ({"image_size": 225}, "image_size 225 is not divisible by patch_size 16"),
        ({"image_size": 8}, "image_size 8 is not divisible by patch_size 16"),
        ({"patch_size": 0}, "not divisible by patch_size 0"),
        ({"vocabulary": 1}, r"vocabulary must be in \[2, 65536\]"),
        ({"vocabulary": 65537}, r"vocabulary must be in \[2, 65536\]"),
        ({"precision": "bf16"}, "tokenizer pixel has no network"),
        ({"weights": "w.pt"}, "tokenizer pixel has no network"),
        ({"name": "kclip", "precision": "int8"}, "precision must be one of fp32, bf16, fp16, got 'int8'"),
    ],
)
def test_make_tokenizer_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tokenizer(**{"name": "pixel", **arguments})


def test_a_tokenizer_without_codebook_says_so(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
    for use in (
        lambda: tokenizer.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
        lambda: tokenizer.save(tmp_path),
    ):
        with pytest.raises(DataError, match="tokenizer pixel has no codebook yet: fit one, or load"):
            use()
    with pytest.raises(DataError, match="has no codebook yet"):
        tokenizer.fingerprint()


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 8, dtype=torch.uint8), torch.zeros(3, 16, 16, dtype=torch.uint8)],
)
def test_other_images_are_refused(images: torch.Tensor) -> None:
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=4, vocabulary=8)
    with pytest.raises(DataError, match=r"takes uint8 images \(b, 3, 16, 16\), got"):
        tokenizer.encode(images)


def test_fit_refuses() -> None:
    tokenizer = make_tokenizer("pixel", image_size=16, patch_size=8, vocabulary=8)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="1 images have 4 patches, too few for a vocabulary of 8"):
        fit_on(tokenizer, images[:1])
    for settings, message in (
        ({"redos": 0}, "redos must be at least 1"),
        ({"init": "best"}, "unknown init 'best'"),
        ({"rows_per_entry": 0}, "max_points_per_centroid must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=f"cannot fit tokenizer pixel: {message}"):
            fit_on(tokenizer, images, **settings)
