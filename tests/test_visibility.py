"""Who sees whom: the rule against the official code's masks, its count of keys, and its special cases."""

from __future__ import annotations

import pytest
import torch

from mapet_kernels import visibility


def rows(*patterns: str) -> torch.Tensor:
    return torch.tensor([[character == "1" for character in p.replace("|", "")] for p in patterns])


def official_masks(perm: torch.Tensor, cut: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Content and query masks with tokens and targets in image order, from ranks as the official code does."""
    tokens = perm.numel()
    rank = perm.argsort()
    targets = (rank >= cut).nonzero().squeeze(1)
    content = torch.zeros(tokens + len(targets), tokens + len(targets), dtype=torch.bool)
    query = torch.zeros(len(targets), tokens + len(targets), dtype=torch.bool)
    for token in range(tokens):
        r = int(rank[token])
        if r < cut:
            content[token, :tokens] = rank < cut
            content[token, tokens:] = True
        else:
            content[token, :tokens] = rank <= r
            content[token, tokens:] = rank[targets] > r
            i = int((targets == token).nonzero())
            query[i, :tokens] = rank < r
            query[i, tokens:] = rank[targets] >= r
    content[tokens:, :tokens] = rank < cut
    content[tokens:, tokens:] = True
    return content, query


def in_official_order(perm: torch.Tensor, cut: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Our masks with rows and keys moved from permuted to image order, targets too."""
    tokens = perm.numel()
    content, query = visibility.two_stream_visibility(tokens, cut)
    rank = perm.argsort()
    target_order = perm[cut:].argsort()  # targets in image order
    order = torch.cat([rank, tokens + target_order])
    return content[order][:, order], query[target_order][:, order]


def test_official_test_vector() -> None:
    perm = torch.tensor([0, 4, 1, 5, 2, 3])  # ranks: token 0 = 0, 4 = 1, 1 = 2, 5 = 3, 2 = 4, 3 = 5
    content, query = in_official_order(perm, 3)
    assert torch.equal(query, rows("110011|110", "111011|010", "110010|111"))
    others = "110010|111"
    expected = rows(
        others, others, "111011|010", "111111|000", others, "110011|110", others, others, others
    )  # content rows of tokens 0..5, then the three mask rows
    assert torch.equal(content, expected)


@pytest.mark.parametrize("cut", [1, 2, 30, 50, 60, 98, 196])
def test_masks_of_random_permutations_are_the_official_ones(cut: int) -> None:
    generator = torch.Generator().manual_seed(cut)
    perm = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(196, generator=generator) + 1])
    for ours, official in zip(in_official_order(perm, cut), official_masks(perm, cut), strict=True):
        assert torch.equal(ours, official)


@pytest.mark.parametrize(("tokens", "cut"), [(197, 50), (197, 60), (17, 1), (17, 16), (5, 0)])
def test_every_row_sees_one_window_of_n_keys(tokens: int, cut: int) -> None:
    """With keys laid out M, A, B a row of shift s sees [s, s + N) and nothing else."""
    targets = tokens - cut
    shifts = visibility.two_stream_shifts(tokens, cut)
    for mask, shift in zip(visibility.two_stream_visibility(tokens, cut), shifts, strict=True):
        mask = torch.cat([mask[:, tokens:], mask[:, :tokens]], dim=1)
        key = torch.arange(tokens + targets)
        window = (key >= shift.unsqueeze(1)) & (key < shift.unsqueeze(1) + tokens)
        assert torch.equal(mask, window)


def test_shifts_give_the_dense_masks() -> None:
    for mask_tokens in (True, False):
        for shift, mask in zip(
            visibility.two_stream_shifts(9, 4, mask_tokens=mask_tokens),
            visibility.two_stream_visibility(9, 4, mask_tokens=mask_tokens),
            strict=True,
        ):
            suffix = 5 if mask_tokens else 0
            assert torch.equal(visibility.prefix_suffix_mask(shift, 4, 9, suffix), mask)


def test_pim_is_mapet_without_mask_keys() -> None:
    content, query = visibility.two_stream_visibility(9, 4)
    pim_content, pim_query = visibility.two_stream_visibility(9, 4, mask_tokens=False)
    assert torch.equal(pim_content, content[:9, :9])
    assert torch.equal(pim_query, query[:, :9])


def test_single_stream_instances() -> None:
    causal = visibility.prefix_suffix_mask(visibility.causal_shifts(6), 0, 6)
    assert torch.equal(causal, torch.ones(6, 6, dtype=torch.bool).tril())
    prefix = visibility.prefix_suffix_mask(visibility.prefix_lm_shifts(6, 3), 3, 6)
    expected = torch.ones(6, 6, dtype=torch.bool).tril()
    expected[:, :3] = True
    assert torch.equal(prefix, expected)
    assert visibility.prefix_suffix_mask(visibility.bidirectional_shifts(7), 4, 4, 3).all()


def test_one_cut_per_image_pads_with_blind_rows() -> None:
    cuts = torch.tensor([3, 5, 8])
    content, query = visibility.two_stream_visibility(9, cuts)
    for image, cut in enumerate(cuts.tolist()):
        targets = 9 - cut
        one_content, one_query = visibility.two_stream_visibility(9, cut)
        real = 9 + targets
        assert torch.equal(content[image, :real, :real], one_content)
        assert torch.equal(query[image, :targets, :real], one_query)
        assert not content[image, real:].any() and not content[image, :, real:].any()
        assert not query[image, targets:].any() and not query[image, :, real:].any()


def test_to_image_order_puts_keys_where_their_tokens_are() -> None:
    perm = torch.tensor([0, 3, 1, 2])
    mask = torch.tensor([[True, True, False, False, True]])
    assert visibility.to_image_order(mask, perm).tolist() == [[True, False, False, True, True]]


def test_flex_mask_mod_is_the_dense_mask() -> None:
    shift = torch.tensor([0, 2, 1, 3, -4])
    mask_mod = visibility.flex_mask_mod(shift, 2, content_keys=5)
    q, kv = torch.meshgrid(torch.arange(5), torch.arange(9), indexing="ij")
    dense = visibility.prefix_suffix_mask(shift, 2, 5, 4)
    assert torch.equal(mask_mod(torch.tensor(0), torch.tensor(0), q, kv), dense)


def test_flex_attention_agrees_with_prefix_suffix_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from mapet_kernels import prefix_suffix_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, generator=generator) for n in (12, 20, 20))
    shift = torch.arange(12) % 5
    block_mask = create_block_mask(visibility.flex_mask_mod(shift, 6, 13), None, None, 12, 20, device="cpu")
    flex = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask).transpose(1, 2)
    ours = prefix_suffix_attention(q, k, v, shift, 6, suffix_keys=7)
    torch.testing.assert_close(ours, flex)
