"""Search text by a pair scorer, with a budget of calls: build an index, query it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kexue.commands._text import (
    Encoder,
    LatentSemanticEncoder,
    SentenceEncoder,
    read_lines,
    scorer,
)
from kexue.lab.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from kexue.retrieval.cur import CURIndex

__all__ = ["search"]

search = typer.Typer(
    help="Search text by a pair scorer, with a budget of calls.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

_VERSION = 1
_SETTINGS = "index.json"
_DOCUMENTS = "documents.txt"
_ANCHORS = "anchors.txt"
_EMBEDDINGS = "embeddings.safetensors"

Folder = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.")]


@search.command()
def build(
    index: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text, one document a line.")],
    scorer_path: Annotated[
        str | None, typer.Option("--scorer", help="Folder of a CrossEncoder; words by default.")
    ] = None,
    encoder_path: Annotated[
        str | None,
        typer.Option("--encoder", help="Folder of a SentenceTransformer; TF-IDF + LSA by default."),
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Typical queries, one a line; documents by default.")
    ] = None,
    anchors: Annotated[int, typer.Option(help="How many queries are scored against all.")] = 100,
    seed: Annotated[int, typer.Option(help="Which of them.")] = 0,
) -> None:
    """Build an index, go on with one that was interrupted, or add the lines that a file has gained.

    A scorer of pairs is called once for each anchor query and document; every call's score is on
    the disk when the progress bar counts it, and a killed build loses none of those.
    """
    if anchors < 1:
        raise UsageError(f"--anchors must be at least 1, got {anchors}")
    documents = read_lines(file)
    if (index / _SETTINGS).is_file():
        settings = _settings(index)
        _same_choices(index, settings, scorer_path, encoder_path)
    else:
        typical = documents if queries is None else read_lines(queries)
        settings = _create(index, documents, typical, scorer_path, encoder_path, anchors, seed)
    known = read_lines(index / _DOCUMENTS)
    if documents[: len(known)] != known:
        raise UsageError(
            f"{file} must begin with the {len(known)} documents that {index} holds: lines may be "
            "added at the end; anything else needs an index in another folder"
        )
    first = known[: settings["counted"]]
    score = scorer(settings["scorer"], first)
    found = _opened(index, documents, score)
    added = documents[found.anchor_scores_.shape[1] :]
    if added:
        found.add_items(added)
    _write(index / _DOCUMENTS, "".join(f"{document}\n" for document in documents))
    _embed(index, documents, settings["encoder"])
    _with_bar("scores", lambda progress: found.build(progress=progress))
    typer.echo(f"{len(documents)} documents, {found.n_calls} pairs scored, in {index}")


@search.command()
def query(
    index: Folder,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is looked for.")],
    k: Annotated[int, typer.Option("-k", "--k", help="How many documents.")] = 10,
    budget: Annotated[int, typer.Option(help="How many pairs may be scored.")] = 100,
    rounds: Annotated[int, typer.Option(help="Predictions between them.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Print the best documents for a query, each with its exact score."""
    import numpy as np

    if not text.strip():
        raise UsageError("TEXT must hold something to look for, got nothing")
    if not 1 <= k <= budget or rounds < 1:
        raise UsageError(
            "--budget must be at least -k, and -k and --rounds at least 1, "
            f"got {budget}, {k} and {rounds}"
        )
    settings = _settings(index)
    documents = read_lines(index / _DOCUMENTS)
    arrays, about = _kept(index)
    vectors = arrays["vectors"]
    if len(vectors) != len(documents):
        raise UsageError(f"{index} is not complete: run `kexue search build` again to go on")
    score = scorer(settings["scorer"], documents[: settings["counted"]])
    encoder: Encoder = (
        LatentSemanticEncoder.from_state(arrays, about)
        if settings["encoder"] is None
        else SentenceEncoder(settings["encoder"])
    )
    asked = encoder.encode([text])[0]
    nearest = np.argsort(-(vectors @ asked), kind="stable")[:budget]

    def run(progress: Callable[[int, int], object] | None) -> Any:
        done = 0

        def counting(pairs: Any) -> Any:
            nonlocal done
            scores = score(pairs)
            done += len(pairs)
            if progress is not None:
                progress(done, min(budget, len(documents)))
            return scores

        found = _opened(index, documents, counting)
        if not found.complete or found.anchor_scores_.shape[1] < len(documents):
            raise UsageError(f"{index} is not complete: run `kexue search build` again to go on")
        # A word that no document has leaves nothing to be near to: then the draw is uniform.
        initial = nearest if asked.any() else None
        return found.search(text, k=k, budget=budget, rounds=rounds, initial=initial)

    result = _with_bar("pairs", run)
    rows = [
        {"score": float(value), "document": documents[number], "line": int(number) + 1}
        for value, number in zip(result.scores, result.indices, strict=True)
    ]
    if as_json:
        print(json.dumps({"pairs_scored": result.n_calls, "results": rows}, ensure_ascii=False))
        return
    for row in rows:
        typer.echo(f"{row['score']:8.4f}  {row['document']}")


def _create(
    index: Path,
    documents: list[str],
    typical: list[str],
    scorer_path: str | None,
    encoder_path: str | None,
    anchors: int,
    seed: int,
) -> dict[str, Any]:
    import numpy as np

    if index.exists() and (not index.is_dir() or any(_foreign(index))):
        raise UsageError(f"{index} holds something that is no index: name another folder")
    # A path without a model is refused before anything is written.
    scorer(scorer_path, documents[:1])
    if encoder_path is not None:
        SentenceEncoder(encoder_path)
    index.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(seed).choice(
        len(typical), min(anchors, len(typical)), replace=False
    )
    _write(index / _ANCHORS, "".join(f"{typical[number]}\n" for number in chosen))
    _write(index / _DOCUMENTS, "".join(f"{document}\n" for document in documents))
    settings = {
        "version": _VERSION,
        "scorer": None if scorer_path is None else str(Path(scorer_path).resolve()),
        "encoder": None if encoder_path is None else str(Path(encoder_path).resolve()),
        # The embedded scorer counts words in these documents and never again: scores must stay.
        "counted": len(documents),
    }
    _write(index / _SETTINGS, json.dumps(settings, indent=1) + "\n")
    return settings


def _foreign(index: Path) -> list[Path]:
    """What is in the folder besides the files of an index that was never finished."""
    own = {_SETTINGS, _DOCUMENTS, _ANCHORS, _EMBEDDINGS, "cur"}
    return [p for p in index.iterdir() if p.name not in own and not p.name.startswith(".")]


def _settings(index: Path) -> dict[str, Any]:
    path = index / _SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["version"] != _VERSION:
            raise ValueError(f"its version is {settings['version']}")
        if not isinstance(settings["counted"], int):
            raise ValueError("its counts are damaged")
        settings["scorer"], settings["encoder"]
    except FileNotFoundError:
        raise UsageError(f"{index} is no index: `kexue search build {index} FILE` first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} must be the settings of an index ({error})") from error
    return settings


def _same_choices(
    index: Path, settings: dict[str, Any], scorer_path: str | None, encoder_path: str | None
) -> None:
    for option, given in (("scorer", scorer_path), ("encoder", encoder_path)):
        if given is not None and str(Path(given).resolve()) != settings[option]:
            raise UsageError(
                f"--{option} of {index} is {settings[option] or 'the embedded one'} and cannot "
                "change: its scores are kept; build another index"
            )


def _opened(index: Path, documents: list[str], score: Callable[..., Any]) -> CURIndex:
    """Open the scores; a build that was killed may have left fewer documents in them."""
    from kexue.retrieval.cur import CURIndex, stored_shape

    try:
        shape = stored_shape(index / "cur")
        count = len(documents) if shape is None else shape[1]
        return CURIndex(score, documents[:count], read_lines(index / _ANCHORS), path=index / "cur")
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{index}: {error}") from error


def _embed(index: Path, documents: list[str], path: str | None) -> None:
    """Embed the documents that have no vector yet; words are learnt anew where there are more."""
    import numpy as np
    from safetensors.numpy import save

    from kexue._files import write_whole

    parts: list[np.ndarray] = []
    if (index / _EMBEDDINGS).is_file():
        vectors = _kept(index)[0]["vectors"]
        if len(vectors) == len(documents):
            return
        parts = [] if path is None else [vectors]
    done = sum(map(len, parts))
    encoder: Encoder = (
        LatentSemanticEncoder.fit(documents) if path is None else SentenceEncoder(path)
    )

    def run(progress: Callable[[int, int], object] | None) -> None:
        for start in range(done, len(documents), 256):
            parts.append(encoder.encode(documents[start : start + 256]))
            if progress is not None:
                progress(min(start + 256, len(documents)), len(documents))

    _with_bar("vectors", run)
    arrays, about = encoder.state() if isinstance(encoder, LatentSemanticEncoder) else ({}, {})
    # Vectors and what made them are one file: they can never be of two minds.
    arrays["vectors"] = np.concatenate(parts)
    write_whole(index / _EMBEDDINGS, save(arrays, metadata=about))


def _kept(index: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    path = index / _EMBEDDINGS
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            arrays["vectors"]
            return arrays, file.metadata() or {}
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(
            f"{path} must hold the documents' vectors ({error}): remove it and run "
            "`kexue search build` again"
        ) from error


def _write(path: Path, content: str) -> None:
    from kexue._files import write_whole

    try:
        write_whole(path, content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror})") from error


def _with_bar(label: str, run: Callable[[Callable[[int, int], object] | None], Any]) -> Any:
    """Run with a function that shows how many of how many are done; None where nobody looks."""
    from kexue.lab.bars import progress_bars

    with progress_bars() as bars:
        if bars is None:
            return run(None)
        task = bars.add_task(label, total=None, metric="")
        return run(lambda done, total: bars.update(task, completed=done, total=total))
