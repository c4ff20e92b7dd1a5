"""The pool of generated images."""

from __future__ import annotations

import pytest
import torch

from medkd.nets.image_pool import ImagePool


def numbered(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_empty_pool_hands_images_back_until_it_is_full():
    pool, source = ImagePool(4), generator()
    assert torch.equal(pool.exchange(numbered(0, 1, 2), source), numbered(0, 1, 2))
    assert torch.equal(pool.exchange(numbered(3), source), numbered(3))
    assert len(pool) == 4


def test_full_pool_exchanges_about_half_and_loses_no_image():
    pool, source = ImagePool(10), generator()
    pool.exchange(numbered(*range(10)), source)
    seen = [int(pool.exchange(numbered(value), source)[0, 0, 0, 0]) for value in range(10, 1010)]
    fresh = sum(out == value for out, value in zip(seen, range(10, 1010), strict=True))
    assert 430 < fresh < 570
    kept = pool.get_extra_state()[:, 0, 0, 0].int().tolist()
    assert sorted(seen + kept) == list(range(1010))


def test_pool_of_size_zero_draws_nothing():
    source = generator()
    before = source.get_state()
    image = numbered(1).requires_grad_()
    assert not ImagePool(0).exchange(image, source).requires_grad
    assert torch.equal(source.get_state(), before)


def test_images_handed_back_are_detached_and_safe_from_changes_in_place():
    pool = ImagePool(2)
    image = numbered(5).clone().requires_grad_()
    assert not pool.exchange(image, generator()).requires_grad
    with torch.no_grad():
        image.zero_()
    assert pool.get_extra_state().max() == 5


def test_state_travels_through_a_file_without_unpickling(tmp_path):
    pool, source = ImagePool(3), generator()
    pool.exchange(numbered(1, 2, 3, 4), source)
    torch.save(pool.state_dict(), tmp_path / "pool.pt")
    other = ImagePool(3)
    other.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True))
    first, second = generator(1), generator(1)
    for value in range(5, 25):
        assert torch.equal(pool.exchange(numbered(value), first), other.exchange(numbered(value), second))


def test_empty_state_empties_a_pool():
    pool = ImagePool(2)
    pool.exchange(numbered(1), generator())
    pool.load_state_dict(ImagePool(2).state_dict())
    assert len(pool) == 0


def test_bad_sizes_and_shapes_are_refused():
    with pytest.raises(ValueError, match="negative"):
        ImagePool(-1)
    pool = ImagePool(3)
    pool.exchange(numbered(1, 2, 3), generator())
    with pytest.raises(ValueError, match="do not fit"):
        ImagePool(2).load_state_dict(pool.state_dict())
    with pytest.raises(ValueError, match=r"keeps \(1, 2, 2\)"):
        pool.exchange(torch.zeros(1, 1, 3, 3), generator())
