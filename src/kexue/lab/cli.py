"""The command line: list, show, run, site, serve, compare, and the commands of the methods."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from kexue.lab.bars import progress_bars
from kexue.lab.errors import LabError, UsageError

__all__ = ["main"]

app = typer.Typer(
    help="Forty methods of the Scientific Spaces articles: run them, read them, see them.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Runs = Annotated[Path, typer.Option("--out", help="Folder of the runs.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command("list")
def list_methods(
    field: Annotated[str | None, typer.Option(help="Only the methods of one field.")] = None,
) -> None:
    """List the methods, by field."""
    from kexue.lab.catalogue import Catalogue

    entries = list(Catalogue().entries.values())
    fields = list(dict.fromkeys(entry.field for entry in entries))
    if field is not None and field not in fields:
        raise UsageError(f"--field must be one of {', '.join(fields)}, got {field!r}")
    width = max(len(entry.slug) for entry in entries)
    for name in fields if field is None else [field]:
        typer.echo(name)
        for entry in entries:
            if entry.field == name:
                state = "" if entry.built else "  (coming)"
                typer.echo(f"  {entry.slug:{width}s}  {entry.title}{state}")


@app.command()
def show(slug: Annotated[str, typer.Argument(help="Which method.")]) -> None:
    """Show the article of a method in the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    from kexue.lab.catalogue import Catalogue

    entry = Catalogue()[slug]
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(
        Markdown(f"# {entry.title}\n\n{entry.title_zh}\n\n" + entry.text.partition("\n")[2])
    )


@app.command()
def run(
    slugs: Annotated[list[str], typer.Argument(help="Slugs of methods, or `all`.")],
    budget: Annotated[str, typer.Option(help="smoke, quick or full.")] = "quick",
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers.")] = 0,
    device: Annotated[str, typer.Option(help="A torch device, such as cpu or cuda.")] = "cpu",
    data: Annotated[
        Path | None, typer.Option(help="Your own data, if the study takes any.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="How many studies at once.")] = 1,
    backend: Annotated[str, typer.Option(help="loky, dask or ray.")] = "loky",
    out: Runs = Path("runs"),
    site: Annotated[
        Path | None, typer.Option(help="Build the site here, anew after each study.")
    ] = None,
) -> None:
    """Run studies and write their pages; exit 1 when a verdict is not as recorded."""
    from kexue.lab.catalogue import Catalogue

    catalogue = Catalogue()
    entries = (
        catalogue.built()
        if slugs == ["all"]
        else [catalogue[slug] for slug in dict.fromkeys(slugs)]
    )
    for entry in entries:
        if not entry.built:
            raise UsageError(f"{entry.slug!r} has no study yet: `kexue list` shows which ones have")
    if budget not in ("smoke", "quick", "full"):
        raise UsageError(f"--budget must be smoke, quick or full, got {budget!r}")
    if data is not None:
        if not data.exists():
            raise UsageError(f"--data must be an existing file or folder, got {data}")
        entries = _that_take_data(entries, everything=slugs == ["all"])
    _check_device(device)

    from kexue.lab.report import check_site_folder
    from kexue.lab.runner import Order, Outcome, run_studies

    if site is not None:
        check_site_folder(site)
    orders = [
        Order(
            entry.slug,
            out.resolve(),
            budget=budget,  # type: ignore[arg-type]
            seed=seed,
            device=device,
            data=None if data is None else data.resolve(),
            studies=catalogue.package,
        )
        for entry in entries
    ]

    def done(outcome: Outcome) -> None:
        typer.echo(outcome.line())
        # Under torchrun the first process alone keeps runs and shows them.
        if site is not None and outcome.folder is not None and os.environ.get("RANK", "0") == "0":
            shown.append(_build(out, site))
            if len(shown) == 1:
                typer.echo(f"open {_from_here(shown[0])} now: each study joins it as it ends")

    shown: list[Path] = []
    with progress_bars() as bars:
        outcomes = run_studies(orders, jobs=jobs, backend=backend, bars=bars, done=done)
    if not all(outcome.as_recorded for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def site(
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs.")] = Path("runs"),
    out: Annotated[Path, typer.Option("--out", help="Folder of the site.")] = Path("site"),
) -> None:
    """Build the site from the newest run of every study."""
    typer.echo(_from_here(_build(runs, out)))


@app.command()
def serve(
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs.")] = Path("runs"),
    out: Annotated[Path, typer.Option("--out", help="Folder of the site.")] = Path("site"),
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.")] = 8000,
) -> None:
    """Build the site and serve it to this machine until interrupted."""
    import functools
    import http.server

    index = _build(runs, out)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(index.parent))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"port {port} cannot be used ({reason}): give another --port") from None
    with server:
        typer.echo(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    two: Annotated[Path, typer.Argument(help="Folder of another run.", metavar="RUN")],
) -> None:
    """Compare the claims of two runs, number by number."""
    from kexue.lab.compare import comparison

    for line in comparison(one, two):
        typer.echo(line)


def main() -> None:
    """Run the command line; every error is one sentence, and its exit status says which kind."""
    debug = "--debug" in sys.argv[1:]
    # click's own exception, under whichever name this typer keeps it
    click_exception: type[Any] = typer.BadParameter.__mro__[2]
    try:
        _add_commands(sys.argv[1:])
        arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
        status = app(args=arguments, prog_name="kexue", standalone_mode=False)
    except LabError as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except click_exception as error:
        if debug:
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "kexue"
        sentence = error.format_message().rstrip(".")
        _fail(f"{sentence}: `{path} --help` shows what is expected", 2)
    except typer.Abort:
        _fail("interrupted; nothing that looks finished was left behind", 130)
    except KeyboardInterrupt:
        _fail("interrupted; nothing that looks finished was left behind", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    print(f"kexue: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _add_commands(arguments: list[str]) -> None:
    """Add the commands of the `kexue.commands` entry points; only the one called is imported."""
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    for point in metadata.entry_points(group="kexue.commands"):
        if point.name == called:
            command = point.load()
            if isinstance(command, typer.Typer):
                app.add_typer(command, name=point.name)
            else:
                app.command(point.name)(command)
        else:
            app.command(point.name, help=_first_line(point))(lambda: None)


def _first_line(point: metadata.EntryPoint) -> str:
    """The first line of a command's docstring, or its module's, read without importing it."""
    import ast
    import importlib.util

    try:
        spec = importlib.util.find_spec(point.module)
        tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8")) if spec else None
    except (ImportError, OSError, SyntaxError):
        return ""
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ((tree and ast.get_docstring(tree)) or "").partition("\n")[0]


def _build(runs: Path, out: Path) -> Path:
    from kexue.lab.report import build_site

    index, skipped = build_site(runs.resolve(), out.resolve())
    for sentence in skipped:
        print(f"kexue: skipped: {sentence}", file=sys.stderr)
    return index


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _that_take_data(entries: list[Any], *, everything: bool) -> list[Any]:
    taking = [entry for entry in entries if entry.data]
    if everything and taking:
        return taking
    refusing = [entry.slug for entry in entries if not entry.data]
    if refusing:
        raise UsageError(f"--data is for studies that take any; {', '.join(refusing)} takes none")
    return taking


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(
            f"--device must be a torch device of this machine, got {device!r}: "
            f"there is cpu{' and cuda' if torch.cuda.is_available() else ' only'}"
        ) from None


if __name__ == "__main__":
    main()
