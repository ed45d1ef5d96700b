"""First file that a fresh interpreter runs, in the launcher and inside the seal.

Started as `python -I -S -B entry.py PART {"packages": {...}, "site": [...]}`; the launcher needs
the folder of `airgap` alone and is spared the parser. `-I -S` leaves a path of the standard
library alone, so no `.pth` file and no variable of the environment runs code here. Our packages
are found by folder and not by listing a parent folder, which the seal may not read.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, SourceFileLoader


class Folders:
    """A finder for top-level packages whose folders are known."""

    def __init__(self, packages: dict[str, str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of a package of ours; None leaves the name to the other finders."""
        del path, target
        folder = self._packages.get(name)
        if folder is None:
            return None
        path = f"{folder}/__init__.py"
        spec = ModuleSpec(name, SourceFileLoader(name, path), origin=path, is_package=True)
        spec.submodule_search_locations = [folder]
        spec.has_location = True
        return spec


def main(argv: list[str]) -> None:
    """Make our packages importable and hand over to the launcher, the worker or a conversion."""
    part = argv[1]
    if part == "launcher":
        sys.meta_path.append(Folders({"airgap": argv[2]}))
        from airgap.enclave import launcher  # noqa: PLC0415 - importable only now

        launcher.main(argv[3:])
        return
    import json  # noqa: PLC0415 - the launcher does without

    where = json.loads(argv[2])
    # Our three names come from their folders alone: an editable install leaves a folder `airgap`
    # without code among the site packages. For all other names the standard library stands first.
    sys.meta_path.insert(0, Folders(where["packages"]))
    sys.path.extend(where["site"])
    if part == "worker":
        from airgap.enclave import worker  # noqa: PLC0415

        worker.main()
    elif part == "convert":
        from airgap.enclave import stub  # noqa: PLC0415

        stub.main()
    elif part == "guest":
        from airgap.enclave import guest  # noqa: PLC0415

        guest.main()
    else:
        from airgap.enclave import fixture  # noqa: PLC0415

        fixture.main()


if __name__ == "__main__":
    main(sys.argv)
