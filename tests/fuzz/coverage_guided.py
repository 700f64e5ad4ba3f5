"""Let atheris look for inputs that reach new code: `python -m tests.fuzz.coverage_guided CORPUS [-max_total_time=600]`.

An optional extra (`pip install atheris`); the arguments are those of libFuzzer. CORPUS is a folder to which it adds
what it finds; an empty one is filled from the examples of `tests.fuzz.seeds`. The first byte of an input says what the
others are: a file of torch or safetensors, an index, a `.metadata`, or one rank's file.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

from core import containers
from core.errors import CheckpointError

NAMES = ("x.pt", "x.safetensors", "model.safetensors.index.json", ".metadata", "model_rank00000.pt", "x.distcp")
"""What a file is called, by the first byte of the input."""


def fill(corpus: Path) -> None:
    """Write the files of all examples as inputs."""
    from tests.fuzz.mutate import make_seeds, read_examples

    with tempfile.TemporaryDirectory() as scratch:
        make_seeds(Path(scratch) / "seeds", None)
        for example in read_examples(Path(scratch) / "seeds"):
            for i, (name, data) in enumerate(example.files.items()):
                kind = next((k for k, known in enumerate(NAMES) if Path(name).suffix == Path(known).suffix), 0)
                kind = NAMES.index(Path(name).name) if Path(name).name in NAMES else kind
                (corpus / f"{example.name}_{i}").write_bytes(bytes([kind]) + data)


def main(argv: list[str]) -> int:
    """Run until a finding or the limit in the arguments."""
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        print(
            "error: atheris is not installed. It is an optional extra: pip install atheris. "
            "python -m tests.fuzz.mutate needs nothing.",
            file=sys.stderr,
        )
        return 1
    folders = [Path(word) for word in argv[1:] if not word.startswith("-")]
    if len(folders) != 1:
        print("error: name one folder for the corpus", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["core"]):  # before anything else imports them: later ones are not watched
        for module in walk_packages(containers.__path__, "core.containers."):
            import_module(module.name)
        from core.containers.open import open_container
    folders[0].mkdir(parents=True, exist_ok=True)
    if not any(folders[0].iterdir()):
        fill(folders[0])
    scratch = Path(tempfile.mkdtemp())

    def one(data: bytes) -> None:
        path = scratch / NAMES[data[0] % len(NAMES)] if data else scratch / NAMES[0]
        path.write_bytes(data[1:])
        try:
            open_container(path)
        except CheckpointError:
            return
        finally:
            path.unlink()

    atheris.Setup([*argv, "-timeout=2", "-rss_limit_mb=400"], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
