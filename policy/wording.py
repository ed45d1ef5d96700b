"""How a number of things is said."""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: `1 entry`, `2 entries`; `many` where it is not `one` and s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
