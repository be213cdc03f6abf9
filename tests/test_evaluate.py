"""Evaluation of frozen features: the features themselves, their cache, kNN, probes, and the errors of bad labels."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import pictures
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms import v2

import mapet.evaluate.features as features_module
from mapet.data.images import open_source
from mapet.errors import CheckpointError, ConfigError, DataError
from mapet.evaluate.features import Features, cached_features, extract_features, pixel_features
from mapet.evaluate.frozen import EvaluationConfig, evaluate, probe_checkpoint
from mapet.evaluate.images import CacheImages, RandomViews, SourceImages
from mapet.evaluate.knn import knn_predict
from mapet.evaluate.labels import draw_per_class, split
from mapet.evaluate.probe import LayerClassifiers, ProbeConfig, linear_probe, logistic_probe
from mapet.model.export import export, from_timm
from mapet.rng import step_seed

SIZE = 16


def make_vit(*, class_token=True, seed=0, depth=3, **options):
    torch.manual_seed(seed)
    pool = "token" if class_token else "avg"
    return VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=0, class_token=class_token,
        global_pool=pool, init_values=0.5, **options,
    )  # fmt: skip


def make_images(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8))


def make_clusters(per_class=30, classes=4, width=12, layers=2, noise=0.3, seed=0):
    """Features of classes around random centres in every layer, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, layers, width))
    labels = np.repeat(np.arange(classes), per_class)
    values = centres[labels] + noise * rng.normal(size=(len(labels), layers, width))
    return Features(values.astype(np.float32), tuple(f"block {i + 1}" for i in range(layers))), labels


# features


@pytest.mark.parametrize("class_token", [True, False])
def test_features_are_class_token_and_mean_of_patches_without_the_final_norm(class_token):
    vit, images = make_vit(class_token=class_token, drop_path_rate=0.5), make_images(5)
    outputs = []
    hooks = [block.register_forward_hook(lambda m, i, out: outputs.append(out)) for block in vit.blocks]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        vit.eval().forward_features((images.double().div(255) - mean).div(std).float())
    [hook.remove() for hook in hooks]
    if class_token:
        wanted = torch.stack([torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1) for x in outputs], dim=1)
    else:
        wanted = torch.stack([x.mean(1) for x in outputs], dim=1)
    vit.train()
    got = extract_features(vit, images, batch_size=2)
    assert got.values.dtype == np.float32 and got.layers == ("block 1", "block 2", "block 3")
    assert vit.training, "the model must be left in the mode it was in"
    np.testing.assert_allclose(got.values, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_the_batches_and_last_is_the_last_of_all():
    vit, images = make_vit(), make_images(7)
    whole, parts = extract_features(vit, images), extract_features(vit, images, batch_size=3)
    np.testing.assert_allclose(whole.values, parts.values, rtol=1e-5, atol=1e-6)
    last = extract_features(vit, images, layers="last")
    assert last.layers == ("block 3",)
    np.testing.assert_allclose(last.layer(-1), whole.layer(-1), rtol=1e-6)


def test_images_that_do_not_fit_are_refused():
    vit = make_vit()
    with pytest.raises(DataError, match="images are 8 x 8 pixels, the model takes 16 x 16"):
        extract_features(vit, make_images(3)[..., :8, :8])
    with pytest.raises(DataError, match="no images"):
        extract_features(vit, make_images(0))
    with pytest.raises(TypeError, match="uint8"):
        extract_features(vit, make_images(3).float())
    with pytest.raises(ValueError, match="shape"):
        extract_features(vit, make_images(3)[:, 0])


def test_diverged_weights_are_reported_not_scored():
    vit = make_vit()
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="images 0 to 2 are not finite"):
        extract_features(vit, make_images(3))


# cache


def test_cached_features_are_computed_once_per_weights_and_images(tmp_path, monkeypatch):
    vit, images = make_vit(), make_images(6)
    first = cached_features(tmp_path, vit, images, fingerprint="v1")
    np.testing.assert_array_equal(first.values, extract_features(vit, images).values)
    assert not first.values.flags.owndata and not first.values.flags.writeable, "mapped, not read"
    monkeypatch.setattr(features_module, "_feature_batches", lambda *_: pytest.fail("computed again"))
    np.testing.assert_array_equal(cached_features(tmp_path, vit, images, fingerprint="v1").values, first.values)
    for model, given, changes in [
        (make_vit(seed=1), images, {}),
        (vit, images, {"fingerprint": "v2"}),
        (vit, images[:5], {}),
        (vit, images, {"layers": "last"}),
    ]:
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            cached_features(tmp_path, model, given, **{"fingerprint": "v1"} | changes)
    assert sorted(entry.suffix for entry in tmp_path.iterdir()) == [".json", ".npy"], "failures must leave nothing"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    open_file = Path.open

    def on_full_disk(path, *args):
        return open_file(Path("/dev/full"), *args)

    monkeypatch.setattr(Path, "open", on_full_disk)
    with pytest.raises(DataError, match=r"could not write cached features .*features_.*No space left"):
        cached_features(tmp_path, make_vit(), make_images(6), fingerprint="v1")
    assert list(tmp_path.iterdir()) == []


def change_key(path):
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(manifest | {"images": "others"}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: os.truncate(path, path.stat().st_size - 100), "cannot be read"),
        (lambda path: np.save(path, np.array([{"code": 1}], dtype=object), allow_pickle=True), "cannot be read"),
        (lambda path: np.save(path, np.zeros((2, 3), np.float32)), r"must be float32 \(6, 3, 64\)"),
        (lambda path: path.with_suffix(".json").write_text("{"), "cannot be read"),
        (change_key, "made from other images"),
    ],
)
def test_a_damaged_or_stale_cache_is_refused_by_name(tmp_path, damage, words):
    vit, images = make_vit(), make_images(6)
    cached_features(tmp_path, vit, images, fingerprint="v1")
    [path] = tmp_path.glob("*.npy")
    damage(path)
    with pytest.raises(DataError, match=words) as error:
        cached_features(tmp_path, vit, images, fingerprint="v1")
    assert path.name in str(error.value) and "delete" in str(error.value)


def test_a_probe_runs_on_mapped_features(tmp_path):
    vit, images, labels = make_vit(), make_images(12), np.arange(12) % 2
    mapped, plain = cached_features(tmp_path, vit, images, fingerprint="v1"), extract_features(vit, images)
    config = ProbeConfig(epochs=2, batch=5)
    results = [linear_probe(features, labels, features, labels, config=config) for features in (mapped, plain)]
    np.testing.assert_array_equal(results[0].accuracy, results[1].accuracy)
    np.testing.assert_array_equal(knn_predict(mapped.layer(-1), labels, mapped.layer(-1), k=1), labels)


# views


def test_raw_pixels_of_a_cache_come_in_the_order_asked_for():
    class Cache:
        def images(self, ids):
            return pixels[ids]

    pixels = make_images(8)
    chosen = CacheImages(Cache(), np.array([6, 1, 3]))
    assert len(chosen) == 3 and torch.equal(chosen[1:3], pixels[[1, 3]])
    wanted = pixels[[6, 1, 3]].flatten(1).numpy().astype(np.float32) / 255
    np.testing.assert_array_equal(pixel_features(chosen, batch_size=2).values, wanted[:, None])


def test_random_views_are_fixed_by_seed_view_and_image():
    images = make_images(6)
    views = RandomViews(images, view=0, seed=3)
    assert torch.equal(views[0:6], torch.cat([views[0:2], views[2:6]]))
    assert not torch.equal(views[0:6], RandomViews(images, view=1, seed=3)[0:6])
    assert views[0:6].dtype == torch.uint8 and views[0:6].shape == images.shape


def test_random_views_are_torchvisions_crops_and_flips():
    images = make_images(6)
    draw = v2.Compose([v2.RandomResizedCrop(images.shape[-1], (0.08, 1.0)), v2.RandomHorizontalFlip()])
    for i, view in enumerate(RandomViews(images, view=2, seed=3)[0:6]):
        torch.manual_seed(step_seed(3, i, "view 2"))
        assert torch.equal(view, draw(images[i]))


# kNN


def test_knn_votes_as_written_by_hand():
    rng = np.random.default_rng(0)
    train, labels = rng.normal(size=(40, 6)), rng.integers(0, 3, 40) * 10
    test = rng.normal(size=(15, 6))
    got = knn_predict(train, labels, test, k=7, temperature=0.1, chunk=4)
    for row, predicted in zip(test, got, strict=True):
        similarity = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
        nearest = np.argsort(-similarity)[:7]
        votes = {int(c): np.exp(similarity[nearest][labels[nearest] == c] / 0.1).sum() for c in np.unique(labels)}
        assert predicted == max(votes, key=votes.get)


def test_knn_looks_at_the_angle_only_and_one_neighbour_decides_alone():
    train, labels = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), np.array([5, 7, 7])
    test = np.array([[100.0, 1.0], [0.001, 0.1]])
    np.testing.assert_array_equal(knn_predict(train, labels, test, k=1), [5, 7])
    # All three vote: with a huge temperature the majority wins everywhere, with a small one the nearest does.
    np.testing.assert_array_equal(knn_predict(train, labels, test, k=3, temperature=1e4), [7, 7])
    np.testing.assert_array_equal(knn_predict(train, labels, test, k=3, temperature=1e-4), [5, 7])


@pytest.mark.parametrize("k, temperature, words", [(0, 0.07, "k = 0"), (4, 0.07, "k = 4"), (1, 0.0, "temperature")])
def test_knn_refuses_what_makes_no_sense(k, temperature, words):
    with pytest.raises(ConfigError, match=words):
        knn_predict(np.eye(3), np.arange(3), np.eye(3), k=k, temperature=temperature)


# probes


def test_layer_classifiers_are_separate_linear_layers():
    model = LayerClassifiers(3, 5, 4, torch.Generator().manual_seed(0))
    assert 0.006 < model.weight.std().item() < 0.014 and not model.bias.any()
    x = torch.randn(6, 3, 5)
    for layer in range(3):
        torch.testing.assert_close(model(x)[layer], x[:, layer] @ model.weight[layer] + model.bias[layer])


def test_the_linear_probe_trains_each_layer_as_if_it_were_alone():
    (train, labels), (test, test_labels) = (make_clusters(layers=3, noise=1.5, seed=seed) for seed in (0, 1))
    config = ProbeConfig(epochs=4, batch=32)
    together = linear_probe(train, labels, test, test_labels, config=config)
    assert together.accuracy.shape == (4, 3)
    # The same initial weights and order of batches, one layer, a plain loop.
    generator = torch.Generator().manual_seed(config.seed)
    start = LayerClassifiers(3, 12, 4, generator)
    linear = torch.nn.Linear(12, 4)
    with torch.no_grad():
        linear.weight.copy_(start.weight[1].T)
        linear.bias.zero_()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    x, y = torch.from_numpy(train.values[:, 1].copy()), torch.from_numpy(labels)
    for epoch in range(4):
        for ids in torch.randperm(len(y), generator=generator).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(x[ids]), y[ids]).backward()
            optimizer.step()
        schedule.step()
        predicted = linear(torch.from_numpy(test.values[:, 1].copy())).argmax(1).numpy()
        assert together.accuracy[epoch, 1] == pytest.approx((predicted == test_labels).mean(), abs=1e-6)


def test_the_linear_probe_separates_what_is_separable_and_names_the_best_layer():
    (train, labels), (test, test_labels) = (make_clusters(layers=2, seed=seed) for seed in (0, 1))
    for i, features in enumerate((train, test)):
        features.values[:, 1] = np.random.default_rng(5 + i).normal(size=features.values[:, 1].shape)
    data, config = (train, labels * 3 + 1, test, test_labels * 3 + 1), ProbeConfig(epochs=20, batch=16)
    result = linear_probe(*data, config=config)
    assert result.best == 1.0 and result.best_layer == "block 1" and result.last < 0.5
    np.testing.assert_array_equal(result.accuracy, linear_probe(*data, config=config).accuracy)


def test_the_linear_probe_takes_views_in_turn():
    good, labels = make_clusters(layers=1)
    test, test_labels = make_clusters(layers=1, seed=1)
    useless = Features(np.zeros_like(good.values), good.layers)
    config = ProbeConfig(epochs=1, batch=16, lr=0.05)
    assert linear_probe([good, useless], labels, test, test_labels, config=config).last > 0.9
    assert linear_probe([useless, good], labels, test, test_labels, config=config).last <= 0.5


def test_logistic_probe_is_scikit_learns_on_standardised_features():
    (train, labels), (test, test_labels) = make_clusters(noise=1.0), make_clusters(noise=1.0, seed=1)
    x, y = train.layer(-1) * 1000 + 5, test.layer(-1) * 1000 + 5
    scaler = StandardScaler().fit(x)
    wanted = LogisticRegression(max_iter=2000).fit(scaler.transform(x), labels).score(scaler.transform(y), test_labels)
    assert logistic_probe(x, labels, y, test_labels) == pytest.approx(wanted)
    with pytest.warns(UserWarning, match="did not converge in 1 iterations"):
        logistic_probe(x, labels, y, test_labels, max_iterations=1)


@pytest.mark.parametrize("option", [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"weight_decay": -1.0}])
def test_a_probe_that_cannot_train_is_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        ProbeConfig(**option)


# labels


def test_draws_per_class_are_exact_and_fixed_by_the_seed():
    labels = np.array([0] * 30 + [4] * 12 + [7] * 10)
    ids = draw_per_class(labels, 10, seed=1)
    np.testing.assert_array_equal(np.unique(labels[ids], return_counts=True), [[0, 4, 7], [10, 10, 10]])
    assert len(set(ids.tolist())) == 30
    np.testing.assert_array_equal(ids, draw_per_class(labels, 10, seed=1))
    assert not np.array_equal(ids, draw_per_class(labels, 10, seed=2))
    names = ["a", "b", "c", "d", "cat", "f", "g", "dog"]
    with pytest.raises(DataError, match=r"1 classes have fewer: 'dog' \(10\)"):
        draw_per_class(labels, 11, seed=1, classes=names)
    with pytest.raises(ConfigError, match="at least 1"):
        draw_per_class(labels, 0, seed=1)


def test_a_split_is_disjoint_complete_and_by_class():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2)
    train, test = split(labels, test_fraction=0.2, seed=4)
    assert not set(train) & set(test) and sorted([*train, *test]) == list(range(62))
    np.testing.assert_array_equal(np.bincount(labels[test]), [10, 2, 1])
    with pytest.raises(DataError, match="'only' has one image"):
        split(np.array([0, 0, 1]), classes=["many", "only"])
    with pytest.raises(ConfigError, match="test_fraction"):
        split(labels, test_fraction=1.0)


LABELS = np.arange(24) % 2


@pytest.mark.parametrize(
    "train_labels, test_labels, words",
    [
        (None, LABELS, "training images have no labels; labels come from class sub-folders"),
        (LABELS, None, "test images have no labels"),
        (LABELS[:20], LABELS, "24 training images but 20 labels"),
        (np.zeros(24, int), LABELS, r"training images are all of one class \('cat'\)"),
        (LABELS, np.where(np.arange(24) < 3, 2, LABELS), "1 classes occur in the test images only: 'newt'"),
        (np.where(np.arange(24) < 20, 0, 1), LABELS, r"10 labels per class were asked for.*'dog' \(4\)"),
        (LABELS.astype(float), LABELS, "must be integers"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(train_labels, test_labels, words):
    images = make_images(24)
    with pytest.raises(DataError, match=words):
        evaluate(pixel_features, images, train_labels, images, test_labels, classes=["cat", "dog", "newt"])


# all of it


METHODS = ("kNN, k = 5", "kNN, k = 1", "linear probe, best layer", "linear probe, last layer", "logistic regression")
SUBSETS = ("all", "10 per class")


def test_evaluate_scores_a_model_and_the_baselines_by_the_same_code():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    # Each class is bright in another third of the image, so pixels tell them apart, and so does any sound network.
    pixels = rng.integers(0, 80, (120, 3, SIZE, SIZE))
    for i, label in enumerate(labels):
        pixels[i, :, 5 * label : 5 * label + 5] += 160
    images = torch.from_numpy(pixels.astype(np.uint8))
    train, test = split(labels, test_fraction=0.25, seed=0)
    config = EvaluationConfig(neighbours=5, probe=ProbeConfig(epochs=30, batch=16, lr=0.05))
    for features in (pixel_features, make_vit()):
        result = evaluate(features, images[train], labels[train], images[test], labels[test], config=config)
        assert {(score.method, score.labels) for score in result.scores} == set(itertools.product(METHODS, SUBSETS))
        assert all(score.accuracy > 0.9 for score in result.scores), result
        assert (result.train_images, result.test_images, result.classes) == (90, 30, 3)
    assert result.accuracy("linear probe, best layer") >= result.accuracy("linear probe, last layer")
    with pytest.raises(KeyError, match="kNN, k = 2"):
        result.accuracy("kNN, k = 2")


def test_evaluate_on_digits_without_labels_to_spare():
    digits = open_source("digits")
    ids = np.arange(0, 1797, 6)
    train, test = (ids[part] for part in split(digits.labels[ids], test_fraction=0.3, seed=0))
    config = EvaluationConfig(labels_per_class=0, probe=ProbeConfig(epochs=2))
    result = evaluate(
        pixel_features, SourceImages(digits, 8, train), digits.labels[train], SourceImages(digits, 8, test),
        digits.labels[test], config=config, classes=digits.classes,
    )  # fmt: skip
    assert {score.labels for score in result.scores} == {"all"}
    assert result.accuracy("kNN, k = 1") > 0.9 and result.accuracy("logistic regression") > 0.85


def test_random_views_are_used_where_asked_for():
    images, labels, seen = make_images(24), np.arange(24) % 2, []
    config = EvaluationConfig(neighbours=3, labels_per_class=0, augment_views=2, probe=ProbeConfig(epochs=2))
    evaluate(lambda given: seen.append(type(given)) or pixel_features(given), *(images, labels) * 2, config=config)
    assert seen == [torch.Tensor, torch.Tensor, RandomViews, RandomViews]


@pytest.mark.parametrize(
    "config, most",
    [
        (EvaluationConfig(neighbours=25, labels_per_class=0), 24),
        (EvaluationConfig(neighbours=5, labels_per_class=2), 2 * len(np.unique(LABELS))),
    ],
)
def test_too_many_neighbours_are_refused_before_features_are_computed(config, most):
    with pytest.raises(ConfigError, match=f"1 <= k <= {most}"):
        evaluate(lambda given: pytest.fail("computed"), *(make_images(24), LABELS) * 2, config=config)


def test_test_images_are_never_taken_for_training_images(tmp_path):
    """Two folders of equally many images, whose features are kept in one place."""
    for name, seed in (("train", 0), ("test", 1)):
        pictures(tmp_path / name, per_class=2, seed=seed)
    export(*from_timm(make_vit()), tmp_path / "vit")
    (result,) = probe_checkpoint(
        *(tmp_path / "vit", str(tmp_path / "train"), str(tmp_path / "test")),
        features=tmp_path / "features",
        config=EvaluationConfig(methods=("knn",), neighbours=1, labels_per_class=0),
        device=torch.device("cpu"),
    ).values()
    assert (result.train_images, result.test_images) == (4, 4)
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2
