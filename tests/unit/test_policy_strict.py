"""Strict YAML: what two readers could take for two things is refused, with line and column."""

from datetime import date

import pytest

from policy import strict
from policy.errors import RefusedError
from policy.strict import read_yaml, shift_day

GOOD = b'a: 1\nb: [true, false, null, word, "quoted 12:30", -5]\nc: {d: "no"}\n'


def test_plain_values_pass():
    source = read_yaml(GOOD)
    assert source.value == {
        "a": 1,
        "b": [True, False, None, "word", "quoted 12:30", -5],
        "c": {"d": "no"},
    }
    assert source.where(("b", 3)) == "pack: line 2, column 24"
    assert source.where(("c", "nothing here")) == "pack: line 3, column 4"


TRAPS = {
    "the country that is no": ("a: NO", 4),
    "yes": ("a: yes", 4),
    "on": ("a: on", 4),
    "capital true": ("a: True", 4),
    "tilde": ("a: ~", 4),
    "nothing at all": ("a:", 3),
    "underscored integer": ("a: 1_000", 4),
    "octal": ("a: 0o17", 4),
    "old octal": ("a: 017", 4),
    "hexadecimal": ("a: 0x10", 4),
    "sexagesimal": ("a: 12:30", 4),
    "exponent": ("a: 1e3", 4),
    "fraction": ("a: 1.5", 4),
    "infinity": ("a: .inf", 4),
    "plus": ("a: +1", 4),
    "minus zero": ("a: -0", 4),
    "unquoted date": ("a: 2026-11-23", 4),
    "too large": ("a: 9007199254740992", 4),
    "integer key": ("1: a", 1),
    "boolean key": ("true: a", 1),
    "duplicate key": ("a: b\na: c", 1),
    "merge key": ("<<: {a: b}", 1),
    "anchor": ("a: &x b", 4),
    "tag": ("a: !!str b", 4),
    "python tag": ("a: !!python/object/apply:os.system [ls]", 4),
    "second document": ("a: b\n---\nc: d", 1),
    "tab": ("a:\tb", 3),
    "direction mark": ('a: "b\u202ec"', 6),
    "direction mark by escape": ('a: "b\\u202Ec"', 4),
    "zero-width space": ("a: b\u200bc", 5),
    "byte order mark": ("\ufeffa: b", 1),
    "unclosed": ("a: [b", None),
    "bare list in mapping": ("a: b\n- c", None),
}


@pytest.mark.parametrize(("text", "column"), TRAPS.values(), ids=TRAPS.keys())
def test_a_trap_is_refused_with_its_place(text, column):
    assert read_yaml(GOOD).value
    with pytest.raises(RefusedError) as caught:
        read_yaml(text.encode())
    assert caught.value.code == "pack.yaml"
    assert "line " in caught.value.message
    if column is not None:
        assert f"column {column}:" in caught.value.message


def test_an_alias_bomb_is_refused_before_it_grows():
    bomb = "a: &a [x,x]\n" + "".join(
        f"{chr(98 + at)}: &{chr(98 + at)} [*{chr(97 + at)},*{chr(97 + at)}]\n" for at in range(20)
    )
    with pytest.raises(RefusedError, match="anchor"):
        read_yaml(bomb.encode())
    with pytest.raises(RefusedError, match="alias"):
        read_yaml(b"a: *b")


def test_limits_are_kept():
    with pytest.raises(RefusedError) as caught:
        read_yaml(b" " * (strict.MAX_BYTES + 1))
    assert caught.value.code == "pack.limit"
    for text in (
        "a: " + "[" * 100 + "]" * 100,
        "a: [" * 5_000,
        "a: " + "x" * (strict.MAX_TEXT + 1),
        "a: [" + "1," * (strict.MAX_NODES + 1) + "]",
    ):
        with pytest.raises(RefusedError) as caught:
            read_yaml(text.encode())
        assert caught.value.code == "pack.limit"


def test_bytes_that_are_not_utf8_are_placed():
    with pytest.raises(RefusedError, match=r"line 2, column 4: byte 0xff"):
        read_yaml(b"a: b\nb: \xff")


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"%YAML 1.1\n---\na: b\n"])
def test_empty_documents_and_directives_are_refused(content):
    with pytest.raises(RefusedError) as caught:
        read_yaml(content)
    assert caught.value.code == "pack.yaml"


def test_the_python_parser_reads_alike_where_the_c_parser_is_absent(monkeypatch):
    import yaml

    fast = read_yaml(GOOD)
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    slow = read_yaml(GOOD)
    assert (fast.value, fast.places) == (slow.value, slow.places)


def test_a_day_is_moved_and_never_beyond_the_calendar():
    assert shift_day(date(2026, 12, 31), 1) == date(2027, 1, 1)
    assert shift_day(date(2026, 3, 1), -1) == date(2026, 2, 28)
    assert shift_day(date.max, 400) == date.max
    assert shift_day(date.min, -1) == date.min
