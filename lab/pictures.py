"""Where a picture of lab/ goes, and the canvas that it is drawn on."""

from pathlib import Path

from data.lines import new_file


def new_picture(out: str, ours: str, *beside: str) -> list[Path]:
    """The paths of a picture, and of files beside it with these suffixes. Raises ValueError if they
    cannot be written; one that has `ours` in it is of an earlier run, and is written over."""
    picture = Path(out)
    if picture.suffix.lower() != ".png":
        raise ValueError(f"--out {out} is no PNG picture: end it in .png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    names = [out, *(str(picture.with_suffix(suffix)) for suffix in beside)]
    return [
        new_file("out", name, lambda path: ours.encode() in path.read_bytes()) for name in names
    ]


def new_figure(path: Path, width: float, height: float):
    """An empty figure of matplotlib, sizes in inches; None if that is missing, which is said: the
    table must not fail for a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn: pip install matplotlib")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path, ours: str) -> None:
    """Writes the figure, marked as `ours`."""
    figure.savefig(path, dpi=90, metadata={"Software": ours})
