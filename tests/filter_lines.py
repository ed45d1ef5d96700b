"""Filters taken apart: an interpreter, the lines of a program, and the program without one.

Imports nothing of a test framework, so that a copy of `without` can be put into a mutant.
"""

from __future__ import annotations

import struct

from airgap.enclave import filters, tables

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def run(program, nr, arch, *arguments):
    """Interpret a program on one call as the kernel does; returns its verdict."""
    code = filters.unpack(program)
    values = list(arguments) + [0] * (6 - len(arguments))
    memory = {0: nr, 4: arch}
    for at, value in enumerate(values):
        memory[16 + 8 * at] = value & 0xFFFFFFFF
        memory[20 + 8 * at] = value >> 32 & 0xFFFFFFFF
    accumulator, at = 0, 0
    while True:
        op, yes, no, k = code[at]
        at += 1
        if op == LOAD:
            accumulator = memory[k]
        elif op == RETURN:
            return k
        else:
            test = {EQUAL: accumulator == k, AT_LEAST: accumulator >= k}
            at += yes if test.get(op, bool(accumulator & k)) else no


def name_of(nr, arch="x86_64"):
    column = 0 if arch == "x86_64" else 1
    return next((name for name, pair in tables.NUMBERS.items() if pair[column] == nr), None)


def lines(program, arch="x86_64"):
    """Return {label: (first instruction, count)} of everything in a program that decides."""
    code = filters.unpack(program)
    found = {"architecture": (1, 2)}
    at = 4
    while at < len(code) - 1:
        op, _, no, k = code[at]
        if op == AT_LEAST:
            found["x32" if k == tables.X32_BIT else "ceiling"] = (at, 2)
            at += 2
            continue
        name = name_of(k, arch)
        found[name] = (at, 1 + no)
        if no > 1:
            found |= _tests(name, code, at + 2, at + 1 + no)
        at += 1 + no
    return found


def _tests(name, code, at, end):
    """Return the tests of a rule on an argument: a value, or a mask with its answer."""
    found = {}
    while code[at][0] != RETURN and at < end:
        count = 2 if code[at][0] == ANY_BIT else 1
        found[f"{name} {code[at][3]:#x}"] = (at, count)
        at += count
    return found


def without(program, first, count):
    """Return a program without `count` instructions; jumps into the gap land behind it."""
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]

    def moved(target):
        return target if target <= first else max(first, target - count)

    out = []
    for at, (op, yes, no, k) in enumerate(code):
        if first <= at < first + count:
            continue
        if op in {0x15, 0x35, 0x45}:
            yes, no = (moved(at + 1 + step) - moved(at) - 1 for step in (yes, no))  # noqa: PLW2901
        out.append(struct.pack("<HBBI", op, yes, no, k))
    return b"".join(out)
