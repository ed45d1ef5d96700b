"""Random alterations of a file, in every region of the tar that it is."""


def places_of(raw):
    """Return start and size of every region of a file: parts of the head, members, gaps."""
    found, position = [], 0
    while position + 512 <= len(raw) and raw[position : position + 512].strip(b"\0"):
        size = int(raw[position + 124 : position + 135], 8)
        found += [(position, 512), (position + 512, max(1, size))]
        position += 512 + size + -size % 512
    found.append((min(position, len(raw) - 1), max(1, len(raw) - position)))
    return [(start, size) for start, size in found if start < len(raw)]


def mutate(raw, places, dice):
    """Return one altered copy: flip, cut, insert, delete, swap or repeat, in any region."""
    start, size = dice.choice(places)
    at = min(start + dice.randrange(size), len(raw) - 1)
    length = dice.choice([1, 2, 7, 512, 4096])
    out = bytearray(raw)
    kind = dice.randrange(6)
    if kind == 0:
        out[at] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out[at:at] = dice.randbytes(length)
    elif kind == 3:
        del out[at : at + length]
    elif kind == 4:
        other = dice.randrange(len(raw) - length)
        out[at : at + length], out[other : other + length] = (
            out[other : other + length],
            out[at : at + length],
        )
    else:
        out[at : at + length] = out[at : at + length] * 2
    return bytes(out)
