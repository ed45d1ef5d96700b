"""Names of tiles: those of a tree and no other, without counting up to what a stranger claims."""

import pytest

from airgap.audit.tiles import WIDTH, is_tile_of, tile_name


def names_of(size):
    level, nodes = 0, size
    while nodes:
        whole, rest = divmod(nodes, WIDTH)
        yield from (tile_name(level, index) for index in range(whole))
        if rest:
            yield tile_name(level, whole, rest)
        level, nodes = level + 1, whole


@pytest.mark.parametrize("size", [1, 255, 256, 257, 65_535, 65_536, 65_793, 300_000])
def test_the_tiles_of_a_tree_and_no_other(size):
    names = set(names_of(size))
    assert all(is_tile_of(name, size) for name in names)
    for name in sorted(names)[:40]:
        level, rest = name.split("/", 1)
        odd = (
            f"{name}.p/1", f"{name}.p/0", f"{name}.p/256", f"{name}/", f"0{name}",
            f"{level}//{rest}", f"{int(level) + 1}/{rest}", f"{level}/x000/{rest}",
            f"{level}/{rest[:-1]}",
        )  # fmt: skip
        assert [other for other in odd if other not in names and is_tile_of(other, size)] == []


def test_a_claimed_size_costs_nothing():
    assert is_tile_of("0/005", 1 << 64)
    assert not is_tile_of("0/005", 1)
    assert not is_tile_of("99/000", 1 << 64)
    assert not is_tile_of("0/" + "x000/" * 5_000 + "000", 1 << 64)
