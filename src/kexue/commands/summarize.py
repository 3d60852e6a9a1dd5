"""`kexue summarize`: the sentences of a text that are nearest to what it is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kexue.commands._text import Encoder, LatentSemanticEncoder, SentenceEncoder
from kexue.lab.errors import DataError, UsageError

__all__ = ["summarize"]


def summarize(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text, plain or gzipped.")],
    about: Annotated[
        str | None, typer.Option(help="The aspect; by default the middle of the whole text.")
    ] = None,
    sentences: Annotated[int, typer.Option("-n", "--sentences", help="How many.")] = 5,
    encoder_path: Annotated[
        str | None,
        typer.Option("--encoder", help="Folder of a SentenceTransformer; TF-IDF + LSA by default."),
    ] = None,
    neighbors: Annotated[int, typer.Option(help="Neighbours of a sentence in the graph.")] = 15,
    apart: Annotated[
        float, typer.Option(help="Least angle, in radians, between two chosen sentences.")
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the choice as JSON.")] = False,
) -> None:
    """Choose the sentences of a text that are nearest to what it is about.

    Distances are geodesic: shortest paths in the graph of nearest neighbours, because only small
    distances of embeddings mean something. The sentences come in the order of their scores, one
    over the distance to the aspect, and none is nearly a repetition of another.
    """
    import numpy as np

    from kexue.lab.bars import progress_bars
    from kexue.lab.data import sentences as split
    from kexue.lab.data import text as read
    from kexue.retrieval.geodesic import GeodesicIndex
    from kexue.retrieval.geodesic import summarize as choose

    if sentences < 1 or neighbors < 1:
        raise UsageError(
            f"--sentences and --neighbors must be at least 1, got {sentences} and {neighbors}"
        )
    if not 0 <= apart < np.pi:
        raise UsageError(f"--apart must be an angle in [0, π), got {apart}")
    whole = list(dict.fromkeys(split(read(file))))
    with progress_bars() as bars:
        steps = None if bars is None else bars.add_task("sentences", total=3, metric="")

        def done() -> None:
            if bars is not None and steps is not None:
                bars.advance(steps)

        model: Encoder = (
            LatentSemanticEncoder.fit(whole)
            if encoder_path is None
            else SentenceEncoder(encoder_path)
        )
        vectors = model.encode(whole)
        # A sentence without any word has no direction.
        spoken = np.flatnonzero(vectors.any(1))
        if len(spoken) < 3:
            raise DataError(f"{file}: expected at least three sentences, got {len(spoken)}")
        done()
        centre = vectors[spoken].mean(0) if about is None else model.encode([about])[0]
        if not centre.any():
            raise UsageError(f"--about must share a word with the text, got {about!r}")
        index = GeodesicIndex(min(neighbors, len(spoken) - 1)).fit(vectors[spoken])
        done()
        chosen = choose(index, centre, n_sentences=sentences, min_distance=apart)
        scores = index.scores(centre)[chosen]
        done()
    rows = [
        {"score": float(score), "sentence": whole[spoken[number]]}
        for number, score in zip(chosen, scores, strict=True)
    ]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        typer.echo(f"{row['score']:6.3f}  {row['sentence']}")
