"""The libraries that llc_fast is measured against: versions, how to install them side by side, and where they lie.

    python benchmarks/speed/rivals.py [--rivals build/rivals]              what is here, and the commands for the rest
    python benchmarks/speed/rivals.py --install [NAME …] [--rivals FOLDER]  runs these commands

Two versions of devinterp can't be in one environment, and canonical-interp asks for a newer Python than it needs. So
each rival has a folder of its own, ``FOLDER/distribution-version``, which is put in front of the import path of the
processes that measure it, and only of these. What is large and common (torch, NumPy, pandas, transformers, …) comes
from the environment. A rival that is installed in the environment in the same version needs no folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "rivals"


class Rival(NamedTuple):
    """A library in one version.

    Attributes:
        distribution, version: as pip knows it.
        package: as it is imported.
        needs: what pip is to put beside it, besides torch, NumPy, pandas, tqdm, matplotlib and typing-extensions.
        options: further options of pip.
    """

    distribution: str
    version: str
    package: str
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.distribution} {self.version}"

    def folder(self, root: Path) -> Path:
        return root / f"{self.distribution}-{self.version}"

    def command(self, root: Path) -> list[str]:
        """What to give to pip. Dependencies are named, as its own search would bring another torch."""
        requirements = [f"{self.distribution}=={self.version}", *self.needs]
        return ["install", "--no-deps", *self.options, "--target", str(self.folder(root)), *requirements]


RIVALS = {
    "devinterp": Rival("devinterp", "1.3.2", "devinterp", ("einops", "cloudpickle")),
    "devinterp2": Rival(
        "devinterp",
        "2.0.1",
        "devinterp",
        (
            "pydantic==2.14.4",  # which works with one version of its core
            "pydantic-core==2.50.5",
            *("annotated-types", "typing-inspection", "zarr<4", "numcodecs", "donfig", "google-crc32c", "xarray"),
        ),
    ),
    # It runs with Python 3.11 once itertools.batched is there, as contenders.py sees to, but pip would refuse.
    "canonical": Rival("canonical-interp", "0.2.7", "canonical_interp", (), ("--ignore-requires-python",)),
    "posteriors": Rival(
        "posteriors",
        "0.1.3",
        "posteriors",
        ("torchopt", "optree", "tensordict", "pyvers<0.3", "graphviz", "cloudpickle"),
    ),
}
"""By the name that scripts call them; what follows a hyphen ("canonical-cached") is a way to use it."""


def rival_of(contender: str) -> Rival | None:
    """None if the contender is no rival."""
    return RIVALS.get(contender.partition("-")[0])


def version_in(folder: Path, distribution: str) -> str | None:
    found = importlib.metadata.distributions(path=[str(folder)])
    return next((d.version for d in found if (d.metadata["Name"] or "").replace("_", "-") == distribution), None)


def path_of(rival: Rival, root: Path) -> list[str] | None:
    """What to put in front of the import path to get `rival`: nothing if it is installed; None if it isn't here."""
    folder = rival.folder(root)
    if version_in(folder, rival.distribution) == rival.version:
        return [str(folder)]
    try:
        return [] if importlib.metadata.version(rival.distribution) == rival.version else None
    except importlib.metadata.PackageNotFoundError:
        return None


def paths_of(contenders: Iterable[str], root: Path) -> dict[str, list[str]]:
    """The import paths of the rivals among `contenders` that are here; of each other one it is said what to run."""
    found: dict[str, list[str]] = {}
    missing: set[Rival] = set()
    for contender in contenders:
        rival = rival_of(contender)
        if rival is None:
            continue
        path = path_of(rival, root)
        if path is None:
            missing.add(rival)
        else:
            found[contender] = path
    for rival in sorted(missing):
        print(f"{rival.title} is not installed, its rows stay empty. To fill them: {pip(rival, root)}")
    return found


def pip(rival: Rival, root: Path) -> str:
    return "pip " + " ".join(f"'{part}'" if "<" in part else part for part in rival.command(root))


@contextlib.contextmanager
def importing(rival: Rival, root: Path) -> Iterator[ModuleType]:
    """The package of `rival`, for imports from it within the block, whatever other version has been imported.

    What was imported stays usable afterwards, and its dependencies importable; what other version there was before is
    there again.

    Raises:
        ImportError: it isn't here; the message says what to run.
    """
    path = path_of(rival, root)
    if path is None:
        raise ImportError(f"{rival.title} is not installed: {pip(rival, root)}")

    def forget() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == rival.package}

    before = forget()
    sys.path[:0] = path
    importlib.invalidate_caches()
    try:
        yield importlib.import_module(rival.package)
    finally:
        forget()
        sys.modules.update(before)
        for part in path:
            sys.path.remove(part)
            sys.path.append(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", type=Path, default=FOLDER)
    parser.add_argument("--install", nargs="*", choices=RIVALS, metavar="NAME")
    options = parser.parse_args()
    wanted = RIVALS if options.install is None else options.install or RIVALS
    for name in wanted:
        rival = RIVALS[name]
        path = path_of(rival, options.rivals)
        if path is not None:
            print(f"{rival.title}: {path[0] if path else 'installed'}")
        elif options.install is None:
            print(f"{rival.title}: {pip(rival, options.rivals)}")
        else:
            subprocess.run([sys.executable, "-m", "pip", *rival.command(options.rivals)], check=True)


if __name__ == "__main__":
    main()
