"""`pykernels train word2vec`: word vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...word2vec import Word2Vec
from .._output import BadInput, console, json_option, print_json, progress


@click.command(
    "word2vec", epilog="Example: pykernels train word2vec --text corpus.txt --output vectors.txt --near king"
)
@click.option("--text", type=click.Path(path_type=Path), required=True, help="UTF-8 text, a sentence a line.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the vectors in word2vec's format."
)
@click.option("--binary", is_flag=True, help="Its binary format.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path, dir_okay=False), help="Save the model here, go on from it."
)
@click.option("--cbow", is_flag=True, help="CBOW in place of skip-gram.")
@click.option("--hierarchical-softmax", is_flag=True, help="In place of negative sampling.")
@click.option("--size", "vector_size", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--window", type=click.IntRange(1, 64), default=5, show_default=True)
@click.option("--negatives", type=click.IntRange(1, 255), default=5, show_default=True)
@click.option("--min-count", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--sample", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="Subsampling; 0: none.")
@click.option("--epochs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--lr", type=click.FloatRange(min=0), help="Default: 0.025; CBOW: 0.05.")
@click.option(
    "--window-batched", is_flag=True, help="Share negatives over a window: twice as fast, learns a little less."
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="More: faster, not repeatable."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--near", multiple=True, metavar="WORD", help="Print this word's neighbours at the end (repeatable).")
@json_option
def command(
    text: Path,
    output: Path | None,
    binary: bool,
    checkpoint: Path | None,
    near: tuple[str, ...],
    threads: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Word vectors by skip-gram or CBOW, with negative sampling or hierarchical softmax.

    Ctrl-C saves the checkpoint, if one was asked for, and exits with 130; the same command goes on from it.
    """
    try:
        resumed = checkpoint is not None and checkpoint.exists()
        if checkpoint is not None and resumed:
            model = Word2Vec.load(checkpoint, threads=threads)
        else:
            model = Word2Vec(threads=threads, **options).build_vocabulary(text)
        words = int(model.vocabulary.counts.sum()) if model.vocabulary is not None else 0
        with progress(words * model.options.epochs) as advance:
            advance(0, "resuming word2vec" if resumed else "training word2vec")
            model.train(text, checkpoint=checkpoint, progress=lambda done, total: advance(done))
        vectors = model.word_vectors
        if output is not None:
            vectors.save(output, binary)
        neighbours = {word: vectors.most_similar(word) for word in near if word in vectors}
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    except KeyboardInterrupt:
        click.echo(f"Interrupted. {f'Saved: {checkpoint}' if checkpoint else 'Nothing was saved.'}", err=True)
        raise SystemExit(130) from None
    if as_json:
        missing = [word for word in near if word not in neighbours]
        print_json({"words": len(vectors), "tokens": words, "neighbours": neighbours, "missing": missing})
        return
    out = console()
    out.print(f"{len(vectors):,} words from {words:,} tokens, {model.options.epochs} epochs.")
    for word in near or vectors.words[len(vectors) // 100 : len(vectors) // 100 + 3]:
        found = vectors.most_similar(word, topn=8) if word in vectors else []
        out.print(
            f"{word}: " + (", ".join(f"{other} {cosine:.2f}" for other, cosine in found) or "not in the vocabulary")
        )
    if output is not None:
        out.print(f"Vectors: {output}", soft_wrap=True)
