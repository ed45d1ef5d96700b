"""RFC 6962 trees against the published vectors and against a naive second implementation."""

import contextlib
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import merkle
from policy.errors import RefusedError

# The eight inputs and roots of certificate-transparency-go's reference tree (RFC 6962 test data).
INPUTS = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def naive(leaves, h=hashlib.sha256):
    if not leaves:
        return h(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return h(b"\x01" + naive(leaves[:k], h) + naive(leaves[k:], h)).digest()


def leaves_of(count):
    return [merkle.leaf_hash(bytes([i % 256, i // 256])) for i in range(count)]


def test_published_roots():
    leaves = [merkle.leaf_hash(data) for data in INPUTS]
    for size, expected in enumerate(ROOTS, 1):
        assert merkle.root(leaves[:size]).hex() == expected
        assert merkle.Tree(leaves).root(size).hex() == expected
    assert merkle.root([]).hex() == hashlib.sha256().hexdigest()
    assert merkle.Tree().root() == merkle.empty_root()


def test_hash_is_an_argument():
    leaves = [merkle.leaf_hash(data, hashlib.sha384) for data in INPUTS]
    assert len(leaves[0]) == 48
    assert merkle.root(leaves, hashlib.sha384) == naive(leaves, hashlib.sha384)
    tree = merkle.Tree(leaves, hashlib.sha384)
    assert tree.root() == merkle.root(leaves, hashlib.sha384)
    with pytest.raises(ValueError, match="48 bytes"):
        tree.append(bytes(32))


@pytest.mark.parametrize("size", [*range(1, 34), 100, 127, 129])
def test_every_inclusion_proof_verifies_and_no_other_leaf_does(size):
    leaves = leaves_of(size)
    tree = merkle.Tree(leaves)
    assert tree.root() == naive(leaves) == merkle.root(leaves)
    for index in range(size):
        proof = tree.inclusion_proof(index)
        merkle.verify_inclusion(leaves[index], index, size, proof, tree.root())
        for other in (bytes(32), leaves[(index + 1) % size] if size > 1 else b"x" * 32):
            with pytest.raises(RefusedError, match="root"):
                merkle.verify_inclusion(other, index, size, proof, tree.root())
        with pytest.raises(RefusedError):
            merkle.verify_inclusion(leaves[index], index, size, [*proof, bytes(32)], tree.root())
        if proof:
            with pytest.raises(RefusedError):
                merkle.verify_inclusion(leaves[index], index, size, proof[:-1], tree.root())


def test_every_consistency_proof_verifies_and_a_fork_does_not():
    leaves = leaves_of(40)
    tree = merkle.Tree(leaves)
    for new in range(41):
        for old in range(new + 1):
            proof = tree.consistency_proof(old, new)
            merkle.verify_consistency(old, new, tree.root(old), tree.root(new), proof)
            if 0 < old < new:
                for forged in ([*proof, bytes(32)], proof[:-1]):
                    with pytest.raises(RefusedError):
                        merkle.verify_consistency(old, new, tree.root(old), tree.root(new), forged)
                with pytest.raises(RefusedError):
                    merkle.verify_consistency(old, new, bytes(32), tree.root(new), proof)
                with pytest.raises(RefusedError):
                    merkle.verify_consistency(old, new, tree.root(old), bytes(32), proof)


def test_trivial_consistency_still_compares_roots():
    tree = merkle.Tree(leaves_of(5))
    merkle.verify_consistency(5, 5, tree.root(), tree.root(), [])
    with pytest.raises(RefusedError):
        merkle.verify_consistency(5, 5, bytes(32), tree.root(), [])
    with pytest.raises(RefusedError):
        merkle.verify_consistency(0, 5, bytes(32), tree.root(), [])
    with pytest.raises(RefusedError):
        merkle.verify_consistency(5, 5, tree.root(), tree.root(), [bytes(32)])


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0)])
def test_a_leaf_outside_the_tree_is_refused(index, size):
    with pytest.raises(RefusedError):
        merkle.verify_inclusion(bytes(32), index, size, [], bytes(32))
    tree = merkle.Tree(leaves_of(3))
    with pytest.raises(ValueError, match="no leaf"):
        tree.inclusion_proof(index, size)
    with pytest.raises(IndexError):
        tree.leaf(7)


def test_sizes_out_of_order_are_refused():
    tree = merkle.Tree(leaves_of(3))
    assert tree.size == 3
    assert tree.leaf(2) == leaves_of(3)[2]
    with pytest.raises(ValueError, match="no sizes"):
        tree.consistency_proof(2, 1)
    with pytest.raises(ValueError, match="not 4"):
        tree.root(4)
    for old, new in ((3, 2), (-1, 2)):
        with pytest.raises(RefusedError):
            merkle.verify_consistency(old, new, bytes(32), bytes(32), [])
    with pytest.raises(RefusedError):
        merkle.verify_consistency(3, 5, bytes(32), bytes(32), [])


@settings(max_examples=200, deadline=None)
@given(
    old=st.integers(-2, 70),
    new=st.integers(-2, 70),
    proof=st.lists(st.binary(min_size=0, max_size=40), max_size=9),
    leaf=st.binary(max_size=40),
)
def test_any_proof_is_accepted_or_refused_with_our_error(old, new, proof, leaf):
    for check in (
        lambda: merkle.verify_inclusion(leaf, old, new, proof, bytes(32)),
        lambda: merkle.verify_consistency(old, new, leaf, bytes(32), proof),
    ):
        with contextlib.suppress(RefusedError):
            check()
